"""Writes what the documentation takes from the code: python docs/generate.py

settings.md and verbs.md as a whole; in other pages what stands between <!-- name --> and <!-- end of name -->.
tests/test_docs.py compares.
"""

import argparse
import json
import os
import re
import textwrap
from pathlib import Path

from eagle3_xla.arguments import parser
from eagle3_xla.config import load_recipe
from eagle3_xla.explain import Setting, recipes, settings, source_settings
from eagle3_xla.target.families import FAMILIES, IN_SGLANG_JAX, SGLANG, VLLM

FOLDER = Path(__file__).parent
NOTE = "<!-- written by `python docs/generate.py`; change the code instead -->"
MARK = "<!-- {} -->\n\n{}\n\n<!-- end of {} -->"


def cell(words) -> str:
    return str(words).replace("|", "\\|")


def table(found: list[Setting]) -> str:
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for setting in found:
        default = "" if setting.default in ("", []) else f"`{cell(setting.default)}`"
        if isinstance(setting.default, list) and setting.default:
            default = f"{len(setting.default)} prompts"
        allowed = cell(setting.allowed or setting.kind)
        lines.append(f"| `{setting.name}` | {default} | {allowed} | {cell(setting.meaning)} |")
    return "\n".join(lines)


def settings_page() -> str:
    parts = [
        NOTE,
        "# Settings\n\nEvery setting, from the `config.py` of the package that owns it. Intervals as in mathematics: "
        "`[` and `]` belong to them, `(` and `)` don't. Given as `--section.key=value`, or in a YAML file (`--config`)."
        "\n\n`eagle3-xla config --show RECIPE` prints the values that a recipe gives them.",
    ]
    sections: dict[str, list[Setting]] = {}
    for setting in settings():
        sections.setdefault(setting.name.split(".")[0], []).append(setting)
    for name, found in sections.items():
        parts.append(f"## {name}\n\n{table(found)}")
        if name == "data":
            parts.append(
                "### A source\n\nOf `data.train` and `data.heldout`; a plain string is a source with that path.\n\n"
                + table(source_settings())
            )
    return "\n\n".join(parts) + "\n"


def verbs_page() -> str:
    os.environ["COLUMNS"] = "100"
    parts = [
        NOTE,
        "# Verbs\n\n`eagle3-xla VERB [--config RECIPE] [--section.key=value ...]`, also `python -m eagle3_xla VERB`.",
    ]
    found = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, verb in found.choices.items():
        usage = re.sub(r"(?s)^usage:.*?\n\n", "", verb.format_help())
        parts.append(f"## {name}\n\n```\n{usage.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def recipes_table() -> str:
    lines = [
        "| recipe | target | mesh | rows a replica x accumulation | row | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for name, meaning in recipes().items():
        recipe = load_recipe(name, [])
        if name == "base":
            continue
        target = recipe.target.path or "the embedded one"
        mesh = f"dp={recipe.xla.dp} x tp={recipe.xla.tp}" + (
            ", draft over all" if recipe.xla.draft_data_parallel else ""
        )
        rows = f"{recipe.train.batch_size} x {recipe.train.gradient_accumulation}"
        lines.append(f"| `{name}` | {target} | {mesh} | {rows} | {recipe.data.row_length} | {cell(meaning)} |")
    return "\n".join(lines)


def families_table() -> str:
    lines = [f"| `model_type` | its head in {SGLANG} | in {VLLM} | in sglang-jax at `cddbf6f1` |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        served = ["yes" if engine in family.engines else "no" for engine in (SGLANG, VLLM)]
        jax = "no" if name not in IN_SGLANG_JAX else "with its patch" if name == "qwen2" else "unless tied"
        lines.append(f"| `{name}` | {' | '.join([*served, jax])} |")
    return "\n".join(lines)


def compiling() -> str:
    """What the plans of the shipped recipes took, in minutes of CPU time, by slice and layout."""
    verdicts = [json.loads(file.read_text()) for file in sorted((FOLDER.parent / "benchmarks/plans").glob("*.json"))]
    minutes: dict[tuple[bool, bool], list[float]] = {}
    for verdict in verdicts:
        kind = verdict["topology"].startswith("v6e"), verdict["mesh"]["draft_data_parallel"]
        minutes.setdefault(kind, []).append(verdict["cpu_seconds"] / 60)
    memory = span([verdict["peak_gb"] for verdict in verdicts])
    of_a_7b = span([verdict["cpu_seconds"] / 60 for verdict in verdicts if "-7b-" in verdict["recipe"]])
    words = (
        "Compiling takes minutes of a core or two. From 8 of the target's layers (`--plan.layers=8`) it took "
        f"{memory} GB (`peak_gb` of the files in `benchmarks/plans`), and of CPU time (`cpu_seconds`) {of_a_7b} "
        f"minutes for the recipes of a 7B. Of all recipes: {span(minutes[False, False])} on a v4, v5e or v5p; "
        f"{span(minutes[False, True])} where the draft phase is over all chips (`xla.draft_data_parallel`), as the "
        f"whole step is compiled twice then; {span(minutes[True, False])} on a v6e, and {span(minutes[True, True])} "
        "there with both."
    )
    return textwrap.fill(words, 120, break_on_hyphens=False)


def span(values: list[float]) -> str:
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    return least if least == most else f"{least} to {most}"


def filled(page: str, name: str, content: str) -> str:
    """The page with `content` at its mark."""
    marked = re.compile(rf"<!-- {name} -->(.*?<!-- end of {name} -->)?", re.DOTALL)
    assert marked.search(page), f"no mark {name}"
    return marked.sub(lambda _: MARK.format(name, content, name), page)


def pages() -> dict[str, str]:
    """File -> what it should hold."""
    targets, recipes_page, tpu = ((FOLDER / name).read_text() for name in ("targets.md", "recipes.md", "tpu.md"))
    return {
        "settings.md": settings_page(),
        "verbs.md": verbs_page(),
        "targets.md": filled(targets, "families", families_table()),
        "recipes.md": filled(recipes_page, "recipes", recipes_table()),
        "tpu.md": filled(tpu, "compiling", compiling()),
    }


if __name__ == "__main__":
    for name, content in pages().items():
        (FOLDER / name).write_text(content)
