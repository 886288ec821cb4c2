#!/usr/bin/env bash
# TinyLlama v1: 1,430,512 steps of 2,097,152 tokens, on 16 A100-40G in 90 days. Start it again to resume.
# DATA and RUNS are directories, HOSTFILE names the GPUs; arguments go to pretrain.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
exec tinyllama-ds pretrain --recipe tinyllama-v1 --deepspeed-config "$root/ds_configs/zero3.json" \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/v1" --hostfile "${HOSTFILE:-$root/hostfiles/a100_2x8}" "$@"
