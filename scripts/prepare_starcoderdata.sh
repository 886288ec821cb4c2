#!/usr/bin/env bash
# StarCoderData as token shards; for v1.1 Math&Code give --subset python jupyter-scripts-dedup-filtered.
# RAW, DATA and TOKENIZER are paths, HOSTFILE names hosts that share the work; arguments go to prepare.
set -euo pipefail
exec tinyllama-ds prepare --source starcoderdata --input "${RAW:-raw}/starcoderdata" --tokenizer "${TOKENIZER:-tokenizer.model}" \
  --output "${DATA:-data}" ${HOSTFILE:+--hostfile "$HOSTFILE"} "$@"
