#!/usr/bin/env bash
# A TinyLlama of 121 million parameters on one GPU, in about fifteen hours on a card of 24 GB. Start it again to resume.
# DATA and RUNS are the directories of data and runs; arguments go to pretrain.
set -euo pipefail
exec tinyllama-ds pretrain --recipe tinyllama-120m --deepspeed-config zero0 \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/120m" --num-gpus 1 "$@"
