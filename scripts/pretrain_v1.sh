#!/usr/bin/env bash
# TinyLlama v1: 1,430,512 steps of 2,097,152 tokens, on 16 A100-40G in 90 days. Start it again to resume.
# DATA and RUNS are directories, HOSTFILE names the GPUs; arguments go to pretrain.
set -euo pipefail
exec tinyllama-ds pretrain --recipe tinyllama-v1 --deepspeed-config zero3 \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/v1" --hostfile "${HOSTFILE:-a100_2x8}" "$@"
