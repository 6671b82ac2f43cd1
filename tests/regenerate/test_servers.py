"""Every conversation once, whatever the server does and however often the process is killed."""

import json
import random
import re
import signal
from collections import Counter

import httpx
import pytest
from data.test_surprises import JSON_VALUES
from hypothesis import given, settings
from hypothesis import strategies as st
from regenerate.conftest import KILLED, lines_of, rows_of, write_questions

from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.files import read_rows
from eagle3_xla.data.prepare import prepare
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.outputs import only_writer
from eagle3_xla.regenerate import servers
from eagle3_xla.regenerate.conversation import NEUTRAL, Sampling
from eagle3_xla.regenerate.journal import Journal
from eagle3_xla.regenerate.run import Options, _fingerprint, regenerate


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_REST", 0.02)


def run(out, questions, urls, **options):
    options = {"concurrency": 8, "sampling": Sampling(max_tokens=16)} | options
    return regenerate(Recipe(), out, Options([server.url for server in urls], chats=[str(questions)], **options))


def check_every_row_once(out, count, exchanges=2):
    rows = rows_of(out)
    assert sorted(row["id"] for row in rows) == list(range(count))
    assert len({row["messages"][0]["content"] for row in rows}) == count
    for row in rows:  # asked turn by turn, after the target's own answers
        turns = [message["content"] for message in row["messages"]]
        for j in range(exchanges):
            assert turns[2 * j].endswith(f" {j}") and turns[2 * j + 1] == f"{2 * j + 1}: {turns[2 * j]}"
    return rows


def test_turn_by_turn_with_the_servers_own_answers(misbehaving, questions, tmp_path):
    server = misbehaving()
    sampling = Sampling(0.5, 0.9, 16, seed=3)
    result = run(tmp_path / "out", questions, [server], sampling=sampling)
    rows = check_every_row_once(tmp_path / "out", 40)
    assert result["finish"] == {"stop": 40} and result["new_tokens"] == 240 == sum(r["new_tokens"] for r in rows)
    assert "somebody else" not in json.dumps(server.bodies)
    assert {(b["model"], b["temperature"], b["top_p"], b["max_tokens"]) for b in server.bodies} == {("m", 0.5, 0.9, 16)}
    assert len({body["seed"] for body in server.bodies}) == 80
    recorded = json.loads((tmp_path / "out" / "regenerate.json").read_text())
    assert recorded["sampling"] == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 16, "seed": 3}
    assert recorded["model"] == "m" and not (tmp_path / "out" / ".work").exists()
    assert run(tmp_path / "out", questions, [server], sampling=sampling)["new_tokens"] == 240
    assert len(server.bodies) == 80  # nothing was asked again
    with pytest.raises(UserError, match="was begun with sampling .*'temperature': 0.5"):
        run(tmp_path / "out", questions, [server])


@pytest.mark.parametrize("engine", ["vllm", "sglang", "library", None])
def test_the_targets_own_distribution(engine, misbehaving, questions, tmp_path):
    """No penalty of its generation_config.json; a server that is neither engine may refuse such fields."""
    server = misbehaving()
    server.model["owned_by"] = engine
    run(tmp_path / "out", questions, [server], limit=2)
    sent = {"model", "messages", "seed", "max_tokens", "temperature", "top_p"}
    neutral = NEUTRAL if engine in ("vllm", "sglang") else {}
    for body in server.bodies:
        assert body.keys() == sent | neutral.keys() and neutral.items() <= body.items()


