"""The page of `eval --report`: one HTML file, no scripts, no network; what was measured, and the answers in colour."""

import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eagle3_xla.checks import of_this_machine
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.curves import draw_curves, read_metrics
from eagle3_xla.evaluate.decode import Generation
from eagle3_xla.evaluate.options import sampling_in_words

NAME = "report.html"
MARK = '<meta name="generator" content="eagle3-xla eval">'  # a page without it is someone else's
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { padding: .2em 1em .2em 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tau { font-size: 2.6em; font-weight: 600; } .small { color: #666; font-size: .9em; overflow-wrap: anywhere; }
.bar { display: inline-block; height: .8em; background: #2a7fd4; min-width: 1px; width: calc(var(--share) * 12em); }
.answer { white-space: pre-wrap; background: #f7f7f7; padding: .8em; border-radius: 6px; overflow-wrap: anywhere; }
.asked { white-space: pre-wrap; font-weight: 600; margin-bottom: .3em; overflow-wrap: anywhere; }
.call:hover { outline: 2px solid #f0b429; } .kept { background: #bfe8c2; } .own { background: #d5e3f7; }
.cut { color: #b3261e; text-decoration: line-through; font-size: .8em; opacity: .75; }
svg { max-width: 100%; height: auto; }
@media (max-width: 600px) {
  th, td { padding-right: .6em; } td { overflow-wrap: anywhere; } .bar { width: calc(var(--share) * 3.5em); }
}
"""


TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder the text around them


class Answer(NamedTuple):
    """One prompt's conversation up to its answer, as the user wrote it, and what was decoded."""

    asked: str
    generation: Generation


def place_of(folder: str | Path) -> Path:
    """Where the page goes. Raises UserError when a page that `eval` did not write is there, or no folder can be."""
    page = of_this_machine(folder, "--report") / NAME
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if page.exists() and not is_page(page.read_text(errors="replace")):
            raise UserError(f"{page} was not written by `eval --report`; move it, or name another folder")
    except OSError as error:
        raise UserError(f"--report {folder}: {error.strerror}") from None
    return page


def is_page(content: str) -> bool:
    """Whether it is a page that `write_page` wrote."""
    return MARK in content[:1000]


def write_page(
    page: Path,
    figures: dict,
    answers: Sequence[Answer],
    tokenizer: Any,
    run: str | Path = "",
    before: dict | None = None,
) -> None:
    """figures: what `eval` returns; run: the training folder whose curves are shown, "" for none; before: what `eval`
    returned for the head before its training, to stand beside.
    """
    measured = figures["measured"]
    sections = [
        f"<h1>Acceptance of a draft head</h1>{_headline(figures, before)}",
        _positions(figures, before),
        _groups("Acceptance length by kind of prompt", "kind", figures["by_category"]),
        _groups("Acceptance length by source of the prompt", "source", figures["by_source"]),
        _groups("Acceptance length by context", "tokens before, up to", figures["by_context"]),
    ]
    if run:
        sections.append(f"<h2>Training</h2>{''.join(draw_curves(Path(run)))}")
    sections += ["<h2>Answers</h2>", LEGEND, *(_answer(answer, tokenizer) for answer in answers)]
    sections.append(
        f'<p class="small">head {_text(measured["head"])}, target {_text(measured["target"])}, prompts '
        f"{_text(measured['prompts']['name'])}, eagle3-xla {_text(measured['version'])}, {_text(measured['date'])}</p>"
    )
    head = f'<meta charset="utf-8">{MARK}<meta name="viewport" content="width=device-width">'
    head += f"<title>Acceptance of a draft head</title><style>{STYLE}</style>"
    page.write_text(f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n')


LEGEND = (
    '<p class="small"><span class="kept">drafted and kept</span> <span class="own">written by the target</span> '
    '<span class="cut">draft that was not kept</span>; pointing at a part shows all drafts of its target call.</p>'
)


class _Bar(float):
    """A share, 0 to 1, shown as a bar."""


def _text(value: Any) -> str:
    """For HTML; control characters and changes of direction, which a file may hold, are left out."""
    words = "".join(
        c for c in str(value) if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in TURNS
    )
    return html.escape(words)


def _headline(figures: dict, before: dict | None) -> str:
    shape = f"chain of {figures['draft_tokens']} drafts"
    if figures["topk"] > 1:
        shape = f"tree of {figures['draft_tokens']} drafts, {figures['topk']} a node, {figures['steps']} deep"
    chosen = sampling_in_words(figures["temperature"], figures["top_p"])
    shape += f", draft window {figures['draft_window']}" if figures["draft_window"] else ""
    at_once = f", {figures['batch_size']} prompts at once" if figures["batch_size"] > 1 else ""
    speed = f"{figures['tokens_per_second']:.1f} tokens/s with the head"
    if figures["baseline_tokens_per_second"]:
        speed += f", {figures['baseline_tokens_per_second']:.1f} without; the same tokens: "
        speed += "yes" if figures["identical"] else "NO"
    untrained = f"; {before['tau']:.2f} before training" if before else ""
    return (
        f'<div><span class="tau">{figures["tau"]:.2f}</span> tokens per target call (acceptance length)'
        f"{untrained}</div>"
        f"<p>{figures['prompts']} prompts, {figures['tokens']:,} tokens, {chosen}, {shape}{at_once}<br>{speed}</p>"
    )


def _positions(figures: dict, before: dict | None) -> str:
    heads = ["draft", "of all target calls", "if all before were accepted", ""]
    shares = zip(figures["acceptance"], figures["acceptance_conditional"])
    rows = [[k, f"{plain:.1%}", f"{share:.1%}", _Bar(share)] for k, (plain, share) in enumerate(shares, 1)]
    if before:
        heads += ["the same before training", ""]
        for row, share in zip(rows, before["acceptance_conditional"]):
            row += [f"{share:.1%}", _Bar(share)]
    return _table("Acceptance by draft position", heads, rows)


def _table(title: str, heads: list[str], rows: list[list]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, _Bar):
            return f'<td><span class="bar" style="--share: {value:.3f}"></span></td>'
        number = "" if isinstance(value, str) and not value[:1].isdigit() else ' class="number"'
        return f"<td{number}>{_text(value)}</td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    columns = "".join(f"<th>{head}</th>" for head in heads)
    return f"<h2>{title}</h2><table><tr>{columns}</tr>{lines}</table>"


def _groups(title: str, kind: str, groups: dict[str, dict]) -> str:
    if not groups:
        return ""
    longest = max(group["tau"] for group in groups.values())
    rows = [[name, g["calls"], f"{g['tau']:.2f}", _Bar(g["tau"] / longest)] for name, g in groups.items()]
    return _table(title, [kind, "target calls", "acceptance length", ""], rows)


def readable_run(run: str | Path) -> None:
    """Raises UserError when the folder's curves can't be shown: before an hour of decoding, not after it."""
    folder = of_this_machine(run, "--run")
    try:
        rows = read_metrics(folder / "metrics.jsonl")
        if not rows:
            raise ValueError("there is no row in it")
        if any("step" not in row or ("loss" in row and "acc" not in row) for row in rows):
            raise ValueError("a row is not one that `train` writes")
    except (OSError, ValueError) as error:
        raise UserError(f"--run {run}: its metrics.jsonl can't be shown ({error})") from None


def _answer(answer: Answer, tokenizer: Any) -> str:
    """Each target call is one part: its kept drafts, the first one that was not kept, the target's own token."""
    tokens, parts, at, shown = answer.generation.tokens, [], 0, ""

    def words(count: int) -> str:
        """The text of the next tokens: by whole prefixes, for single tokens lose spaces and halves of characters."""
        nonlocal at, shown
        at = min(at + count, len(tokens))
        before, shown = shown, tokenizer.decode(tokens[:at]).rstrip("\ufffd")
        return _text(shown[len(before) :])

    parts.append(f'<span class="call own" title="the prompt\'s own call">{words(1)}</span>')
    for tree, kept in answer.generation.rounds:
        drafts = ", ".join(repr(tokenizer.decode([token])) for token in tree.tokens[1:])
        refused = [node for node, parent in enumerate(tree.parents) if parent == kept[-1]]
        cut = tokenizer.decode([tree.tokens[tree.best(refused, 1)[0]]]) if refused else ""
        accepted = words(len(kept) - 1)
        parts.append(
            f'<span class="call" title="{_text(f"drafts: {drafts}; kept {len(kept) - 1}")}">'
            f'<span class="kept">{accepted}</span><span class="cut">{_text(cut)}</span>'
            f'<span class="own">{words(1)}</span></span>'
        )
    return f'<div class="asked">{_text(answer.asked)}</div><div class="answer">{"".join(parts)}</div>'
