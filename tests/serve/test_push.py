"""The card holds what was measured; the hub gets the head through huggingface_hub's own client."""

import base64
import json
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import reset_sessions
from safetensors.torch import load_file, save_file

from eagle3_xla import checkpoint, cli
from eagle3_xla.checks import escaped
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.doctor.files import read_target
from eagle3_xla.doctor.run import first_failure
from eagle3_xla.draft.saved import LAYER_IDS, QK_NORM_ARCHITECTURE, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.page import write_page
from eagle3_xla.evaluate.results import read_results
from eagle3_xla.export import export
from eagle3_xla.outputs import write_run_file
from eagle3_xla.plan.report import verdict_screen
from eagle3_xla.serve.card import Licences, card
from eagle3_xla.serve.push import PushOptions, push
from eagle3_xla.serve.run_facts import RunFacts, run_facts
from eagle3_xla.train.loop import train
from eagle3_xla.xla.processor import processor

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
    "top_p": 1.0,
    "draft_window": None,
}
BENCH = {"engine": "sglang", "version": "0.5.21", "acceptance_length": 2.3, "acceptance": [0.7, 0.4], "speedup": 1.9}
BENCH |= {"tokens_per_second": 99.0, "prompts": 80, "draft_tokens": 8, "topk": 4, "temperature": 0.7}
BENCH |= {"max_new_tokens": 128, "concurrency": [{"concurrency": 1}, {"concurrency": 4}]}


