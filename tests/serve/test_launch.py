"""launch/serve_*.sh: the published flags, and one line for what is wrong before the engine starts or when it ends."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Gemma3TextConfig, GptOssConfig, Qwen2Config

from eagle3_xla.doctor.engines import CHAIN, TREE, served_by
from eagle3_xla.draft.saved import read_head
from eagle3_xla.serve.patch import MODEL
from eagle3_xla.target import families

LAUNCH = Path(__file__).parents[2] / "launch"
SGLANG, SGLANG_JAX = LAUNCH / "serve_sglang.sh", LAUNCH / "serve_sglang_jax.sh"


def script(name: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    command = ["bash", name, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def flags(name: Path, *arguments, **environment) -> dict[str, str]:
    """Flag -> value of the command that --dry-run prints last; a flag's last value counts."""
    done = script(name, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    return {word: value for word, value in zip(words, words[1:]) if word.startswith("--")} | {"command": words[0]}


def test_published_flags():
    pair = ("--target", "a target", "--head", "a head")
    found = flags(SGLANG, *pair)
    assert found["--model-path"] == "a target" and found["--speculative-draft-model-path"] == "a head"
    assert found["--speculative-algorithm"] == "EAGLE3" and found["--dtype"] == "bfloat16"
    assert (found["--speculative-num-steps"], found["--speculative-eagle-topk"]) == ("5", "4")
    found = flags(SGLANG, "--target=~/t", "--head=~/h", HOME="/home/a me")
    assert found["--model-path"] == "/home/a me/t" and found["--speculative-draft-model-path"] == "/home/a me/h"
    found = flags(SGLANG_JAX, *pair, "--port=8000")
    assert (found["--speculative-num-steps"], found["--speculative-eagle-topk"]) == ("3", "1")
    assert (found["--speculative-num-draft-tokens"], found["--tp-size"]) == ("4", "4")
    assert (found["--device"], found["--dtype"], found["--port"]) == ("tpu", "bfloat16", "8000")


@pytest.mark.parametrize("name", [SGLANG, SGLANG_JAX])
def test_on_the_cpu_and_without_a_head(name):
    found = flags(name, "--target", "t", "--cpu", "--dtype", "float16")
    assert (found["--device"], found["--dtype"]) == ("cpu", "float16")
    assert not any(flag.startswith("--speculative") for flag in found)


def test_a_longrope_target(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"max_position_embeddings": 131072,\n "original_max_position_embeddings": 4096,\n'
        ' "rope_scaling": {"type": "longrope"}}'
    )
    assert flags(SGLANG, "--target", tmp_path, "--head", "h")["--context-length"] == "4096"
    assert flags(SGLANG, "--target", tmp_path, "--head", "h", "--context-length", 99)["--context-length"] == "99"
    assert "--context-length" not in flags(SGLANG, "--target", "t", "--head", "h")


FA3 = {"--speculative-draft-window-size": 15, "--speculative-draft-attention-backend": "fa3"}
TRITON = {"--attention-backend": "triton"}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention"]}


@pytest.mark.parametrize(
    "target, window, needed",
    [
        (Qwen2Config, {}, {}),
        (Qwen2Config, WINDOW, CHAIN | FA3),
        (Qwen2Config, WINDOW | {"use_sliding_window": False}, {}),
        (Qwen2Config, {"sliding_window": 131072, "use_sliding_window": False}, {}),  # SpecForge's qwen2.5-7b-eagle3
        (Qwen2Config, {"sliding_window": 131072}, {}),
        (GptOssConfig, {}, CHAIN),
        (Gemma3TextConfig, {}, CHAIN | TRITON),
        (Gemma3TextConfig, WINDOW, CHAIN | TRITON | FA3),
    ],
)
def test_windows_on_a_gpu(target, window, needed, exported_head, tmp_path):
    """SGLang is given the drafts and the attention that it is right with; the script finds them in the folders."""
    head = shutil.copytree(exported_head, tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | window, indent=2))
    target().save_pretrained(tmp_path)
    assert served_by(read_head(head), target())[families.SGLANG] == needed
    pair = ("--target", tmp_path, "--head", head)
    wanted = {name: str(value) for name, value in (TREE | needed).items()}
    chosen = {*TREE, *FA3, *TRITON}
    assert {name: value for name, value in flags(SGLANG, *pair).items() if name in chosen} == wanted
    found = flags(SGLANG, *pair, "--cpu")
    assert found["--speculative-eagle-topk"] == "4" and not {*found} & {
        *TRITON,
        "--speculative-draft-attention-backend",
    }
    assert flags(SGLANG, *pair, "--speculative-eagle-topk", 2)["--speculative-eagle-topk"] == "2"


