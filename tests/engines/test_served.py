"""The trained head in the real engines, over HTTP: what `eval` shows is what is served.

`tests/engines/full.py` is the long version: 20 prompts, trees, servers without the head, broken heads.
"""

import json
import os
import signal
import threading

import pytest
from engines.conftest import PROMPTS

from eagle3_xla.data.tokenizer import load_tokenizer
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, prompt_ids
from eagle3_xla.serve.bench import run_prompts
from eagle3_xla.serve.client import Request, connect
from eagle3_xla.serve.gap import gap

FEW = EvalOptions(limit=2, max_new_tokens=24)


@pytest.fixture(scope="module", autouse=True)
def decoded_once():
    """`gap` decodes offline for each engine, here with the same head, prompts and shape. The key has all that one of
    its experiments changes."""
    decoded = {}

    def remember(pair, ids, stop_ids, options):
        of_pair = pair.layers, pair.d2t.tolist(), pair.head.window, pair.head.config.rope_theta
        key = repr((ids, sorted(stop_ids), options, of_pair))
        if key not in decoded:
            decoded[key] = decode_all(pair, ids, stop_ids, options)
        return decoded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eagle3_xla.serve.gap.decode_all", remember)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])  # vLLM's server runs already, and is killed here
def test_served_is_what_eval_shows(engine, trained, server_of, forks, monkeypatch):
    (target, head), server = trained, server_of(engine)
    figures = gap(str(target), str(head), PROMPTS, server.url, FEW)
    assert figures["ok"] and abs(figures["difference"]) <= 0.02 and not figures["causes"], figures
    assert figures["identical"]  # to our greedy decoding, which is the target's own (tests/evaluate)
    assert figures["engine"] == engine and figures["served"] > 1.0

    arguments = ["--prompts", PROMPTS, "--limit", 2, "--max-new-tokens", 24, "--concurrency", 2, "--json"]
    done = forks.run("bench", "--server", server.url, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    bench = json.loads(done.stdout)
    assert bench["acceptance_length"] == pytest.approx(figures["served"])
    assert len(bench["acceptance"]) == 5 and bench["acceptance"] == sorted(bench["acceptance"], reverse=True)
    assert 1 + sum(bench["acceptance"]) == pytest.approx(bench["acceptance_length"])
    assert 0 < bench["time_to_first_token"] < bench["seconds"] and bench["tokens_per_second"] > 0
    assert bench["speedup"] is None and [row["concurrency"] for row in bench["concurrency"]] == [2]

    # The server is killed in the middle of a measurement: one clear line.
    ids = prompt_ids(load_tokenizer(str(target)), PROMPTS, FEW, 10**6)
    connected = connect(server.url)
    generate, asked = connected.generate, []

    def killed_at_the_third(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 4:  # the warm-up was the first
            threading.Timer(0.2, os.killpg, (server.process.pid, signal.SIGKILL)).start()
        return generate(*arguments, **options)

    monkeypatch.setattr(connected, "generate", killed_at_the_third)
    with pytest.raises(RunError, match=rf"after [2-9] of 20 answers: the server at {server.url} died"):
        run_prompts(connected, ids * 10, Request(4), 1)
    with pytest.raises(UserError, match=f"no server answers at {server.url}"):
        connect(server.url)
