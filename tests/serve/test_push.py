"""The card holds what was measured; the hub gets the head through huggingface_hub's own client."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import reset_sessions

from eagle3_xla import cli
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.draft.saved import read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.page import write_page
from eagle3_xla.export import export
from eagle3_xla.serve.push import PushOptions, push
from eagle3_xla.serve.run_facts import run_facts
from eagle3_xla.train.loop import train

EVAL = {"tau": 2.345, "acceptance": [0.7, 0.5], "tokens_per_second": 30.0, "baseline_tokens_per_second": 20.0}
EVAL |= {"prompts": 80, "draft_tokens": 5, "topk": 1, "temperature": 0.0, "max_new_tokens": 128}
EVAL |= {"acc_all_positions": [0.5, 0.4]}
PAGE = {
    "by_category": {},
    "by_source": {},
    "by_context": {},
    "acceptance_conditional": [0.7, 0.7],
    "tokens": 99,
    "identical": True,
    "batch_size": 1,
}
BENCH = {"engine": "sglang", "version": "0.5.21", "acceptance_length": 2.3, "acceptance": [0.7, 0.4], "speedup": 1.9}
BENCH |= {"tokens_per_second": 99.0, "prompts": 80, "draft_tokens": 8, "topk": 4, "temperature": 0.7}
BENCH |= {"max_new_tokens": 128}


class Hub(BaseHTTPRequestHandler):
    """The four calls that an upload makes; `received` holds the files of commits."""

    received: dict = {}
    refuses = exists = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.headers.get("Authorization"):
            return self.answer({"error": "who are you"}, 401)
        if self.refuses or self.headers["Authorization"] != "Bearer hf_test":
            return self.answer({"error": "you may not write here"}, 403)
        if self.path == "/api/repos/create":
            made = {"url": f"http://{self.headers['Host']}/me/head", "name": "me/head"}
            said = {"error": "You already created this model repo"}
            return self.answer(said | made, 409) if self.exists else self.answer(made)
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
    Hub.received, Hub.refuses, Hub.exists = {}, False, False
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


@pytest.fixture
def online(hub, monkeypatch):
    """This process's client of the hub, set to the stand-in; HF_TOKEN as a user sets it."""
    for name, value in (("ENDPOINT", hub), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    reset_sessions()  # one that an earlier test opened is offline for good
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return hub


def test_the_head_and_its_card_arrive(pushed, online, small_target, monkeypatch, capsys):
    head, evaluated, benched = pushed
    arguments = ["push", head, "--target", small_target, "--repo", "me/head", "--json"]
    arguments = [*map(str, arguments), "--results", str(evaluated), "--results", str(benched)]

    def refused() -> str:
        assert cli.main(arguments) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "hf_test" not in said
        return said

    assert cli.main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["url"] is None and Hub.received == {}
    assert planned["left_out"] == [
        "training (--run DIR)",
        "the page of `eval --report` (--report FILE)",
        "licence of the head (--license ID)",
        "the target's hub id (--base-model OWNER/NAME)",
    ]

    Hub.refuses = True
    assert "the upload to me/head failed, start it again to finish" in refused()
    Hub.refuses, Hub.exists = False, True
    page = head.parent / "page.html"
    figures = json.loads(evaluated.read_text()) | PAGE
    write_page(page, figures, [], None)
    (head / "report.html").write_text("<html>mine")
    assert cli.main([*arguments, "--report", str(page)]) == 2
    assert "report.html was not written by `eval --report`; move it, or give --overwrite" in capsys.readouterr().err
    assert (head / "report.html").read_text() == "<html>mine"
    (head / "report.html").unlink()
    assert cli.main([*arguments, "--report", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == f"{online}/me/head"
    assert sorted(Hub.received) == ["README.md", "config.json", "model.safetensors", "report.html"]
    assert Hub.received["report.html"] == page.read_bytes()
    assert Hub.received["model.safetensors"] == (head / "model.safetensors").read_bytes()
    card = ModelCard(Hub.received["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results] == [2.345, 2.3]
    assert "| own decoding, 80 prompts of chats.jsonl, greedy, chain of 5 drafts | 2.35 | 70.0% 50.0% " in card.text
    assert "| 30.0 | 1.50x |" in card.text and "chain of 5 drafts: 50.0% / 40.0%" in card.text
    assert "sglang 0.5.21, 80 prompts of chats.jsonl, temperature 0.7, tree of 8 drafts | 2.30" in card.text
    assert "layers [1, 3, 4], 0-based; indices [2, 4, 5]" in card.text and "| parameters | 65,792 |" in card.text
    assert "drafted answers: [report.html](report.html)." in card.text
    assert "arXiv preprint arXiv:2503.01840" in card.text and "TPU" not in card.text.replace("on a TPU", "")

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    assert "the hub asks who you are" in refused()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the upload to me/head failed, start it again to finish" in refused()


def test_what_is_not_uploaded(pushed, online, small_target, capsys):
    head, evaluated, _ = pushed

    def refused(*more) -> str:
        assert cli.main(["push", str(head), "--target", str(small_target), "--repo", "me/head", *map(str, more)]) == 2
        return capsys.readouterr().err

    assert "no results" in refused()
    assert "not the HTML file of `eval --report`" in refused("--results", evaluated, "--report", evaluated)
    other = head.parent / "other.html"
    figures = json.loads(evaluated.read_text()) | PAGE
    write_page(other, figures | {"measured": figures["measured"] | {"head": "0123"}}, [], None)
    assert "other.html: measured on another head" in refused("--results", evaluated, "--report", other)
    assert "No such file" in refused("--results", evaluated, "--report", "nowhere.html")
    (head.parent / "half.json").write_text('{"tau": 1.5}')
    assert "half.json: measured is missing" in refused("--results", head.parent / "half.json")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    assert "fails a rule of `doctor`, so it is not uploaded, max_position" in refused("--results", evaluated)
    assert not (head / "README.md").exists() and Hub.received == {}


def test_a_card_of_the_run(small_run, small_target, chat_file, tmp_path, exported_head):
    recipe = load_recipe(None, small_run)
    prepare(recipe)
    train(recipe)
    chosen = export(tmp_path / "run", tmp_path / "head")
    about = measured("eval", str(tmp_path / "head"), str(small_target), str(chat_file))
    (tmp_path / "eval.json").write_text(json.dumps(EVAL | {"measured": about}))
    options = PushOptions([str(tmp_path / "eval.json")], str(tmp_path / "run"), "org/model", "apache-2.0", dry_run=True)
    assert push(tmp_path / "head", str(small_target), "me/head", options)["left_out"] == [
        "the page of `eval --report` (--report FILE)"
    ]
    card = (tmp_path / "head" / "README.md").read_text()
    for part in (
        "| framework | eagle3-xla, PyTorch on cpu |",
        f"| micro-steps | {chosen['micro_step']} of at most 2 epochs |",
        "| batch | 2 rows of 64 tokens |",
        f"| held-out expected tau | {chosen['tau']:.3f} |",
        "| hardware | cpu, eager torch |",
        "| hours of training | 0.00",
        "| precision | float32 |",
        "| longest context trained on | 64 tokens |",
        "## Method",
        "| chats | 32 | 100.0% |",
        "license: apache-2.0",
        "base_model: org/model",
        "--speculative-draft-model-path me/head",
    ):
        assert part in card, part
    assert str(tmp_path) not in card and str(small_target) not in card
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "data")
    missing = push(tmp_path / "head", str(small_target), "me/head", options)["left_out"]
    assert missing == [
        "held-out expected tau",
        "hardware",
        "hours of training",
        "the data mix (manifest.json of data.prepared)",
        "the page of `eval --report` (--report FILE)",
    ]
    with pytest.raises(UserError, match="none of its checkpoints holds the weights"):
        run_facts(tmp_path / "run", read_head(exported_head))