def test_the_mix_of_a_recipe(misbehaving, questions, tmp_path):
    """Without --chats: what `prepare` would take, its held-out share included; the recipe lies beside the output."""
    other = write_questions(tmp_path / "other.jsonl", 40, 1)
    settings = [f"data.train=[{{path: {questions}, share: 75, name: a}}, {{path: {other}, share: 25, name: b}}]"]
    recipe = load_recipe(None, [*settings, "data.conversations=16", "data.deduplicate=exact"])
    server = misbehaving()
    result = regenerate(recipe, tmp_path / "out", Options([server.url], sampling=Sampling(max_tokens=16)))
    rows = rows_of(tmp_path / "out")
    assert result["conversations"] == 16 and Counter(row["source"] for row in rows) == {"a": 12, "b": 4}
    assert "conversations: 16" in (tmp_path / "out" / "run.yaml").read_text()
    with pytest.raises(UserError, match=r"was begun with other chats \(or by an earlier version\); choose"):
        run(tmp_path / "out", questions, [server])
    assert "conversations: 16" in (tmp_path / "out" / "run.yaml").read_text()  # of what is there, still


@pytest.mark.parametrize("how, fingerprints", [("near", 2), ("exact", 1)])
def test_near_duplicates_depend_on_the_row_length(how, fingerprints, questions):
    train = [Source(path=str(questions))]
    chats = [DataConfig(train=train, deduplicate=how, row_length=length) for length in (2048, 4096)]
    assert len({_fingerprint(each) for each in chats}) == fingerprints


def test_the_same_chats_under_another_path_are_the_same(misbehaving, questions, tmp_path, monkeypatch):
    server = misbehaving()
    run(tmp_path / "out", questions, [server])
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "out", questions.name, [server])["finished"] == 40 and len(server.bodies) == 80


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "m"])
def test_gpt_oss_thoughts(name, misbehaving, questions, tmp_path):
    """Taken where a server sets them apart or shows gpt-oss's channels; refused where it runs them into the text."""
    apart = {"content": "Hello!", "reasoning_content": "We greet."}
    final = {"content": "finalHello!", "reasoning_content": "We greet."}  # as it wrote it: its thoughts came apart
    shown = "<|channel|>analysis<|message|>We greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
    flat = ["analysisWe greet.assistantfinalHello!", *["analysisWe gre", "finalHello!"] * (name != "m")]
    for number, message in enumerate([apart, final, {"content": shown}, *({"content": text} for text in flat)]):
        answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
        server = misbehaving(lambda messages, n, answer=answer: answer)
        server.model["id"], out = name, tmp_path / str(number)
        if message in [{"content": text} for text in flat] or "reasoning_content" in message and name == "m":
            asked = "under a model name with gpt-oss in it"
            with pytest.raises(RunError, match=f"start the server with(out)? a reasoning parser .*{asked}"):
                run(out, questions, [server], limit=1)
            assert not rows_of(out)
            continue
        run(out, questions, [server], limit=1)
        assert [m for m in rows_of(out)[0]["messages"] if m["role"] == "assistant"] == [
            {"role": "assistant", "content": "Hello!" if message is not final else "finalHello!"}
            | {"reasoning_content": "We greet."}
        ] * 2
        assert {key for body in server.bodies for m in body["messages"] for key in m} == {"role", "content"}


def test_faults_cost_no_row(misbehaving, questions, tmp_path):
    rng = random.Random(0)
    faults = [500, 503, 429, "hang", "close", "garbage", "abort"]
    first, second = (
        misbehaving(lambda messages, n: rng.choice(faults) if rng.random() < 0.3 else None) for _ in range(2)
    )
    run(tmp_path / "out", questions, [first, second], timeout=0.3)
    check_every_row_once(tmp_path / "out", 40)
    assert len(first.bodies) + len(second.bodies) > 90 and first.bodies and second.bodies


def test_a_question_that_always_fails_is_left_for_the_next_start(misbehaving, questions, tmp_path):
    broken = True
    server = misbehaving(lambda messages, n: 500 if broken and messages[0]["content"] == "question 7 0" else None)
    with pytest.raises(
        RunError, match=r"1 of 40 conversations got no answer .*questions.jsonl:8: .*500: out of memory"
    ):
        run(tmp_path / "out", questions, [server])
    assert len(rows_of(tmp_path / "out")) == 39
    broken = False
    run(tmp_path / "out", questions, [server])
    check_every_row_once(tmp_path / "out", 40)


