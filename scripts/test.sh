#!/usr/bin/env bash
# Set up .venv, then check format, lint, types, and run the tests. CONTRIBUTING.md says what each tier proves:
#   test.sh              all that CI runs
#   test.sh --quick      the same checks, and the tests that start no process: while you work
#   test.sh --all-faults | --hosts | --rehearsal | --real      CI's tests and more
#   test.sh --gpu        what needs a GPU, and nothing else
# Other arguments go to pytest, too: test.sh --quick tests/model -k rope
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
# The BLAS of numpy and scipy would start a thread per core in each process, which wait for each other at full load.
export OPENBLAS_NUM_THREADS=1
cd "$root"
ruff format --check .
ruff check .
mypy
# More than there are cores: many tests wait for processes, time-outs and restarts most of the time.
exec pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
