"""Servers that are none, or fail: one clear line each. What the engines really answer is tested in tests/engines."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eagle3_xla import cli
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.draft.saved import load_head
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, load_pair, prompt_ids
from eagle3_xla.serve.bench import BenchOptions, _against, _drafts, bench, run_prompts, screen
from eagle3_xla.serve.client import VLLM, Answer, Request, connect
from eagle3_xla.serve.gap import _with_theta
from eagle3_xla.serve.replies import Drafts

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
                answer = answers.get(self.path, (404, "{}"))
                status, body = answer() if callable(answer) else answer
                body = body.encode(errors="surrogateescape")
                if self.path in slow:
                    time.sleep(1)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) + (20 if self.path in cut else 0)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        slow = answers.pop("slow", ())  # answers that take a second
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

    with pytest.raises(RunError, match="answered 500: out of memory"):
        failing(500, "out of\nmemory").generate([1], Request(8))
    with pytest.raises(RunError, match="died or hangs"):
        failing(200, chunk([5]), cut=("/generate",)).generate([1], Request(8))
    with pytest.raises(RunError, match="without a token"):
        failing(200, "").generate([1], Request(8))
    with pytest.raises(UserError, match="SGLang 0.5.21 at .* does not count accepted drafts"):
        failing(200, chunk([5, 6])).generate([1], Request(8))


def sent(*lines):
    return "".join(f"{line}\n\n" for line in lines)


@pytest.mark.parametrize(
    "body, part",
    [
        (sent("data: {not json"), "/generate: .* is not JSON"),
        (sent("data: [1]"), r"/generate: an event is \[1\]; a mapping"),
        (sent("<html>"), "/generate sends '<html>'; a line of server-sent events"),
        (sent('data: {"output_ids": [5]}'), "meta_info is null; a mapping"),
        (sent('data: {"meta_info": {"completion_tokens": 1}}'), "output_ids is null; a list"),
        (sent('data: {"output_ids": ["5"], "meta_info": {}}'), "output_ids is '5'; a whole number"),
        (sent('data: {"output_ids": [5], "meta_info": {}}'), "meta_info.completion_tokens is null"),
        (sent('data: {"error": {"message": "\\u001b[2J"}}'), r'/generate failed: \{"message": "\\u001b\[2J"\}'),
        ("data: \udcff\n", "sends what is not UTF-8"),
        (chunk([5, 6], spec_verify_ct=1, spec_num_correct_drafts="1"), "spec_num_correct_drafts is '1'"),
        (chunk([5, 6], spec_num_correct_drafts=1, spec_correct_drafts_histogram=7), "histogram is 7; a list"),
    ],
)
def test_a_stream_that_is_none(body, part, serving):
    server = connect(serving({"/server_info": (200, json.dumps(INFO)), "/generate": (200, body)}))
    with pytest.raises((UserError, RunError), match=part):
        server.generate([1, 2], Request(8))


def test_a_stream_with_all_that_the_format_allows(serving):
    text = json.dumps(
        {"text": "a\u2028b", "output_ids": [5], "meta_info": {"completion_tokens": 1}}, ensure_ascii=False
    )
    body = f": ping\r\n\r\nevent: message\r\nid: 1\r\ndata:{text}\r\n\r\ndata: [DONE]\r\n\r\nafter the end"
    server = connect(serving({"/server_info": (200, json.dumps(INFO)), "/generate": (200, body)}))
    assert server.generate([1], Request(8)).tokens == [5]


VLLM_MODEL = {"data": [{"id": "m", "root": "/models/m", "owned_by": "vllm"}]}


@pytest.mark.parametrize(
    "pages, part",
    [
        ({"/server_info": "null"}, "neither an SGLang nor a vLLM"),
        ({"/server_info": "7"}, "neither an SGLang nor a vLLM"),
        ({"/server_info": json.dumps(INFO | {"model_path": None})}, "server_info: model_path is null; a text"),
        (
            {"/server_info": json.dumps(INFO | {"speculative_num_draft_tokens": None})},
            "speculative_num_draft_tokens is null; a whole number from 2",
        ),
        ({"/version": '{"version": "1"}', "/v1/models": "null"}, "neither an SGLang nor a vLLM"),
        ({"/version": '{"version": "1"}', "/v1/models": '{"data": null}'}, "neither an SGLang nor a vLLM"),
        ({"/version": '{"version": 1}', "/v1/models": json.dumps(VLLM_MODEL)}, "version is 1; a text"),
    ],
)
def test_a_server_of_odd_answers(pages, part, serving):
    with pytest.raises(UserError, match=part):
        connect(serving({path: (200, body) for path, body in pages.items()}))


def test_a_url_with_a_password(serving):
    url = serving({"/server_info": (200, json.dumps(INFO))})
    assert connect(url.replace("//", "//user:secret@")).url == url
    for bad in ("http://user:secret@127.0.0.1:9", "http://user:secret@[::1"):
        with pytest.raises(UserError) as error:
            connect(bad)
        assert "secret" not in str(error.value)


def test_a_server_that_queues_is_not_dead(serving, monkeypatch):
    """More requests than a client's usual pool holds; and one that waits too long, while the server lives."""
    full = chunk([5, 6], spec_verify_ct=1, spec_num_correct_drafts=1, spec_correct_drafts_histogram=[0, 1])
    pages = {"/server_info": (200, json.dumps(INFO)), "/generate": (200, full), "/flush_cache": (200, "{}")}
    answers, drafts, _ = run_prompts(connect(serving(pages)), [[1]] * 150, Request(8), 150)
    assert len(answers) == 150 and drafts.calls == 150
    monkeypatch.setattr("eagle3_xla.serve.client.ANSWER_SECONDS", 0.3)
    slow = connect(serving(pages | {"/health": (200, ""), "slow": ("/generate",)}))
    with pytest.raises(RunError, match="lives, and gave no token within 0.3 s: .* lower --concurrency"):
        slow.generate([1], Request(8))