def test_a_server_that_is_gone_and_comes_back(misbehaving, questions, tmp_path):
    gone = misbehaving(lambda messages, n: 502 if len(gone.bodies) > 30 else None)
    with pytest.raises(RunError, match="no server answers any more .*502.*start this again to continue"):
        run(tmp_path / "out", questions, [gone])
    some = len(rows_of(tmp_path / "out"))
    assert 0 < some < 40
    run(tmp_path / "out", questions, [misbehaving()])
    check_every_row_once(tmp_path / "out", 40)


@pytest.mark.parametrize("status", [400, 402, 405])
def test_a_server_that_refuses_everything_costs_no_row(status, misbehaving, questions, tmp_path):
    """From one question on: no conversation is dropped or cut short for it."""
    server = misbehaving(lambda messages, n: status if len(server.bodies) > 20 else None)
    with pytest.raises(RunError, match=f"answered {status}: out of memory"):
        run(tmp_path / "out", questions, [server])
    assert not (tmp_path / "out" / "dropped.jsonl").read_text()
    run(tmp_path / "out", questions, [misbehaving()])
    check_every_row_once(tmp_path / "out", 40)


def test_a_refusal_counts_once_its_server_answers_another_question(misbehaving, questions, tmp_path):
    """Not while it answers neither."""

    def fault(messages, n):
        if messages[-1]["content"] == "question 3 1":  # answered last, and then asked again
            return 503 if n in (1, 2) else None
        return 400 if messages[-1]["content"] == "question 4 0" else None

    server = misbehaving(fault)
    assert run(tmp_path / "out", questions, [server], concurrency=1)["dropped"] == {"no_answer": 1}
    assert [n for asked, n in server.asked.items() if json.loads(asked)[-1]["content"] == "question 3 1"] == [4]


def test_cut_answers_are_marked_and_droppable(misbehaving, questions, tmp_path, small_target):
    server = misbehaving(lambda messages, n: "length" if messages[0]["content"].split()[1] in ("3", "5") else None)
    result = run(tmp_path / "out", questions, [server])
    assert result["finish"] == {"stop": 38, "length": 2}
    cut = [row for row in rows_of(tmp_path / "out") if row["finish"] == "length"]
    assert sorted(len(row["messages"]) for row in cut) == [2, 2]  # not asked on after half an answer
    settings = [f"target.path={small_target}", f"data.train=[{tmp_path / 'out' / 'chats.jsonl'}]"]
    settings += ["data.row_length=64", "data.draft_vocab_size=64", "data.deduplicate=none", "data.heldout_share=0"]
    for choice, chats in (("keep", 40), ("drop", 38)):
        folder = tmp_path / choice
        more = [f"data.prepared={folder}", f"data.truncated_answers={choice}"]
        assert prepare(load_recipe(None, settings + more))["train"]["chats"] == chats


def test_refused_questions_are_counted_and_wrong_servers_end_it(misbehaving, questions, tmp_path):
    def refuses(messages, n):
        return 400 if messages[-1]["content"] in ("question 4 0", "question 6 1") else None

    result = run(tmp_path / "out", questions, [misbehaving(refuses)])
    assert result["dropped"] == {"no_answer": 1} and result["finish"] == {"stop": 39}
    lengths = {row["messages"][0]["content"]: len(row["messages"]) for row in rows_of(tmp_path / "out")}
    assert lengths["question 6 0"] == 2 and "question 4 0" not in lengths  # what was answered before is kept
    dropped = json.loads((tmp_path / "out" / "dropped.jsonl").read_text())
    assert dropped["id"] == 4 and dropped["where"].endswith("questions.jsonl:5") and "400" in dropped["message"]
    with pytest.raises(RunError, match="answered 401"):
        run(tmp_path / "a", questions, [misbehaving(lambda messages, n: 401)])
    with pytest.raises(RunError, match="answered 400"):  # each one: it is not the questions
        run(tmp_path / "b", questions, [misbehaving(lambda messages, n: 400)])
    with pytest.raises(UserError, match=r"no OpenAI-compatible server at http://127.0.0.1:9 \(.*"):
        regenerate(Recipe(), tmp_path / "c", Options(["http://127.0.0.1:9"], chats=[str(questions)]))
    for options in (Options(chats=["x"]), Options(["http://a"], target="b")):
        with pytest.raises(UserError, match="either --server"):
            regenerate(Recipe(), tmp_path / "d", options)


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://[::1"])
def test_what_is_no_url(url):
    with pytest.raises(UserError, match=f"--server '{re.escape(url)}' is not a URL "):
        servers.Servers([url], Sampling(), 1, 1)


