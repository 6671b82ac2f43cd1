"""The page of `eval --report`, from a real evaluation, and in a real browser."""

import json
import os
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from eagle3_xla import cli
from eagle3_xla.evaluate.decode import Generation
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.page import MARK
from eagle3_xla.evaluate.run import _calls_by_context, evaluate

VOID = {"meta", "br"}
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"


class Reader(HTMLParser):
    """Which tags open and close, what is in the kept parts, and everything that a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.open, self.classes, self.text, self.loads, self.titles = [], [], {}, [], []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.loads += [tag] if tag in ("script", "link", "img", "iframe", "object") else []
        self.loads += [name for name in named if name.startswith("on") or name == "src"]
        self.titles += [named["title"]] if "title" in named else []
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append(named.get("class", ""))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data):
        if self.classes and "answer" in self.classes:
            self.text[self.classes[-1]] = self.text.get(self.classes[-1], "") + data


@pytest.fixture(scope="module")
def page(trained, small_target, tmp_path_factory):
    """(the page of three prompts, one of them hostile, its figures)."""
    folder = tmp_path_factory.mktemp("page")
    rows = [
        {"prompt": "What is 2 and 3?", "category": "math", "source": "school"},
        {"prompt": "<script>alert('x')</script>&\x1b[2J a\u00a0b\u200dc\u202e", "category": "<b>bold</b>"},
        {"prompt": "What is 4 and 1? " * 60, "category": "math", "source": "exams"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run").mkdir()
    metrics = (trained.parent / "run" / "metrics.jsonl").read_text()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 3, "lo' + metrics)  # a full disk cut the first row
    words = ["eval", "--target", small_target, "--draft", trained, "--prompts", folder / "prompts.jsonl", "--json"]
    words += ["--max-new-tokens", 24, "--report", folder / "out", "--run", folder / "run"]
    from contextlib import redirect_stdout
    from io import StringIO

    said = StringIO()
    with redirect_stdout(said):
        assert cli.main([str(word) for word in words]) == 0
    return folder / "out" / "report.html", json.loads(said.getvalue()), words


def test_what_is_on_it(page, tokenizer):
    file, figures, _ = page
    assert figures["report"] == str(file) and figures["identical"] and figures["prompts"] == 3
    assert figures["tau"] > 1.0 and len(figures["acceptance"]) == len(figures["acceptance_conditional"]) == 5
    assert figures["acceptance"][0] == figures["acceptance_conditional"][0]
    assert len(figures["acc_all_positions"]) == 5 and 0 < figures["target_calls_per_token"] <= 1
    assert sum(group["calls"] for group in figures["by_category"].values()) == sum(
        group["calls"] for group in figures["by_context"].values()
    )
    assert set(figures["by_category"]) == {"math", "<b>bold</b>"}
    assert set(figures["by_source"]) == {"school", "other", "exams"}
    assert list(figures["by_context"]) == ["256", "512", "1024"]
    both, calls = figures["by_category"].values(), sum(group["calls"] for group in figures["by_category"].values())
    assert sum(group["tau"] * group["calls"] for group in both) / calls == pytest.approx(figures["tau"])
    content = file.read_text()
    reader = Reader()
    reader.feed(content)
    assert not reader.open and not reader.loads and not {"\x1b", "\u202e"} & set(content)
    assert "a\u00a0b\u200dc" in content  # what languages and emoji need stays
    assert "before training" not in content and all(f"<td>{name}</td>" in content for name in figures["by_source"])
    assert f"{figures['tau']:.2f}" in content and content.count("<svg") == 2 and "&lt;script&gt;alert" in content
    # Kept drafts, and the target's own tokens: one a call, and one of each answer's prefill.
    kept = len(tokenizer(reader.text["kept"])["input_ids"])
    assert 0 < kept < figures["tokens"] and len(reader.titles) == calls + figures["prompts"]
    assert sum(int(title.rpartition(" ")[2]) for title in reader.titles if "; kept " in title) == round(
        (figures["tau"] - 1) * calls
    )


def test_beside_the_untrained_head(page, trained, small_target, tmp_path, tokenizer):
    """What the quickstart adds: its columns, and each answer as it grows; prompts that have no kind have no table."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say hello."}\n')
    before, grown = page[1] | {"tau": 1.03, "acceptance_conditional": [0.03125, 0.0, 0.0, 0.0, 0.0]}, []
    figures = evaluate(
        str(small_target),
        str(trained),
        str(tmp_path / "prompts.jsonl"),
        EvalOptions(max_new_tokens=12, baseline=False),
        tmp_path,
        before=before,
        watch=lambda prompt, answer: grown.append((prompt, len(answer.tokens))),
    )
    content = (tmp_path / "report.html").read_text()
    assert "1.03 before training" in content and '<td class="number">3.1%</td>' in content
    assert content.count("the same before training") == 1
    assert figures["by_category"] == figures["by_source"] == {} and "by kind of prompt" not in content
    assert grown[0] == (0, 1) and grown[-1] == (0, figures["tokens"])


def test_beyond_the_last_bucket():
    calls = list(_calls_by_context(4093, Generation([0] * 5, 1.0, [2, 0, 1])))
    assert calls == [("4096", 2), ("more", 0), ("more", 1)]


def test_it_replaces_only_its_own(page, capsys):
    file, _, words = page
    assert MARK in file.read_text()
    words = [str(word) for word in words]
    before = file.read_text()
    file.write_text("<html>mine")
    assert cli.main(words) == 2 and file.read_text() == "<html>mine"
    assert "report.html was not written by `eval --report`; move it" in capsys.readouterr().err
    file.write_text(before)
    page, without = words.index("--report"), [*words]
    del without[page : page + 2]
    assert cli.main(without) == 2
    assert "--run gives the report its curves: without --report" in capsys.readouterr().err
    (file.parent / "metrics.jsonl").write_text("step 3\n")
    for run in (file.parent / "nothing", file.parent):
        words[words.index("--run") + 1] = str(run)
        assert cli.main([*words, "--limit", "1"]) == 2
        said = capsys.readouterr().err
        assert "its metrics.jsonl can't be shown" in said and "prompt/s" not in said  # before anything is decoded
    for option in ("--run", "--report"):
        words[words.index(option) + 1] = "gs://bucket/folder"
        assert cli.main(words) == 2
        assert f"{option} gs://bucket/folder: a folder of this machine is expected" in capsys.readouterr().err
    assert not Path("gs:").exists()


@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser(page, tmp_path, width):
    browser = shutil.which("chromium")
    if browser is None and os.geteuid():
        pytest.skip("chromium is not installed, and only root can: apt-get install chromium")
    deadline = time.monotonic() + 300
    while browser is None and time.monotonic() < deadline:  # launch/test.sh installs it beside the other tests
        time.sleep(1)
        browser = shutil.which("chromium")
    assert browser, "chromium was not installed; see .engines/chromium.log"
    shot = tmp_path / "shot.png"
    command = [browser, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    command += [f"--window-size={width},2400"]
    done = subprocess.run([*command, page[0].as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr  # what the page's own errors and warnings would be
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (2400, width) and len({tuple(p) for p in pixels[::7, ::7].reshape(-1, 3)}) > 20
    assert (pixels[:, -10:] == 1).all()  # nothing is wider than the window