def test_a_vllm_that_others_use(serving, monkeypatch):
    counts = iter(range(7, 10**6))
    pages = {"/version": (200, '{"version": "0.32.0"}'), "/v1/models": (200, json.dumps(VLLM_MODEL))}
    monkeypatch.setattr("eagle3_xla.serve.client.SETTLE_SECONDS", 0.001)
    busy = connect(serving(pages | {"/metrics": lambda: (200, METRICS.replace(" 7.0", f" {next(counts)}.0"))}))
    with pytest.raises(RunError, match="never rest: others use it"):
        busy.counters()
    answers = [Answer([1, 2], 0.1)]
    before, after, less = Drafts(10, 4, [3, 1]), Drafts(40, 4, [3, 1]), Drafts(2, 1, [1, 0])
    with pytest.raises(RunError, match="30 target calls for 2 tokens: it serves others too"):
        _drafts(busy, answers, before, after)
    with pytest.raises(RunError, match="counters .* fell while it was measured"):
        _drafts(busy, answers, before, less)
    with pytest.raises(RunError, match="changed while it was measured"):
        _drafts(busy, answers, before, None)
    with pytest.raises(UserError, match="drafts is 'many'; a count"):
        connect(serving(pages | {"/metrics": (200, METRICS.replace(" 7.0", " many"))}))


def test_answers_of_no_tokens(serving):
    pages = {"/server_info": (200, json.dumps(INFO)), "/generate": (200, chunk([])), "/flush_cache": (200, "{}")}
    with pytest.raises(RunError, match="answers without a single token"):
        run_prompts(connect(serving(pages)), [[1]], Request(8), 1)


def test_counters_of_vllm(serving):
    model = {"data": [{"id": "m", "root": "/models/m", "owned_by": "vllm"}]}
    pages = {"/version": (200, '{"version": "0.32.0"}'), "/v1/models": (200, json.dumps(model))}
    server = connect(serving(pages | {"/metrics": (200, METRICS)}))
    assert isinstance(server, VLLM) and (server.model, server.steps, server.topk) == ("/models/m", 2, 1)
    assert server.counters() == Drafts(10, 4, [3, 1])
    assert connect(serving(pages | {"/metrics": (200, "vllm:prompt_tokens_total 4\n")})).steps is None


