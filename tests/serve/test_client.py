"""Servers that are none, or fail: one clear line each. What the engines really answer is tested in tests/engines."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eagle3_xla.config import UserError
from eagle3_xla.serve.bench import BenchOptions, bench, screen
from eagle3_xla.serve.client import VLLM, Drafts, Request, connect

INFO = {"model_path": "", "version": "0.5.21", "speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "d"}
INFO |= {"speculative_num_steps": 2, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3}
METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 7.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 3.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7954941838672135e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 35.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 1.0
"""


@pytest.fixture
def serving():
    """serving(answers) -> URL of a server; answers: path -> (status, body)."""
    started = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = answers.get(self.path, (404, "{}"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) + (20 if self.path in cut else 0)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *args):
                pass

        cut = answers.pop("cut", ())  # answers that end early: the connection closes before their announced length
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()


def chunk(tokens, **meta):
    return (
        "data: " + json.dumps({"output_ids": tokens, "meta_info": {"completion_tokens": len(tokens)} | meta}) + "\n\n"
    )


def test_nothing_and_neither(serving):
    with pytest.raises(UserError, match="is not a URL; one looks like http"):
        connect("localhost:30000")
    with pytest.raises(UserError, match=r"no server answers at http://127.0.0.1:9 \(.*refused"):
        connect("http://127.0.0.1:9")
    url = serving({"/server_info": (200, "<html>"), "/version": (200, "{}")})
    with pytest.raises(UserError, match=f"what answers at {url} is neither an SGLang nor a vLLM server"):
        connect(url)


def test_answers_and_failures_of_a_stream(serving):
    full = chunk([5]) + chunk(
        [5, 6, 7], spec_verify_ct=1, spec_num_correct_drafts=1, spec_correct_drafts_histogram=[0, 1]
    )
    server = connect(serving({"/server_info": (200, json.dumps(INFO)), "/generate": (200, full + "data: [DONE]\n\n")}))
    answer = server.generate([1, 2], Request(8))
    assert answer.tokens == [5, 6, 7] and answer.drafts == Drafts(1, 1, [1, 0])
    assert answer.drafts.acceptance_length == 2.0 and answer.drafts.acceptance == [1.0, 0.0]

    def failing(status, body, **more):
        return connect(serving({"/server_info": (200, json.dumps(INFO)), "/generate": (status, body), **more}))

    with pytest.raises(ConnectionError, match="answered 500: out of memory"):
        failing(500, "out of\nmemory").generate([1], Request(8))
    with pytest.raises(ConnectionError, match="died or hangs"):
        failing(200, chunk([5]), cut=("/generate",)).generate([1], Request(8))
    with pytest.raises(ConnectionError, match="without a token"):
        failing(200, "").generate([1], Request(8))
    with pytest.raises(UserError, match="SGLang 0.5.21 at .* does not count accepted drafts"):
        failing(200, chunk([5, 6])).generate([1], Request(8))


def test_counters_of_vllm(serving):
    model = {"data": [{"id": "m", "root": "/models/m", "owned_by": "vllm"}]}
    pages = {"/version": (200, '{"version": "0.32.0"}'), "/v1/models": (200, json.dumps(model))}
    server = connect(serving(pages | {"/metrics": (200, METRICS)}))
    assert isinstance(server, VLLM) and (server.model, server.steps, server.topk) == ("/models/m", 2, 1)
    assert server.counters() == Drafts(10, 4, [3, 1])
    assert connect(serving(pages | {"/metrics": (200, "vllm:prompt_tokens_total 4\n")})).steps is None


def test_bench_on_the_command_line(serving, cli, small_target, chat_file):
    info = json.dumps(INFO | {"model_path": str(small_target)})
    full = chunk([5, 6, 7], spec_verify_ct=1, spec_num_correct_drafts=1, spec_correct_drafts_histogram=[0, 1])
    url = serving({"/server_info": (200, info), "/generate": (200, full)})
    done = cli("bench", "--server", url, "--prompts", chat_file, "--limit", "3", "--concurrency", "1,2")
    assert done.returncode == 0, done.stderr
    assert "sglang 0.5.21" in done.stdout and "3 prompts, greedy" in done.stdout and "2.000" in done.stdout

    dying = serving({"/server_info": (200, info), "/generate": (200, chunk([5])), "cut": ("/generate",)})
    done = cli("bench", "--server", dying, "--prompts", chat_file)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"the server at {dying} died or hangs" in done.stderr.splitlines()[-1]

    with pytest.raises(UserError, match="drafts too; start it without"):
        bench(url, str(chat_file), BenchOptions(limit=1), url)
    elsewhere = serving({"/server_info": (200, json.dumps(INFO | {"model_path": "/not/here"}))})
    with pytest.raises(UserError, match="name one that is here with --target"):
        bench(elsewhere, str(chat_file), BenchOptions(limit=1))


def test_screen_says_when_answers_differ():
    row = {"concurrency": 1, "acceptance_length": 1.5, "acceptance": [0.5], "tokens_per_second": 10.0, "speedup": 1.25}
    row |= {"time_to_first_token": 0.1, "identical": False}
    result = {"engine": "vllm", "version": "0.32.0", "server": "u", "steps": 1, "topk": 1, "draft_tokens": 1}
    result |= {"prompts": 2, "max_new_tokens": 8, "temperature": 0, "concurrency": [row]}
    assert "1.25x" in screen(result) and "NOT those of the baseline" in screen(result)