def test_killed_twice_every_row_once(misbehaving, forks, tmp_path):
    questions, out = write_questions(tmp_path / "questions.jsonl", 200, 1), tmp_path / "out"
    slow = misbehaving(lambda messages, n: slow.ended.wait(0.05) or None)
    arguments = ["regenerate", "--server", slow.url, "--chats", questions, "--out", out]
    arguments += ["--concurrency", 4, "--max-tokens", 16]
    for goal in (20, 60):
        done = forks.run_code(KILLED, out / "chats.jsonl", goal, *arguments)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert goal <= lines_of(out) < 200
        with (out / "chats.jsonl").open("a") as file:  # as if it had died within a line
            file.write('{"id": 199, "source": "que')
    run(out, questions, [slow], sampling=Sampling(max_tokens=16))
    check_every_row_once(out, 200, 1)


def test_two_processes_and_foreign_files(tmp_path):
    options = Options(servers=["http://127.0.0.1:1"], chats=[str(write_questions(tmp_path / "questions.jsonl", 1, 1))])
    with only_writer(tmp_path / "out", "regenerate"), pytest.raises(UserError, match="another `regenerate` writes to"):
        regenerate(Recipe(), tmp_path / "out", options)
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "chats.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"chats.jsonl:1: not a line of `regenerate`"):
        Journal(tmp_path)
    assert list(read_rows(tmp_path / "chats.jsonl"))  # left as it was


def reply(content, finish="stop", usage=None, **more) -> dict:
    message = {"role": "assistant", "content": content} | more
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