def test_bench_on_the_command_line(serving, exported_head, small_target, chat_file, tmp_path, capsys):
    info = json.dumps(INFO | {"model_path": str(small_target), "speculative_draft_model_path": str(exported_head)})
    full = chunk([5, 6, 7], spec_verify_ct=1, spec_num_correct_drafts=1, spec_correct_drafts_histogram=[0, 1])
    url = serving({"/server_info": (200, info), "/generate": (200, full)})
    arguments = ["bench", "--server", url, "--prompts", str(chat_file), "--limit", "3"]
    assert cli.main([*arguments, "--concurrency", "1,2"]) == 0
    said = capsys.readouterr().out
    assert "sglang 0.5.21" in said and "3 prompts, greedy" in said and "2.000" in said and "push" not in said
    assert cli.main([*arguments, "--temperature", "0.7"]) == 0 and "drafts greedily" not in capsys.readouterr().out
    on_cpu = serving({"/server_info": (200, info.replace("{", '{"device": "cpu", ', 1)), "/generate": (200, full)})
    assert cli.main([*arguments, "--temperature", "0.7", "--server", on_cpu]) == 0
    assert "above temperature 0 SGLang on a CPU checks drafts greedily too" in capsys.readouterr().out
    assert cli.main([*arguments, "--json", "--top-p", "0.9"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["top_p"] == 0.9 and result["draft_window"] is None
    about = result["measured"]
    mine = measured("eval", str(exported_head), str(small_target), str(chat_file))
    assert about == mine | {"verb": "bench"} and None not in about.values()

    other = shutil.copytree(exported_head, tmp_path / "other")
    assert cli.main([*arguments, "--draft", str(other)]) == 0  # the same head elsewhere
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert cli.main([*arguments, "--draft", str(other)]) == 2
    assert f"--draft {other}: the server at {url} serves another head ({exported_head})" in capsys.readouterr().err

    dying = serving({"/server_info": (200, info), "/generate": (200, chunk([5])), "cut": ("/generate",)})
    assert cli.main(["bench", "--server", dying, "--prompts", str(chat_file)]) == 1
    assert f"the server at {dying} died or hangs" in capsys.readouterr().err.splitlines()[-1]

    with pytest.raises(UserError, match="drafts too; start it without"):
        bench(url, str(chat_file), BenchOptions(limit=1), url)
    elsewhere = serving({"/server_info": (200, json.dumps(INFO | {"model_path": "/not/here"}))})
    with pytest.raises(UserError, match="name one that is here with --target"):
        bench(elsewhere, str(chat_file), BenchOptions(limit=1))


def test_screen_says_when_answers_differ():
    row = {"concurrency": 1, "acceptance_length": 1.5, "acceptance": [0.5], "tokens_per_second": 10.0, "speedup": None}
    row |= {"time_to_first_token": 0.1} | against([[1, 2], [3]], [[1, 2], [4]])
    result = {"engine": "vllm", "version": "0.32.0", "server": "u", "steps": 1, "topk": 1, "draft_tokens": 1}
    result |= {"prompts": 2, "max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "concurrency": [row]}
    result |= {"measured": {"head": None, "target": "t"}}
    assert row["identical"] is False and row["speedup"] is None
    assert "1 of 2 greedy answers are NOT those of the baseline server (tokens/s 1.25x" in screen(result)
    assert "`push` takes none of them; give --draft DIR" in screen(result)


def against(answers, plain, **request):
    answers, plain = ([Answer(tokens, 0.1) for tokens in side] for side in (answers, plain))
    return _against(answers, 10.0, plain, sum(len(a.tokens) for a in plain) / 8.0, Request(**request))


def test_a_speed_up_only_of_the_same_answers():
    assert against([[1, 2], [3]], [[1, 2], [3]]) | {"speedup": 1.25, "identical": True} == against(
        [[1], [2]], [[1], [2]]
    )
    assert against([[1], [2]], [[1], [3]], temperature=0.7)["speedup"] == 1.25  # sampled answers may differ
    assert against([[1], []], [[1], [3]])["no_speedup"].startswith("1 answers have no token (tokens/s 1.25x")


def test_a_head_with_another_theta_keeps_the_servers_window(exported_head):
    head, _ = load_head(exported_head)
    head.window = 8
    changed = _with_theta(head, 5.0)
    assert (changed.window, changed.config.rope_theta) == (8, 5.0)


def test_gap_names_a_head_that_doctor_fails(serving, exported_head, small_target, chat_file, tmp_path, capsys):
    """It decodes what `eval` refuses, for the cause is what it is asked for; a head that can't be decoded is named."""
    full = chunk([5, 6, 7], spec_verify_ct=2, spec_num_correct_drafts=1, spec_correct_drafts_histogram=[1, 1])
    pages = {"/server_info": (200, json.dumps(INFO)), "/generate": (200, full), "/flush_cache": (200, "{}")}
    head = shutil.copytree(exported_head, tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"norm_output": True}))
    arguments = ["gap", "--server", serving(pages), "--prompts", chat_file, "--target", small_target, "--draft", head]
    arguments = [*map(str, arguments), "--limit", "1", "--max-new-tokens", "4"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().out
    assert "served           1.500" in said and "norm_flags: norm_output True" in said and "d2t" in said
    assert "note:" not in said
    info = json.dumps(INFO | {"speculative_draft_model_path": str(exported_head), "device": "cpu"})
    assert cli.main([*arguments, "--server", serving(pages | {"/server_info": (200, info)})]) == 1
    causes, _, note = capsys.readouterr().out.partition("causes, likeliest first\n")[2].partition("note: ")
    assert causes.startswith(f"  - the server serves another head ({exported_head})\n")
    assert note.startswith("this gap is of greedy decoding; above temperature 0 SGLang on a CPU checks drafts greedily")
    at_a_url = ["file://" + word if word == str(head) else word for word in arguments]
    assert cli.main(at_a_url) == 1 and "served           1.500" in capsys.readouterr().out
    window = {"sliding_window": 16, "layer_types": ["sliding_attention"]}
    (head / "config.json").write_text(json.dumps(config | window))
    narrow = serving(pages | {"/server_info": (200, json.dumps(INFO | {"speculative_draft_window_size": 7}))})
    assert cli.main([*arguments, "--server", narrow]) == 1
    assert "lets the head see 8 positions, and 16 were trained: start it with --speculative-draft-window-size 15" in (
        capsys.readouterr().out
    )
    (head / "config.json").write_text(json.dumps(config | {"hidden_act": "snake"}))
    assert cli.main(arguments) == 2 and "hidden_act is 'snake'" in capsys.readouterr().err
    alone = serving(pages | {"/server_info": (200, json.dumps(INFO | {"speculative_algorithm": None}))})
    assert cli.main([*arguments, "--server", alone]) == 2 and "serves without a head" in capsys.readouterr().err


def test_gap_is_none_where_only_a_near_tie_differs(serving, exported_head, small_target, chat_file, capsys):
    """Another kernel chooses another of two tokens once; acceptance is that of `eval`."""
    options = EvalOptions(limit=2, max_new_tokens=6, draft_tokens=2, batch_size=1)
    tokenizer = load_tokenizer(str(small_target))
    ids = prompt_ids(tokenizer, str(chat_file), options, 10**6)
    pair, stop_ids = load_pair(str(small_target), str(exported_head), options), stop_token_ids(small_target, tokenizer)
    answers = []
    for generation in decode_all(pair, ids, stop_ids, options):
        reached = [generation.accepted.count(drafts) for drafts in range(3)]
        meta = {"spec_num_correct_drafts": sum(generation.accepted), "spec_correct_drafts_histogram": reached}
        answers.append((generation.tokens, {"spec_verify_ct": len(generation.accepted)} | meta))

    def gap(*more: str, **info: str) -> tuple[int, str]:
        chunks = (chunk(tokens, **meta) for tokens, meta in [answers[0], *answers])  # the first is the warm-up
        counts = ({"usage": {"prompt_tokens": len(prompt)}} for prompt in ids)
        about = INFO | {"speculative_draft_model_path": str(exported_head)} | info
        pages = {"/server_info": (200, json.dumps(about))}
        pages |= {"/generate": lambda: (200, next(chunks)), "/flush_cache": (200, "{}")}
        pages |= {"/v1/chat/completions": lambda: (200, json.dumps(next(counts)))}
        arguments = ["--prompts", chat_file, "--target", small_target, "--draft", exported_head, "--limit", 2]
        arguments += ["--server", serving(pages), "--max-new-tokens", 6, *more]
        return cli.main(["gap", *map(str, arguments)]), capsys.readouterr().out

    code, said = gap()
    assert code == 0 and "no gap" in said and "note:" not in said
    assert "note: this gap is of greedy decoding; above temperature 0" in gap(device="cpu")[1]
    answers[1] = ([*answers[1][0][:-1], answers[1][0][-1] ^ 1], answers[1][1])
    code, said = gap()
    assert code == 0 and "no gap" in said and "note: 1 of 2 greedy answers differ" in said
    code, said = gap("--json")
    result = json.loads(said)
    assert code == 0 and result["ok"] and not result["causes"] and result["identical"] is False
    answers[1][1].update(spec_num_correct_drafts=3, spec_correct_drafts_histogram=[2, 1, 1])  # another acceptance
    code, said = gap()
    assert code == 1 and "- 1 of 2 greedy answers differ" in said


def test_the_device_of_gap(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["gap", "--server", "u", "--prompts", "p", "--target", "t", "--draft", "d", "--device", "cuda"]
    assert cli.main(arguments) == 2 and "--device cuda: torch finds no GPU here" in capsys.readouterr().err