VERDICT = Path(__file__).parents[2] / "benchmarks/plans/qwen2.5-1.5b-v5e-8.json"


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload makes; `received` holds the files of commits, `asked` the paths of the calls."""

    received: dict = {}
    asked: list = []
    refuses = exists = private = refuses_card = broken_storage = False

    def do_POST(self):
        self.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.headers.get("Authorization"):
            return self.answer({"error": "who are you"}, 401)
        if self.refuses or self.headers["Authorization"] != "Bearer hf_test":
            return self.answer({"error": "you may not write here"}, 403)
        if self.path == "/api/validate-yaml" and self.refuses_card:
            return self.answer({"errors": [{"message": '"license" must be one of [apache-2.0, mit]'}]}, 400)
        if self.path == "/api/repos/create":
            made = {"url": f"http://{self.headers['Host']}/me/head", "name": "me/head"}
            said = {"error": "You already created this model repo"}
            return self.answer(said | made, 409) if self.exists else self.answer(made)
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = "lfs" if self.broken_storage else "regular"
            return self.answer({"files": [{**f, "uploadMode": mode, "shouldIgnore": False} for f in files]})
        if self.path.endswith("/info/lfs/objects/batch"):  # nothing answers the PUT to that place
            place = {"upload": {"href": f"http://{self.headers['Host']}/storage"}}
            return self.answer({"objects": [part | {"actions": place} for part in json.loads(body)["objects"]]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.received[line["value"]["path"]]
            commit = {"commitUrl": f"http://{self.headers['Host']}/me/head/commit/1", "commitOid": "1"}
            return self.answer(commit | {"success": True})
        return self.answer({})

    def do_HEAD(self):
        self.answer(self.received[self.path.partition("/resolve/main/")[2]])

    def do_GET(self):
        if "/resolve/" in self.path:
            return self.do_HEAD()
        files = [{"type": "file", "oid": "0", "size": 1, "path": path} for path in self.received]
        about = {"sha": "0", "siblings": [], "id": "me/head", "private": self.private}
        self.answer(files if "/tree/" in self.path else about)

    def answer(self, content, status=200):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), ("ETag", '"0"'), ("X-Repo-Commit", "0" * 40)):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.received, Hub.asked, Hub.refuses, Hub.exists, Hub.private = {}, [], False, False, False
    Hub.refuses_card = Hub.broken_storage = False
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
    files = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", files)
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
        "training, plan and limits (--run DIR)",
        "the page of `eval --report` (--report FILE)",
        "licence of the head (--license ID)",
        "licence of the target (--target-license ID, or its README.md)",
        "licence of the data (--data-license ID)",
        "the target's hub id (--base-model OWNER/NAME)",
        ".eval_results/acceptance_length.yaml (--benchmark PROMPTS=OWNER/NAME:TASK)",
    ]

    assert cli.main([argument for argument in arguments if argument != "--json"] + ["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "\n          the page of `eval --report` (--report FILE)\n" in shown and "None" not in shown

    Hub.refuses = True
    assert "the upload to me/head failed, start it again to finish" in refused()
    Hub.refuses, Hub.broken_storage = False, True
    assert "the upload to me/head failed, start it again to finish: Error while uploading" in refused()
    Hub.broken_storage, Hub.refuses_card, Hub.asked = False, True, []
    assert cli.main([*arguments, "--license", "Apache-2.0"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        'the hub refuses the card: Invalid metadata in README.md. - "license" must be one of [apache-2.0, mit]'
    )
    assert Hub.asked == ["/api/validate-yaml"] and Hub.received == {}
    Hub.refuses_card, Hub.exists = False, True
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
    assert {result.dataset_name: result.metric_value for result in card.data.eval_results} == {
        "own decoding, 80 prompts of chats.jsonl, greedy, chain of 5 drafts": 2.345,
        "sglang 0.5.21, 80 prompts of chats.jsonl, temperature 0.7, tree of 8 drafts": 2.3,
    }
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


@pytest.mark.parametrize("shards", [["head.safetensors"], ["head-[1].safetensors", "head-[2].safetensors"]])
def test_weights_of_any_name_arrive(shards, pushed, online, small_target):
    head, evaluated, _ = pushed
    tensors = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    for i, name in enumerate(shards):
        part = [*tensors][i :: len(shards)]
        save_file({name: tensors[name] for name in part}, head / name)
    if len(shards) > 1:
        (head / "model.safetensors.index.json").write_text("{}")
    earlier = {"model.safetensors", "old.safetensors", "report.html", ".eval_results/acceptance_length.yaml"}
    own = {"notes.md", "other/model.safetensors"}
    push(head, str(small_target), "me/head", PushOptions([str(evaluated)]))
    Hub.received |= dict.fromkeys(earlier | own, b"")  # an earlier head's, and someone's own
    push(head, str(small_target), "me/head", PushOptions([str(evaluated)]))
    assert not earlier & Hub.received.keys() and own < Hub.received.keys()
    for file in [*head.glob("*.safetensors"), *head.glob("*.json")]:
        assert Hub.received[file.name] == file.read_bytes()
    assert {*shards, "config.json"} < Hub.received.keys()


@pytest.mark.parametrize(
    "content, how",
    [
        (EVAL, "own decoding, 80 prompts of chats.jsonl, greedy, chain of 5 drafts"),
        (
            EVAL | {"batch_size": 16, "temperature": 0.7, "top_p": 0.9, "draft_window": 64},
            "own decoding, 80 prompts of chats.jsonl, 16 at once, temperature 0.7, top_p 0.9, chain of 5 drafts, draft "
            "window 64",
        ),
        (
            BENCH | {"concurrency": [{"concurrency": 4}, {"concurrency": 1}], "top_p": 0.9},
            "sglang 0.5.21, 80 prompts of chats.jsonl, 4 at once, temperature 0.7, top_p 0.9, tree of 8 drafts",
        ),
    ],
)
def test_the_conditions_of_a_figure(content, how, tmp_path):
    about = {"head": "h", "target": "t", "prompts": {"name": "chats.jsonl"}, "version": "1", "date": "d"}
    (tmp_path / "r.json").write_text(json.dumps(content | {"measured": about}))
    assert [figures.how for figures in read_results(tmp_path / "r.json")] == [how]


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
    assert "--run gs://b/run: a folder of this machine is" in refused("--results", evaluated, "--run", "gs://b/run")
    assert "No such file" in refused("--results", evaluated, "--report", "nowhere.html")
    (head.parent / "half.json").write_text('{"tau": 1.5}')
    assert "half.json: measured is missing" in refused("--results", head.parent / "half.json")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    assert "fails a rule of `doctor`, so it is not uploaded, max_position" in refused("--results", evaluated)
    assert not (head / "README.md").exists() and Hub.received == {}


def test_a_repository_of_something_else_is_kept(pushed, online, small_target, capsys):
    head, evaluated, _ = pushed
    arguments = ["push", head, "--target", small_target, "--results", evaluated, "--repo", "me/head"]

    def refused(*more) -> str:
        assert cli.main([*map(str, arguments), *more]) == 2
        return capsys.readouterr().err

    assert "--repo head: OWNER/NAME is expected" in refused("--repo", "head") and Hub.asked == []
    assert "--repo me/head is the target; name a repository for the head" in refused("--base-model", "Me/head")
    assert "--private: me/head is there already, and public" in refused("--private")
    Hub.exists, model = True, {"model-00001-of-00002.safetensors": b"x", "config.json": b"{}"}
    for readme, reason in (
        ({"README.md": b"mine"}, "the README.md of me/head was not written by `push`, or was edited since; name"),
        ({}, "me/head holds model-00001-of-00002.safetensors and no README.md of `push`, so it is not ours; name"),
    ):
        Hub.received = model | readme
        assert reason in refused() and Hub.received == model | readme
    assert cli.main([*map(str, arguments), "--overwrite", "--quiet"]) == 0 and not model.items() & Hub.received.items()
    Hub.private, card = True, Hub.received["README.md"]
    assert cli.main([*map(str, arguments), "--private"]) == 0  # our own once more
    Hub.received["README.md"] = edited = card + b"mine"
    capsys.readouterr()
    assert "or was edited since" in refused() and Hub.received["README.md"] == edited


QUERY_NORMS = {f"midlayer.self_attn.{name}_norm.weight": torch.ones(8) for name in "qk"}
WHOLE = {"d2t": torch.zeros(4096, dtype=torch.int64), "t2d": torch.ones(4096, dtype=torch.bool)}
WHOLE |= {"lm_head.weight": torch.ones(4096, 64)}
LAYERS = {LAYER_IDS: [1, 4, 5], "eagle_config": {LAYER_IDS: [0, 3, 4]}}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention"]}
QWEN3 = {"architectures": [QK_NORM_ARCHITECTURE], "model_type": "qwen3"}


@pytest.mark.parametrize(
    "config, tensors, engines",
    [
        ({}, {}, "SGLang sglang-jax vLLM Python"),
        (WINDOW, {}, "SGLang vLLM Python"),
        (LAYERS, {}, "SGLang vLLM Python"),
        ({"fc_norm": True}, {f"fc_norm.{i}.weight": torch.ones(64) for i in range(3)}, "SGLang vLLM Python"),
        (QWEN3 | WINDOW, QUERY_NORMS, "vLLM"),
        ({"draft_vocab_size": 4096}, WHOLE, "SGLang sglang-jax Python"),
    ],
)
def test_commands_for_the_engines_that_serve_it(config, tensors, engines, exported_head, small_target, tmp_path):
    own = load_file(exported_head / "model.safetensors")
    save_file(own | tensors, tmp_path / "model.safetensors")  # without the record of its training
    (tmp_path / "config.json").write_text(json.dumps(json.loads((exported_head / "config.json").read_text()) | config))
    assert first_failure(tmp_path, str(small_target)) is None
    head = read_head(tmp_path)

    def content() -> str:
        return card(
            head, read_target(str(small_target)), None, "me/head", [], RunFacts("", [], []), Licences("", "", ())
        )

    written = content()
    assert re.findall(r"^(\S+?),?(?: .*)?:\n\n```", written, re.MULTILINE) == engines.split()
    starts = len(re.findall("launch_server|sglang.Engine", written))  # SGLang: one dtype for the target and the head
    assert len(re.findall('dtype[ =]"?bfloat16', written)) == starts
    sizes = re.findall(r"window.size[ =](\d+)", written)
    assert sizes == (["15", "15"] if config == WINDOW else [])
    topks = re.findall(r"sglang.(?:launch_server|Engine)(?s:.*?)eagle.topk[ =](\d)", written)
    assert topks == ["1" if config == WINDOW else "4"] * (2 * ("SGLang" in engines.split()))
    assert written.count('speculative_draft_attention_backend="fa3",\n    )') == (config == WINDOW)
    assert "The embedding is the target's and is not in the file.\n\n## Limitations" in written
    head.tensors["embed_tokens.weight"] = torch.ones(512, 64)
    with_embedding = content()
    assert "not in the file" not in with_embedding
    assert re.findall(r"parameters.*", with_embedding) == re.findall(r"parameters.*", written)


@pytest.mark.parametrize(
    "kind, tied, engines",
    [
        ("qwen2", True, "SGLang sglang-jax vLLM Python"),
        ("llama", False, "SGLang sglang-jax vLLM Python"),
        ("llama", True, "SGLang vLLM Python"),
        ("gemma3_text", True, "SGLang Python"),
        ("gpt_oss", True, "SGLang vLLM Python"),
        ("olmo2", False, "vLLM"),
        ("gemma2", True, ""),
    ],
)
def test_commands_for_the_engines_that_serve_its_target(kind, tied, engines, exported_head, small_target):
    target = read_target(str(small_target))
    target.config.model_type, target.config.tie_word_embeddings = kind, tied
    nothing = RunFacts("", [], []), Licences("", "", ())
    written = card(read_head(exported_head), target, None, "me/head", [], *nothing)
    assert re.findall(r"^(\S+?),?(?: .*)?:\n\n```", written, re.MULTILINE) == engines.split()
    assert ("No released engine" in written) == (not engines)
    assert ("patch apply" in written) == (kind == "qwen2")
    assert written.count("speculative_eagle_topk=1,") == (kind in ("gemma3_text", "gpt_oss"))
    assert ("--attention-backend triton\n```" in written) == (kind == "gemma3_text")
    assert ('attention_backend="triton",' in written) == (kind == "gemma3_text")


def test_commands_for_a_longrope_target(exported_head, small_target):
    """Its head has no positions beyond the target's first context."""
    target = read_target(str(small_target))
    target.config.model_type, target.config.rope_scaling = "phi3", {"type": "longrope"}
    target.config.original_max_position_embeddings = 256
    nothing = RunFacts("", [], []), Licences("", "", ())
    written = card(read_head(exported_head), target, None, "me/head", [], *nothing)
    options = re.findall(r"(?:--)?(?:context|max).(?:length|model-len)[ =]\d+", written)
    assert options == ["--context-length 256", "--max-model-len 256", "context_length=256"]


