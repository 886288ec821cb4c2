#!/usr/bin/env bash
# SkyPile-150B as token shards; start it again to go on with it.
# RAW, DATA and TOKENIZER are paths, HOSTFILE names hosts that share the work; arguments go to prepare.
set -euo pipefail
exec tinyllama-ds prepare --source skypile --input "${RAW:-raw}/SkyPile-150B" --tokenizer "${TOKENIZER:-tokenizer.model}" \
  --output "${DATA:-data}" ${HOSTFILE:+--hostfile "$HOSTFILE"} "$@"
