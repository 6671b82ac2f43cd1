#!/usr/bin/env bash
# The whole test suite from a fresh clone:  bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
