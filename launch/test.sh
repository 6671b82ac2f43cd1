#!/usr/bin/env bash
# The whole test suite from a fresh clone:  bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
if [ $# -eq 0 ] && find_python; then # without one, install.sh says so
  # The engines' environments are installed while the package is, and the first tests run; the engine tests wait for them.
  mkdir -p .engines
  PYTHON="$base" bash tests/engines/environments.sh sglang vllm >.engines/install.log 2>&1 &
  # The browser that looks at the report's page; whoever isn't root has to have it.
  if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get -qq update; apt-get install -y -qq --no-install-recommends chromium; } >.engines/chromium.log 2>&1 &
  fi
  set -- --numprocesses=auto --dist=loadgroup
fi
source launch/install.sh
"$python" -m ruff check .
"$python" -m mypy & # beside the tests; what it finds fails the run all the same
types=$! code=0
"$python" -m pytest "$@" || code=$?
wait "$types" || { echo "mypy: see above" >&2; code=1; }
exit "$code"
