# Sourced by the other scripts: makes .venv with the pinned dependencies, and skips what is done.
# usage: source environment.sh [extra]     extra: dev for linters and pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
PATH=$venv/bin:$PATH
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "tinyllama_ds needs Python 3.11, 3.12 or 3.13; set PYTHON to one" >&2
  return 78
}

install_into_venv() {
  local extra=$1 stamp wanted
  stamp=$venv/installed${extra:+-$extra}
  wanted=$(cat "$root/setup.py" "$root/constraints.txt" | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  if [[ ! -x $venv/bin/python ]]; then
    "$(find_python)" -m venv "$venv"
  fi
  echo "installing pinned dependencies into $venv (PyTorch is large, this is done once)"
  # DeepSpeed's setup imports torch, and ninja speeds up what it compiles; both must be there before it.
  pip install --quiet --constraint "$root/constraints.txt" torch setuptools wheel ninja numpy
  pip install --quiet --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
  echo "$wanted" >"$stamp"
}

install_into_venv "${1:-}"
