#!/usr/bin/env bash
# Everything that is measured on a GPU: kernels and training against their references, the peers, a grid of ZeRO files and
# micro batches, the attention kernels, SwiGLU.
#
#     benchmarks/on_gpu.sh [OUT [PART...]]     figures and logs go to OUT, benchmarks/results/gpu by default
#
# Takes the `python` on PATH, which needs the package's dependencies. A part that fails leaves its log, and the others go on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
parts=${*:2}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()

part() {
  local name=$1
  shift
  [[ -z $parts || " $parts " == *" $name "* ]] || return 0
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$out/$name.txt" || failed+=("$name")
}

bench() {
  python -m tinyllama_ds.cli bench "$@"
}

part tests python -m pytest -q --gpu
part peers python benchmarks/training_peers.py --json "$out/training_peers.json"
part grid bench --deepspeed-config ds_configs/zero{1,2,3,3_keep}.json --micro-batch 4 8 16 --compile on --output "$out/grid"
part attention bench --deepspeed-config ds_configs/zero3_keep.json --output "$out/attention" \
  --attention flash_attention_3 flash_attention_2 sdpa_flash sdpa_cudnn
part swiglu python benchmarks/swiglu.py --tokens 16384
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