def test_a_card_of_the_run(small_run, small_target, chat_file, tmp_path, exported_head):
    recipe = load_recipe(None, small_run)
    prepare(recipe)
    train(recipe)
    chosen = export(tmp_path / "run", tmp_path / "head")
    about = measured("eval", str(tmp_path / "head"), str(small_target), str(chat_file))
    (tmp_path / "eval.json").write_text(json.dumps(EVAL | {"measured": about}))
    target = tmp_path / "target"
    shutil.copytree(small_target, target)
    (target / "README.md").write_text("---\nlicense: mit\n---\n")
    options = PushOptions(
        [str(tmp_path / "eval.json")],
        str(tmp_path / "run"),
        "org/model",
        "apache-2.0",
        data_license=["cc-by-4.0", "odc-by"],
        dry_run=True,
    )
    plan = tmp_path / "plan.json"
    verdict = json.loads(VERDICT.read_text())
    verdict_screen(verdict)  # it is one
    plan.write_text(json.dumps(verdict | {"mesh": {"dp": 1, "tp": 1, "draft_data_parallel": False}}))
    without = [
        "the page of `eval --report` (--report FILE)",
        ".eval_results/acceptance_length.yaml (--benchmark PROMPTS=OWNER/NAME:TASK)",
    ]
    of_another = "plan figures (plan.json is of another mesh or batch than the run)"
    assert push(tmp_path / "head", str(target), "me/head", options)["left_out"] == [of_another, *without]
    assert "Planned" not in (tmp_path / "head" / "README.md").read_text()
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"tokens_per_step": 2 * 64}))
    assert push(tmp_path / "head", str(target), "me/head", options)["left_out"] == without
    rows, step = json.loads((tmp_path / "data" / "manifest.json").read_text())["train"]["rows"], chosen["micro_step"]
    card = (tmp_path / "head" / "README.md").read_text()
    weights = tmp_path / "head" / "model.safetensors"
    for part in (
        "| framework | eagle3-xla, PyTorch on cpu |",
        f"| epochs | {step * 2 / rows:.1f} of at most 2 |",
        f"| micro-steps | {step}, 1 for each step of the optimizer |",
        "| lr | 0.0008, warm-up over 3% of the steps, cosine decay |",
        "| batch | 2 rows of 64 tokens |",
        f"| held-out expected tau | {chosen['tau']:.3f} |",
        f"| hardware | {escaped(processor())}, eager torch |",
        "| hours of training | 0.00",
        "| precision | float32 |",
        "| longest context trained on | 64 tokens |",
        "## Method",
        "| chats | 32 | 100.0% |",
        "## Planned for a TPU",
        "| slice | v5e-8, 8 chips |",
        "| memory per chip | 9.46 of 15.75 GiB |",
        "| modelled step | 352 ms |",
        "| modelled run | 0.49 hours, 3.9 chip-hours for 163,282,944 tokens |",
        "Trained on rows of 64 tokens: a longer context is new to it.",
        "Its domains are those of its data: chats.",
        "The head: apache-2.0. The target: mit. The training data: cc-by-4.0, odc-by.",
        f"| parameters | {sum(v.numel() for n, v in load_file(weights).items() if n not in ('d2t', 't2d')):,} |",
        "outputs of the target's layers [1, 3, 4], 0-based; indices [2, 4, 5] of `hidden_states`",
        "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test",
        "arXiv:2503.01840",
        "license: apache-2.0",
        "base_model: org/model",
        "--speculative-draft-model-path me/head",
    ):
        assert part in card, part
    assert str(tmp_path) not in card and str(small_target) not in card
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"hbm_limit_bytes": "many"}))
    with pytest.raises(UserError, match="plan.json: hbm_limit_bytes is 'many'; a number above 0 is expected"):
        push(tmp_path / "head", str(target), "me/head", options)
    plan.unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    manifest, settings = tmp_path / "data" / "manifest.json", tmp_path / "run" / "run.yaml"
    settings.write_text(settings.read_text().replace("row_length: 64", "row_length: 128"))  # the rows are as they were
    assert "Trained on rows of 64 tokens" in run_facts(tmp_path / "run", read_head(tmp_path / "head")).limits[0]
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": "of other data"}))
    left_out = push(tmp_path / "head", str(target), "me/head", options)["left_out"]
    assert "the data mix (data.prepared holds other data than the head was trained on)" in left_out
    card_without = (tmp_path / "head" / "README.md").read_text()
    assert "conversations | share" not in card_without and "Its domains" not in card_without
    assert "| epochs | at most 2 |" in card_without
    shutil.rmtree(tmp_path / "data")
    missing = push(tmp_path / "head", str(target), "me/head", options)["left_out"]
    assert missing == [
        "held-out expected tau",
        "hardware",
        "hours of training",
        "the data mix (manifest.json of data.prepared)",
        "plan figures (plan.json in the run or beside it, written by `plan --json`)",
        *without,
    ]
    with pytest.raises(UserError, match="none of its checkpoints holds the weights"):
        run_facts(tmp_path / "run", read_head(exported_head))


