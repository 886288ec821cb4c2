#!/usr/bin/env bash
# Set up .venv, then everything that CI checks: format, lint, types, tests. Further arguments go to pytest: --hosts (as
# root) runs the whole multi-host suite, --all-faults every fault, --rehearsal that of TinyLlama v1.1.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$root"
ruff format --check .
ruff check .
mypy
# Two at a time: half of a launch is imports on one core.
exec pytest --numprocesses 2 --dist loadfile "$@"
