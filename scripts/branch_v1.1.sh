#!/usr/bin/env bash
# TinyLlama v1.1 Math&Code or Chinese, from the end of the basic stage of pretrain_v1.1.sh on. Start it again to resume.
# usage: branch_v1.1.sh math-code|chinese    DATA, RUNS and HOSTFILE as there; further arguments go to pretrain.
set -euo pipefail
exec tinyllama-ds pretrain --recipe "tinyllama-v1.1-$1" --deepspeed-config zero3_v1.1 \
  --data "${DATA:-data}" --run-dir "${RUNS:-runs}/v1.1-$1" --branch-from "${RUNS:-runs}/v1.1" \
  --hostfile "${HOSTFILE:-a100_16x4}" "${@:2}"