def line(done: subprocess.CompletedProcess, code: int) -> str:
    """The script's own line, the last on stderr."""
    assert done.returncode == code, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("serve_sglang") and "Traceback" not in last
    return last


def test_what_is_wrong_before_the_start(tmp_path):
    assert "--target DIR is needed" in line(script(SGLANG), 2)
    assert "no head at" in line(script(SGLANG, "--target", "t", "--head", tmp_path), 2)
    assert "--port is '80a'; a whole number" in line(script(SGLANG, "--target", "t", "--port", "80a"), 2)
    assert "must name a checkout of sglang-jax" in line(script(SGLANG_JAX, "--target", "t", SGLANG_JAX=""), 2)
    for name, engine in ((SGLANG, "sglang"), (SGLANG_JAX, "sglang-jax")):
        done = script(name, "--target", "t", SGLANG_JAX="/nowhere")
        assert f"{engine} is not installed for python3" in line(done, 2) and done.stderr.count("\n") == 1


def test_an_engine_without_the_patch_a_port_in_use_and_an_engine_that_dies(small_target, tmp_path):
    model = tmp_path / "engine" / "sglang" / MODEL
    model.parent.mkdir(parents=True)
    model.write_text("class Qwen2ForCausalLM: ...\n")
    (tmp_path / "config.json").write_text("{}")
    environment = {"PYTHONPATH": str(tmp_path / "engine"), "SGLANG_PYTHON": sys.executable}
    arguments = ("--target", small_target, "--head", tmp_path)
    done = script(SGLANG, *arguments, **environment)
    assert f"eagle3-xla patch apply --engine sglang --path {model.parents[2]}" in line(done, 2)
    model.write_text("def set_eagle3_layers_to_capture(): ...\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = script(SGLANG, *arguments, "--port", port, **environment)
        assert f"port {port} is in use" in line(done, 2)
    # This package has no server to start: its Python says so and ends.
    done = script(SGLANG, *arguments, "--port", port, **environment)
    assert "the engine ended by itself (exit code 1)" in line(done, 1) and "No module named" in done.stderr


def test_the_python_of_an_engines_environment(tmp_path):
    """Any that there is, where its packages have builds for it."""
    (tmp_path / "bin").mkdir()
    for tool in "bash basename cat cksum dirname flock mkdir sed".split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    command = ["bash", LAUNCH.parent / "tests/engines/environments.sh", "-d", tmp_path / "engines"]

    def ended(name: str) -> tuple[int, str]:
        environment = {"PATH": str(tmp_path / "bin")}
        done = subprocess.run([*command, name], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr.splitlines()[-1]

    def install(version: str) -> None:
        python = tmp_path / "bin" / f"python{version}"
        python.write_text(f'#!/bin/bash\n[ "$1" != -m ] || {{ echo "$*" >&2; exit 3; }}\necho "Python {version}.1"\n')
        python.chmod(0o755)

    assert ended("vllm") == (2, "environments.sh: Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python3.11")
    install("3.13")
    assert ended("vllm") == (3, f"-m venv --clear {tmp_path}/engines/vllm")
    assert ended("sglang")[0] == 2 and "sglang needs Python 3.11 or 3.12" in ended("sglang")[1]
    assert ended("sglang-jax") == (
        2,
        "environments.sh: sglang-jax needs Python 3.12; set PYTHON312=/path/to/python3.12",
    )
    install("3.12")
    for name in ("sglang", "sglang-0.5.1", "sglang-jax"):
        assert ended(name) == (3, f"-m venv --clear {tmp_path}/engines/{name}")
