#!/usr/bin/env bash
# The whole test suite from a fresh clone:  bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
"$python" -m ruff check .
"$python" -m mypy
if [ $# -eq 0 ]; then
  # The engines' environments are installed while the other tests run; the engine tests wait for them.
  mkdir -p .engines
  PYTHON="$base" bash tests/engines/environments.sh sglang vllm >.engines/install.log 2>&1 &
  set -- --numprocesses=auto --dist=loadgroup
fi
exec "$python" -m pytest "$@"