def test_a_damaged_checkpoint_of_the_run_is_passed_over(small_run, exported_head, tmp_path):
    run, head = tmp_path / "run", read_head(exported_head)
    exported_from = checkpoint.load(exported_head.parent / "checkpoints" / "step-00000001")
    for step in (1, 2):
        saved = checkpoint.save(run / "checkpoints", replace(exported_from, micro_step=step), keep=2)
    write_run_file(load_recipe(None, small_run), run, "train")
    (saved / "state.safetensors").write_bytes(b"")
    assert "| micro-steps | 1, " in run_facts(run, head).sections
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="none of its checkpoints holds the weights .*step-00000002 is damaged"):
        run_facts(run, head)


def test_scores_of_a_benchmark(pushed, online, small_target, capsys):
    """In the form that huggingface.co/docs/hub/eval-results gives, and only for a benchmark that the user names."""
    head, evaluated, benched = pushed
    arguments = [
        "push",
        head,
        "--target",
        small_target,
        "--repo",
        "me/head",
        "--results",
        evaluated,
        "--results",
        benched,
    ]
    arguments = [*map(str, arguments), "--json", "--benchmark"]
    for wrong, reason in (
        ("chats.jsonl", "PROMPTS=OWNER/NAME:TASK is expected"),
        ("chats.jsonl=org/set", "PROMPTS=OWNER/NAME:TASK is expected"),
        ("others.jsonl=org/set:task", r"the results are of other prompts (chats.jsonl)"),
    ):
        assert cli.main([*arguments, wrong]) == 2 and reason in capsys.readouterr().err
    assert not (head / ".eval_results").exists() and not (head / "README.md").exists()
    assert cli.main([*arguments, "chats.jsonl=org/set:acceptance"]) == 0
    capsys.readouterr()
    sent = yaml.safe_load(Hub.received[".eval_results/acceptance_length.yaml"])
    date = json.loads(evaluated.read_text())["measured"]["date"]
    assert sent[0] == {
        "dataset": {"id": "org/set", "task_id": "acceptance"},
        "value": 2.345,
        "date": date,
        "source": {"url": "https://huggingface.co/me/head", "name": "Model card"},
        "notes": "acceptance length, own decoding, 80 prompts of chats.jsonl, greedy, chain of 5 drafts",
    }
    assert [entry["value"] for entry in sent] == [2.345, 2.3]
    place = head / ".eval_results" / "acceptance_length.yaml"
    assert cli.main([*arguments, "chats.jsonl=org/other:acceptance"]) == 0 and "org/other" in place.read_text()
    place.write_text("- mine")
    assert cli.main([*arguments, "chats.jsonl=org/set:acceptance"]) == 2 and place.read_text() == "- mine"
    assert "acceptance_length.yaml was not written by `push`; move it, or give --overwrite" in capsys.readouterr().err
