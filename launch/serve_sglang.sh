#!/usr/bin/env bash
# Serves a target with its draft head in SGLang: EAGLE3, 5 steps, topk 4, bfloat16; a chain where SGLang is wrong with
# the tree, which it sees in the folders (of hub ids give what `eval` prints).
#   bash launch/serve_sglang.sh --target DIR [--head DIR] [options] [SGLang's own options]
#     --target=DIR  the target, a folder or a hub id
#     --head=DIR    its head, as `eagle3-xla export` writes it; without one: the server for bench --baseline
#     --port=N      (30000)
#     --cpu         float32 on the CPU, with the environment that tests/engines/environments.sh makes
#     --dry-run     print the command, run none
# Everything else goes to SGLang and outweighs what is set here; a chain of 5 drafts in place of the tree:
# --speculative-eagle-topk 1 --speculative-num-draft-tokens 6. SGLANG_PYTHON is the Python that has SGLang (python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/serve_common.sh"

if [ -n "$cpu" ]; then
  cpu_python sglang
  # SGLang itself is unmodified; a plain torch version of its CUDA kernel package is on its path.
  command=(env PYTHONPATH="${STAND_INS:-$root/tests/engines/stand_ins}" SGLANG_USE_CPU_ENGINE=1 TOKENIZERS_PARALLELISM=false
    TORCHDYNAMO_DISABLE=1) # compiling two small functions takes a minute, and a compiler
  settings=(--device cpu --dtype float32 --disable-cuda-graph --skip-server-warmup --sleep-on-idle
    --prefill-attention-backend intel_amx --decode-attention-backend intel_amx
    --mem-fraction-static 0.3 --max-total-tokens 8192 --max-running-requests 8)
else
  python="${SGLANG_PYTHON:-python3}" command=()
  settings=(--dtype bfloat16 --mem-fraction-static 0.75)
fi
command+=("$python" -m sglang.launch_server --model-path "$target" --port "$port" "${settings[@]}")
if [ -n "$head" ]; then
  command+=(--speculative-algorithm EAGLE3 --speculative-draft-model-path "$head" --speculative-num-steps 5
    --speculative-eagle-topk 4 --speculative-num-draft-tokens 8)
  # A head with a sliding window (window_of in src/eagle3_xla/draft/saved.py): SGLang counts the positions before a
  # row's own.
  window=""
  if grep -q '"sliding_attention"' "$head/config.json" 2>/dev/null &&
    ! grep -Eq '"use_sliding_window": *false' "$head/config.json"; then
    window="$(sed -n 's/.*"sliding_window": *\([0-9]\{1,\}\).*/\1/p' "$head/config.json")"
  fi
  [ -z "$window" ] || command+=(--speculative-draft-window-size "$((window - 1))")
  if [ -z "$cpu" ]; then # what a GPU's attention is right with: served_by in src/eagle3_xla/doctor/engines.py says why
    of_type() { grep -Eq "\"model_type\": *\"($1)\"" "$target/config.json" 2>/dev/null; }
    if [ -n "$window" ] || of_type "gpt_oss|gemma3_text"; then
      command+=(--speculative-eagle-topk 1 --speculative-num-draft-tokens 6)
    fi
    ! of_type gemma3_text || command+=(--attention-backend triton)
    [ -z "$window" ] || command+=(--speculative-draft-attention-backend fa3)
  fi
  # A longrope target: its head has the positions that the target was first trained with.
  if grep -q '"longrope"' "$target/config.json" 2>/dev/null; then
    context="$(sed -n 's/.*"original_max_position_embeddings": *\([0-9]\{1,\}\).*/\1/p' "$target/config.json")"
    [ -z "$context" ] || command+=(--context-length "${context%%$'\n'*}")
  fi
fi
[ -n "$dry_run" ] || check_engine sglang sglang
serve "${command[@]}" ${arguments[@]+"${arguments[@]}"}
