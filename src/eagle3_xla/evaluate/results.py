"""The files that `eval --json` and `bench --json` write, read back for a card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_xla.checks import listing, mapping, number, read_json, shown, text
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.options import sampling_in_words


@dataclass
class Figures:
    """How a head fared. engine: "" for `eval`'s own decoding; at_once: prompts decoded, or in flight, at once; window:
    positions that the head was let see, None where that was not set; drafts: checked in a target call; acceptance[k]:
    share of the calls that accepted the draft at depth k; speedup: None where none was measured, or for other answers;
    head, target: fingerprints.
    """

    file: Path
    engine: str
    prompts: int
    prompts_name: str
    at_once: int
    temperature: float
    top_p: float
    window: int | None
    drafts: int
    topk: int
    tau: float
    acceptance: list[float]
    acc_all_positions: list[float]
    tokens_per_second: float
    speedup: float | None
    head: str
    target: str
    date: str

    @property
    def how(self) -> str:
        """In words, for people."""
        sampling = sampling_in_words(self.temperature, self.top_p)
        shape = "chain" if self.topk == 1 else "tree"
        prompts = f"{self.prompts} prompts of {self.prompts_name}"
        prompts += f", {self.at_once} at once" if self.at_once > 1 else ""
        window = f", draft window {self.window}" if self.window else ""
        return f"{self.engine or 'own decoding'}, {prompts}, {sampling}, {shape} of {self.drafts} drafts{window}"


def read_results(file: Path) -> list[Figures]:
    """Of a file that `eval` or `bench` wrote, or of the quickstart's result.json, which holds two of `eval`."""
    result = read_json(file)
    parts = [result[part] for part in ("eval", "tree") if isinstance(result.get(part), dict)]
    return [_figures(file, part) for part in parts or [result]]


def _figures(file: Path, result: dict) -> Figures:
    """Raises UserError, naming the field, for what is not of `eval` or `bench`."""

    def where(name: str) -> str:
        return f"{file}: {name}"

    def field(name: str) -> Any:
        if name not in result:
            raise UserError(f"{file}: {name} is missing; the output of `eval --json` or `bench --json` is expected")
        return result[name]

    def share(name: str) -> list[float]:
        values = listing(field(name), where(name))
        return [number(value, f"{where(name)}[{k}]", 0, 1) for k, value in enumerate(values)]

    def speed(name: str) -> float:
        return number(field(name), where(name), 0, above=True)

    own = "tau" in result
    if not own and field("acceptance_length") is None:
        raise UserError(f"{file}: acceptance_length is null: a server without a head, or one that drafted nothing")
    about = mapping(field("measured"), where("measured"))
    batch: Any = result.get("batch_size", 1)  # what older files lack is as it was by default
    top_p, window = result.get("top_p", 1.0), result.get("draft_window")
    if own:
        engine, tau = "", field("tau")
        alone = None if field("baseline_tokens_per_second") is None else speed("baseline_tokens_per_second")
        ratio = speed("tokens_per_second") / alone if alone and result.get("identical") is not False else None
    else:
        engine = f"{text(field('engine'), where('engine'))} {text(field('version'), where('version'))}"
        tau = field("acceptance_length")
        rows = listing(field("concurrency"), where("concurrency"))
        batch = mapping(rows[0] if rows else None, where("concurrency[0]")).get("concurrency")
        ratio = None if field("speedup") is None else speed("speedup")
    for name in ("head", "target"):
        if not isinstance(about.get(name), str):
            raise UserError(
                f"{file}: measured.{name} is {shown(about.get(name))}: it does not say which {name} it measured; "
                f"measure again where the {name}'s files are"
            )
    prompts = mapping(about.get("prompts"), where("measured.prompts"))
    return Figures(
        file=Path(file),
        engine=engine,
        prompts=number(field("prompts"), where("prompts"), 1, whole=True),
        prompts_name=text(prompts.get("name"), where("measured.prompts.name")),
        at_once=number(batch, where("batch_size" if own else "concurrency[0].concurrency"), 1, whole=True),
        temperature=number(field("temperature"), where("temperature"), 0),
        top_p=number(top_p, where("top_p"), 0, 1, above=True),
        window=None if window is None else number(window, where("draft_window"), 1, whole=True),
        drafts=number(field("draft_tokens"), where("draft_tokens"), 1, whole=True),
        topk=number(field("topk"), where("topk"), 1, whole=True),
        tau=number(tau, where("tau" if own else "acceptance_length"), 1),
        acceptance=share("acceptance"),
        acc_all_positions=share("acc_all_positions") if own else [],
        tokens_per_second=speed("tokens_per_second"),
        speedup=ratio,
        head=about["head"],
        target=about["target"],
        date=text(about.get("date"), where("measured.date")),
    )
