#!/usr/bin/env bash
# TinyLlama v1.1: the basic stage that all variants share, and the general variant to its end. Start it again to resume.
# DATA and RUNS are directories, HOSTFILE names the GPUs; arguments go to pretrain.
set -euo pipefail
exec tinyllama-ds pretrain --recipe tinyllama-v1.1 --deepspeed-config zero3_v1.1 \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/v1.1" --hostfile "${HOSTFILE:-a100_16x4}" "$@"
