#!/usr/bin/env bash
# From a fresh clone to a head that its target accepts, on a CPU:  bash launch/quickstart.sh [--out DIR] [--minutes N]
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec "$python" -m eagle3_xla quickstart "$@"
