"""Start an engine's real HTTP server on this machine: SGLang, sglang-jax or vLLM, with or without a head.

    PYTHONPATH=tests python -m engines.servers sglang --target quickstart/target [--head quickstart/head] [--topk 4]

sglang-jax is the checkout that SGLANG_JAX names. The environments come from environments.sh, which is run when they
are needed.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple


class Running(NamedTuple):
    url: str
    process: subprocess.Popen


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = Path(os.environ.get("EAGLE3_ENGINES", ROOT / ".engines"))
START_SECONDS = 600


def engine_python(name: str) -> Path:
    """The Python of an engine's environment; makes the environment, or waits for the start that makes it."""
    subprocess.run(["bash", HERE / "environments.sh", "-d", ENVIRONMENTS, name], check=True, stdout=subprocess.DEVNULL)
    return ENVIRONMENTS / name / "bin" / "python"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sglang_command(
    target: Path, head: Path | None, port: int, steps: int, topk: int, draft_tokens: int, context: int | None
) -> list[str]:
    """The launch script's settings for the CPU: float32, else the engine's own defaults for a small machine."""
    command = ["bash", ROOT / "launch" / "serve_sglang.sh", "--cpu", "--target", target, "--port", port]
    command += ["--log-level", "warning", *(["--context-length", context] if context else [])]
    if head:
        command += ["--head", head, "--speculative-num-steps", steps, "--speculative-eagle-topk", topk]
        command += ["--speculative-num-draft-tokens", draft_tokens]
    return [str(part) for part in command]


def sglang_jax_command(target: Path, head: Path | None, port: int, steps: int) -> list[str]:
    command = ["bash", ROOT / "launch" / "serve_sglang_jax.sh", "--cpu", "--target", target, "--port", port]
    command += ["--decode-log-interval", 1]
    if head:
        command += ["--head", head, "--speculative-num-steps", steps, "--speculative-num-draft-tokens", steps + 1]
    return [str(part) for part in command]


def vllm_command(
    target: Path, head: Path | None, port: int, steps: int, sampled: bool, context: int | None
) -> list[str]:
    program = HERE / ("serve_vllm_cpu.py" if sampled else "serve_vllm.py")
    command = [engine_python("vllm"), program, "--model", target, "--port", port]
    command += "--dtype float32 --max-num-seqs 8 --enforce-eager --no-enable-log-requests".split()
    command += ["--max-model-len", context or 4096]
    if head:
        speculative = {"method": "eagle3", "model": str(head), "num_speculative_tokens": steps}
        command += ["--speculative-config", json.dumps(speculative)]
    return [str(part) for part in command]


def engine_environment(engine: str, sampled: bool) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "EAGLE3_ENGINES": str(ENVIRONMENTS)}
    if engine == "sglang" and sampled:
        own |= {"STAND_INS": f"{HERE / 'stand_ins'}:{HERE / 'stand_ins_sampled'}"}
    if engine == "vllm":
        own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": ""}
        own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine is its own worker: one import less
        own |= {"VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
    return os.environ | own


@contextlib.contextmanager
def serve(
    engine: str,
    target: Path,
    head: Path | None = None,
    steps: int = 5,
    topk: int = 1,
    draft_tokens: int | None = None,
    log: Path | None = None,
    port: int | None = None,
    sampled: bool = False,
    context: int | None = None,
):
    """Run a server until the block ends. sampled: with the sampling of checked drafts mended, where the CPU build has
    it wrong (sampled.py); context: positions of a request, where the target has more. Raises RuntimeError with the end
    of its log when it dies at the start.
    """
    port = port or free_port()
    if engine == "sglang":
        command = sglang_command(target, head, port, steps, topk, draft_tokens or steps + 1, context)
    elif engine == "vllm":
        command = vllm_command(target, head, port, steps, sampled, context)
    else:
        command = sglang_jax_command(target, head, port, steps)
    log = log or Path(tempfile.mkdtemp()) / f"{engine}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=engine_environment(engine, sampled),
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield Running(f"http://127.0.0.1:{port}", process)
    finally:
        # The engine's workers are children of the server: all in a session of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server died with {process.returncode}:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"no server at {url} after {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("sglang", "sglang-jax", "vllm"))
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--head", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--topk", type=int, default=1, help="SGLang only")
    parser.add_argument("--draft-tokens", type=int, help="SGLang only; default: steps + 1")
    parser.add_argument("--port", type=int)
    options = vars(parser.parse_args())
    started = time.monotonic()
    with serve(**options) as server:
        print(f"{options['engine']} answers at {server.url} after {time.monotonic() - started:.0f} s; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
