#!/usr/bin/env bash
# SlimPajama-627B without its GitHub part as token shards; start it again to go on with it.
# RAW, DATA and TOKENIZER are paths, HOSTFILE names hosts that share the work; arguments go to prepare.
set -euo pipefail
exec tinyllama-ds prepare --source slimpajama --input "${RAW:-raw}/SlimPajama-627B" --tokenizer "${TOKENIZER:-tokenizer.model}" \
  --output "${DATA:-data}" ${HOSTFILE:+--hostfile "$HOSTFILE"} "$@"
