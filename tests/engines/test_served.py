"""The trained head in the real engines, over HTTP, as a user measures it: what `eval` shows is what is served.

`tests/engines/full.py` is the long version: 20 prompts, trees, servers without the head, broken heads.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from engines.conftest import PROMPTS
from engines.servers import serve

FEW = ["--prompts", PROMPTS, "--limit", "4", "--max-new-tokens", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_served_is_what_eval_shows(engine, trained, cli, tmp_path):
    target, head = trained
    with serve(engine, target, head, log=tmp_path / "server.log") as server:
        done = cli("gap", "--server", server.url, "--target", target, "--draft", head, *FEW, "--json")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        figures = json.loads(done.stdout)
        assert figures["ok"] and abs(figures["difference"]) <= 0.02 and not figures["causes"]
        assert figures["identical"]  # to our greedy decoding, which is the target's own (tests/evaluate)
        assert figures["engine"] == engine and figures["served"] > 1.0

        done = cli("bench", "--server", server.url, *FEW, "--concurrency", "1,4", "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        bench = json.loads(done.stdout)
        assert bench["acceptance_length"] == pytest.approx(figures["served"])
        assert [row["concurrency"] for row in bench["concurrency"]] == [1, 4] and bench["speedup"] is None
        assert len(bench["acceptance"]) == 5 and bench["acceptance"] == sorted(bench["acceptance"], reverse=True)
        assert 1 + sum(bench["acceptance"]) == pytest.approx(bench["acceptance_length"])
        assert 0 < bench["time_to_first_token"] < bench["seconds"] and bench["tokens_per_second"] > 0

        # The server is killed in the middle of a measurement: one clear line.
        command = [sys.executable, "-m", "eagle3_xla", "bench", "--server", server.url, "--prompts", PROMPTS]
        broken_off = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(12)
        os.killpg(server.process.pid, signal.SIGKILL)
        assert broken_off.wait(60) == 1
        lines = [line for line in broken_off.stderr.read().splitlines() if line.startswith("eagle3-xla bench: ")]
        assert len(lines) == 1 and f"the server at {server.url} died" in lines[0], lines
        done = cli("bench", "--server", server.url, *FEW)
        assert done.returncode == 2 and f"no server answers at {server.url}" in done.stderr
