#!/usr/bin/env bash
# Tests and measures everything on one GPU in a given time; see ON_GPU.md.
#
#     benchmarks/on_gpu.sh [--budget SECONDS] [--rehearse] [--out DIR] [--flash-attn SITE] [PART...]
#
# Takes the `python` on PATH (else `python3`), which needs the package's dependencies, on PYTHONPATH for all it matters.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$(command -v python || command -v python3)" "$here/on_gpu.py" "$@"