@pytest.mark.parametrize(
    "answer, said",
    [
        (reply([{"type": "text", "text": "in"}, {"type": "text", "text": " parts"}]), "in parts"),
        (reply("no usage"), "no usage"),
        (reply("odd usage", usage=[1]), "odd usage"),
        (reply("odd count", usage={"completion_tokens": "many"}), "odd count"),
        (reply("negative", usage={"completion_tokens": -3}), "negative"),
    ],
)
def test_unusual_answers_are_answers(answer, said, misbehaving, tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", 1, 1)
    result = run(tmp_path / "out", questions, [misbehaving(lambda messages, n: answer)])
    assert result["finish"] == {"stop": 1} and result["new_tokens"] == 0
    assert rows_of(tmp_path / "out")[0]["messages"][-1]["content"] == said


@pytest.mark.parametrize(
    "answer, message",
    [
        (reply(None, "tool_calls", tool_calls=[{"id": "1"}]), "but with 'tool_calls' instead of a text"),
        (reply("", "content_filter"), "but with 'content_filter'"),
        (reply("half \ud83d"), "half characters"),
        (reply("NUL \0"), "NUL or half characters"),
        (reply([{"type": "image_url"}]), "is list, not a string"),
        (reply(7), "is int, not a string"),
        (reply(None), "with an empty answer"),
        (reply(" \n"), "with an empty answer"),
    ],
)
def test_answers_that_are_none_are_left_out(answer, message, misbehaving, tmp_path):
    """The conversation ends before the question, or is dropped with the reason."""
    questions = write_questions(tmp_path / "questions.jsonl", 3)

    def fault(messages, n):
        return answer if messages[-1]["content"] in ("question 1 0", "question 2 1") else None

    result = run(tmp_path / "out", questions, [misbehaving(fault)])
    assert result["dropped"] == {"no_answer": 1} and result["finish"] == {"stop": 2}
    assert message in json.loads((tmp_path / "out" / "dropped.jsonl").read_text())["message"]
    assert {row["id"]: len(row["messages"]) for row in rows_of(tmp_path / "out")} == {0: 4, 2: 2}


def test_whose_fault_an_answer_is_that_is_none(misbehaving, tmp_path, monkeypatch):
    """The question's, or that of the server, which answers none: then the run ends."""
    questions, answer, message = write_questions(tmp_path / "questions.jsonl", 3), reply(None), "with an empty answer"
    # One that has no words for "Hi" answered others, so the fault is in this question.
    odd = [[{"role": "user", "content": "question 1 0"}], servers.PROBE]
    speechless = misbehaving(lambda messages, n: answer if messages in odd else None)
    result = run(tmp_path / "speechless", questions, [speechless], concurrency=1)
    assert result["dropped"] == {"no_answer": 1} and result["finish"] == {"stop": 2}
    with pytest.raises(RunError, match=f"{message}.*; it refuses 'Hi' too"):
        run(tmp_path / "all", questions, [misbehaving(lambda messages, n: answer)])
    monkeypatch.setattr(servers, "REFUSALS", 3)
    each = misbehaving(lambda messages, n: answer if messages != servers.PROBE else None)
    with pytest.raises(RunError, match=message):
        run(tmp_path / "each", questions, [each])


@pytest.mark.parametrize(
    "answer", [[], {"choices": {}}, {"choices": [[]]}, {"choices": [{"message": 5}]}, reply("a", [])]
)
def test_no_answer_at_all_is_a_failure(answer, misbehaving, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "TRIES", 2)
    questions = write_questions(tmp_path / "questions.jsonl", 1, 1)
    with pytest.raises(RunError, match="no server answers any more .*, but "):
        run(tmp_path / "out", questions, [misbehaving(lambda messages, n: answer)])


def test_questions_that_always_fail_never_block_the_others(misbehaving, tmp_path):
    """Three of them, one after the other at concurrency 1: set aside, named, asked again at the next start."""
    questions, failing = write_questions(tmp_path / "questions.jsonl", 6, 1), ("1", "2", "3")

    def fault(messages, n):
        return 500 if messages[0]["content"].split()[1:2] and messages[0]["content"].split()[1] in failing else None

    server = misbehaving(fault)
    for _ in range(2):
        named = r"3 of 6 .*questions.jsonl:2: .*500: out of memory; also .*questions.jsonl:3, .*questions.jsonl:4\)"
        with pytest.raises(RunError, match=named):
            run(tmp_path / "out", questions, [server], concurrency=1)
        assert {row["id"] for row in rows_of(tmp_path / "out")} == {0, 4, 5}
    failing = ()
    assert run(tmp_path / "out", questions, [server], concurrency=1)["finished"] == 6


def test_a_key_is_sent_only_when_it_is_named(misbehaving, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = misbehaving()
    run(tmp_path / "out", questions, [server])
    assert server.keys == {None}
    run(tmp_path / "out", questions, [server], api_key_env="OPENAI_API_KEY")
    assert server.keys == {None, "Bearer secret"}
    for value in ("", "two\nlines", "caf\xe9"):
        monkeypatch.setenv("OTHER", value)
        with pytest.raises(UserError, match="--api-key-env OTHER: this environment variable holds no key"):
            run(tmp_path / "out", questions, [server], api_key_env="OTHER")


def test_questions_without_a_usable_answer_are_asked(misbehaving, tmp_path):
    question = {"role": "user", "content": "a?"}
    asked = [
        ({"prompt": "a?"}, ["a?"]),
        ({"prompt": [{"role": "system", "content": "s"}, question]}, ["s", "a?"]),
        ({"prompt": ["a?", "b?"]}, ["a?", "b?"]),
        ({"turns": ["a?", "b?"]}, ["a?", "b?"]),
        ({"turns": ["a?", "b?"], "prompt": "a?"}, ["a?", "b?"]),
        ({"question": "a?"}, ["a?"]),
        ({"problem": "a?"}, ["a?"]),
        ({"instruction": "a", "input": "b"}, ["a\n\nb"]),
        ({"messages": [question]}, ["a?"]),
        ({"conversations": [{"from": "human", "value": "a?"}]}, ["a?"]),
        ({"messages": [question, {"role": "assistant", "content": 7}]}, ["a?"]),
        ({"messages": [question, {"role": "assistant", "content": "</div>"}]}, ["a?"]),
        ({"messages": [question, {"role": "assistant", "content": "x" * 300_000}]}, ["a?"]),
        ({"prompt": "a?", "completion": "no"}, ["a?"]),
        # A table has all its columns in each row.
        ({"messages": None, "turns": None, "prompt": "a?"}, ["a?"]),
        ({"messages": [], "turns": [], "prompt": None, "question": "a?"}, ["a?"]),
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in asked))
    server = misbehaving()
    assert run(tmp_path / "out", tmp_path / "questions.jsonl", [server])["finished"] == len(asked)
    rows = sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])
    texts = [[m["content"] for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    assert texts == [questions for _, questions in asked]
    assert len(server.bodies) == sum(m["role"] == "user" for row in rows for m in row["messages"])


def test_what_is_no_question(misbehaving, tmp_path):
    for row, error in (({"text": "a"}, "no question in this row"), ({"prompt": 5}, "not_text 1")):
        (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=error):
            run(tmp_path / "out", tmp_path / "questions.jsonl", [misbehaving()])


@pytest.mark.parametrize("content, message", [("{", "not JSON"), ("[1]", "not a JSON object"), ("", "not JSON")])
def test_a_damaged_record_is_named(content, message, misbehaving, questions, tmp_path):
    server = misbehaving()
    run(tmp_path / "out", questions, [server])
    (tmp_path / "out" / "regenerate.json").write_text(content)
    with pytest.raises(UserError, match=rf"regenerate.json (is )?{message}.*; remove that file to go on"):
        run(tmp_path / "out", questions, [server])
    (tmp_path / "out" / "regenerate.json").unlink()
    assert run(tmp_path / "out", questions, [server])["finished"] == 40 and len(server.bodies) == 80


MESSAGES = st.fixed_dictionaries(
    {}, optional={"content": JSON_VALUES, "tool_calls": JSON_VALUES, "reasoning": JSON_VALUES}
)
CHOICES = st.fixed_dictionaries(
    {"message": MESSAGES | JSON_VALUES, "finish_reason": st.sampled_from(["stop", "length"]) | JSON_VALUES}
)
USAGES = st.fixed_dictionaries({"completion_tokens": JSON_VALUES}) | JSON_VALUES
ANSWERS = st.fixed_dictionaries({"choices": st.lists(CHOICES | JSON_VALUES, max_size=2) | JSON_VALUES, "usage": USAGES})


@pytest.fixture(scope="module")
def reader():
    return servers.Servers(["http://a"], Sampling(), 1, 1)


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([200, 200, 200, 200, 400, 401, 429, 500, 302]),
    (ANSWERS | JSON_VALUES).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20),
)
def test_no_answer_surprises(reader, status, body):
    try:
        reply = reader._reply(httpx.Response(status, content=body), "here")
    except (servers.Refused, servers._Failed, RunError) as error:
        assert str(error).startswith("here") and str(error).isprintable()
    else:
        assert reply.text.strip() and reply.text.encode() and reply.finish in ("stop", "length") and reply.tokens >= 0
