"""The card holds what was measured; the hub gets the head through huggingface_hub's own client."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from eagle3_xla.evaluate.fingerprint import measured

EVAL = {"tau": 2.345, "acceptance": [0.7, 0.5], "tokens_per_second": 30.0, "baseline_tokens_per_second": 20.0}
EVAL |= {"prompts": 80, "draft_tokens": 5, "topk": 1, "temperature": 0.0, "max_new_tokens": 128}
EVAL |= {"acc_all_positions": [0.5, 0.4]}
BENCH = {"engine": "sglang", "version": "0.5.21", "acceptance_length": 2.3, "acceptance": [0.7, 0.4], "speedup": 1.9}
BENCH |= {"tokens_per_second": 99.0, "prompts": 80, "draft_tokens": 8, "topk": 4, "temperature": 0.7}
BENCH |= {"max_new_tokens": 128}


class Hub(BaseHTTPRequestHandler):
    """The four calls that an upload makes; `received` holds the files of commits."""

    received: dict = {}
    refuses = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuses or self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "you may not write here"}, 403)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"http://{self.headers['Host']}/me/head", "name": "me/head"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"http://{self.headers['Host']}/me/head/commit/1", "commitOid": "1"}
            return self.answer(commit | {"success": True})
        return self.answer({})

    def do_GET(self):
        self.answer({"sha": "0", "siblings": [], "id": "me/head"})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.received, Hub.refuses = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def pushed(exported_head, small_target, chat_file, tmp_path):
    """(a copy of the head, files of results)."""
    shutil.copytree(exported_head, tmp_path / "head")
    for name, content in (("eval", EVAL), ("bench", BENCH)):
        about = measured(name, str(tmp_path / "head"), str(small_target), str(chat_file))
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"measured": about}))
    return tmp_path / "head", tmp_path / "eval.json", tmp_path / "bench.json"


def test_the_head_and_its_card_arrive(pushed, hub, small_target, cli):
    head, evaluated, benched = pushed
    arguments = ["push", head, "--target", small_target, "--repo", "me/head", "--json"]
    environment = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    results = ["--results", evaluated, "--results", benched]

    planned = cli(*arguments, *results, "--dry-run", environment=environment)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["url"] is None and Hub.received == {}

    done = cli(*arguments, *results, environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub}/me/head"
    assert sorted(Hub.received) == ["README.md", "config.json", "model.safetensors"]
    assert Hub.received["model.safetensors"] == (head / "model.safetensors").read_bytes()
    card = ModelCard(Hub.received["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results] == [2.345, 2.3]
    assert (
        "| own decoding, 80 prompts of chats.jsonl, greedy, chain of 5 drafts | 2.35 | 70.0% 50.0% | 30.0 | 1.50x |"
        in card.text
    )
    assert "sglang 0.5.21, 80 prompts of chats.jsonl, temperature 0.7, tree of 8 drafts | 2.30" in card.text

    Hub.refuses = True
    refused = cli(*arguments, *results, environment=environment)
    assert refused.returncode == 1 and "the upload to me/head failed" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_is_not_uploaded(pushed, small_target, cli):
    head, evaluated, _ = pushed
    arguments = ["push", head, "--target", small_target, "--repo", "me/head"]
    without = cli(*arguments)
    assert without.returncode == 2 and "no results" in without.stderr

    (head.parent / "half.json").write_text('{"tau": 1.5}')
    half = cli(*arguments, "--results", head.parent / "half.json")
    assert half.returncode == 2 and "half.json: measured is missing" in half.stderr

    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    broken = cli(*arguments, "--results", evaluated)
    assert broken.returncode == 2 and "fails a rule of `doctor`" in broken.stderr
    assert not (head / "README.md").exists()
