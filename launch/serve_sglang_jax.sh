#!/usr/bin/env bash
# Serves a target with its draft head in sglang-jax on TPU: EAGLE3, 3 steps, topk 1, 4 draft tokens, tp 4, bfloat16.
#   bash launch/serve_sglang_jax.sh --target DIR [--head DIR] [options] [sglang-jax's own options]
#     --target=DIR  the target, a folder or a hub id
#     --head=DIR    its head, as `eagle3-xla export` writes it; without one: the server for bench --baseline
#     --port=N      (30000)
#     --cpu         float32 on the CPU, with the environment that tests/engines/environments.sh makes
#     --dry-run     print the command, run none
# Everything else goes to sglang-jax and outweighs what is set here. SGLANG_JAX is a checkout of its source (no release
# has EAGLE3), SGLANG_JAX_PYTHON the Python with what that imports (python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/serve_common.sh"

[ -n "${SGLANG_JAX:-}" ] || [ -n "$dry_run" ] || die "SGLANG_JAX must name a checkout of sglang-jax's source"
command=(env PYTHONPATH="${SGLANG_JAX:-SGLANG_JAX}/python")
module=(-m sgl_jax.launch_server)
if [ -n "$cpu" ]; then
  cpu_python sglang-jax
  command+=(JAX_PLATFORMS=cpu SGLANG_CI_SMALL_KV_SIZE=2048) # tokens of the cache, of the head too
  module=("$root/tests/engines/serve_sglang_jax_cpu.py") # its attention kernel runs on TPU alone
  settings=(--device cpu --dtype float32 --tp-size 1 --page-size 16 --max-running-requests 1
    --context-length 1024 --max-prefill-tokens 1024 --chunked-prefill-size -1 --disable-precompile)
else
  python="${SGLANG_JAX_PYTHON:-python3}"
  settings=(--device tpu --dtype bfloat16 --tp-size 4 --page-size 64 --mem-fraction-static 0.8)
fi
command+=("$python" "${module[@]}" --model-path "$target" --port "$port" --attention-backend fa
  --disable-overlap-schedule "${settings[@]}")
if [ -n "$head" ]; then
  command+=(--speculative-algorithm EAGLE3 --speculative-draft-model-path "$head" --speculative-num-steps 3
    --speculative-eagle-topk 1 --speculative-num-draft-tokens 4)
fi
[ -n "$dry_run" ] || PYTHONPATH="$SGLANG_JAX/python" check_engine sglang-jax sgl_jax
serve "${command[@]}" ${arguments[@]+"${arguments[@]}"}
