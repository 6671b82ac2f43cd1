#!/usr/bin/env bash
# The whole test suite from a fresh clone:  bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
if [ $# -eq 0 ]; then
  # The engines' environments are installed while the other tests run; the engine tests wait for them.
  mkdir -p .engines
  PYTHON="$base" bash tests/engines/environments.sh sglang vllm >.engines/install.log 2>&1 &
  # The browser that looks at the report's page; whoever isn't root has to have it.
  if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get -qq update; apt-get install -y -qq --no-install-recommends chromium; } >.engines/chromium.log 2>&1 &
  fi
  set -- --numprocesses=auto --dist=loadgroup
fi
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest "$@"
