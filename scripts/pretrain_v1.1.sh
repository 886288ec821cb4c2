#!/usr/bin/env bash
# TinyLlama v1.1: the basic stage that all variants share, and the general variant to its end. Start it again to resume.
# DATA and RUNS are directories, HOSTFILE names the GPUs; arguments go to pretrain.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
exec tinyllama-ds pretrain --recipe tinyllama-v1.1 --deepspeed-config "$root/ds_configs/zero3_v1.1.json" \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/v1.1" --hostfile "${HOSTFILE:-$root/hostfiles/a100_16x4}" "$@"
