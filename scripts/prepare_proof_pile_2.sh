#!/usr/bin/env bash
# Proof-Pile-2, all three parts, as token shards; start it again to go on with it.
# RAW, DATA and TOKENIZER are paths, HOSTFILE names hosts that share the work; arguments go to prepare.
set -euo pipefail
exec tinyllama-ds prepare --source proof-pile-2 --input "${RAW:-raw}/proof-pile-2" --tokenizer "${TOKENIZER:-tokenizer.model}" \
  --output "${DATA:-data}" ${HOSTFILE:+--hostfile "$HOSTFILE"} "$@"
