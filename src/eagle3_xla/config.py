"""Every setting of a run: dataclasses with defaults, YAML recipes over them, --section.key=value over those.

`base: NAME` in a recipe names another one, which it changes. An unknown key is an error that
names the nearest known one. `run.yaml` beside every output holds the resolved recipe (outputs.py).
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(ValueError):
    """A user's mistake: the command line prints the message as one line and exits with 2."""


class RunError(RuntimeError):
    """A failure that the message explains: the command line prints it as one line and exits with 1."""


@dataclass
class TargetConfig:
    path: str = ""  # folder, gs:// URL or hub id of a Hugging Face causal LM
    dtype: str = "bfloat16"  # float32 | bfloat16


@dataclass
class Source:
    """Where conversations come from. A plain string in a recipe is a source with that path."""

    path: str = ""  # a JSONL, JSON or Parquet file or folder, a URL, a hub id, sharegpt | ultrachat | perfectblend
    name: str = ""  # in manifest and held-out figures; default: each row's own `source`, else the file's name
    share: float = 0.0  # relative part of data.conversations; 0: everything
    cap: int = 0  # at most so many conversations of it; 0: no cap
    read: int = 0  # stop after so many rows (a hub set is shuffled as it streams); 0: all rows
    split: str = "train"  # hub sets and folders
    file: str = ""  # hub sets and folders: this file of it
    revision: str = ""  # hub sets: a commit, tag or branch


@dataclass
class DataConfig:
    train: list[Source] = field(default_factory=list)  # sources of the training conversations
    heldout: list[Source] = field(default_factory=list)  # empty: heldout_share of the training conversations
    heldout_share: float = 0.02  # of the training conversations, when there is no heldout source
    prepared: str = ""  # folder (or gs:// URL) that `prepare` writes and `train` reads
    conversations: int = 0  # size of the mix when the sources have shares
    deduplicate: str = "near"  # near: also near-duplicates (MinHash, Jaccard 0.8) | exact | none
    decontaminate: list[str] = field(default_factory=list)  # files of evaluation prompts, kept out of the training data
    languages: list[str] = field(default_factory=list)  # ISO codes to keep, [en] for one; empty: all
    tool_turns: str = "drop"  # drop: conversations with tool turns are left out | keep
    truncated_answers: str = "keep"  # keep | drop: conversations marked `"finish": "length"`
    last_turn_only: bool = False  # train on the last answer of each conversation alone
    drop_system: float = 0.0  # share of conversations without the template's default system prompt
    vary_system: float = 0.0  # share of conversations with one of system_prompts instead of it
    system_prompts: list[str] = field(  # what vary_system draws from
        default_factory=lambda: [
            "You are a helpful assistant.",
            "You are a knowledgeable assistant. Answer truthfully and to the point.",
            "Answer the user's questions.",
            "You are an expert who explains things clearly.",
        ]
    )
    row_length: int = 1024  # tokens in a packed row
    packing: str = "packed"  # packed: several conversations in a row | bucketed: one, in the shortest row that holds it
    buckets: list[int] = field(default_factory=list)  # row lengths besides row_length when bucketed
    too_long: str = (
        "cut"  # cut: a conversation longer than a row ends within a turn | turn: after its last whole answer
    )
    draft_vocab_size: int = 32000  # tokens the head can draft: the commonest of the training answers
    max_tokens: int = 0  # stop after so many training tokens (in a seeded order of the chats); 0: all
    seed: int = 0  # of the order of the chats, the mix and the held-out share
    workers: int = 0  # processes; 0: one per core. The result does not depend on it


@dataclass
class LossConfig:
    ttt_length: int = 7  # steps of the unroll: as many drafts as the head learns to write on its own states
    decay: float = 0.8  # step k weighs decay**k
    objective: str = "kl"  # kl | reverse_kl | tv | lk_alpha | lk_lambda, or a weighted sum: "kl + 0.5*tv"
    rows: str = "serving"  # serving: the rows an engine drafts at | specforge: row t counts by the mask of token t
    mean_over: str = "rows"  # rows: rows that count | all: all B*T rows, as SpecForge


@dataclass
class XlaConfig:
    device: str = "xla"  # xla | cpu | cuda
    dp: int = 1  # data-parallel replicas; dp * tp = devices
    tp: int = 1  # tensor-parallel devices in a replica
    draft_data_parallel: bool = False  # the draft phase is not split over tp: rows over all dp * tp devices instead
    autocast: bool = True  # bf16 matmuls over fp32 master weights
    remat: bool = False  # TTT steps computed again in the backward pass, losses one by one: less memory, more work
    peak_tflops: float = 0.0  # bf16 TFLOP/s of a device, for MFU; 0: what is known of this TPU


@dataclass
class TrainConfig:
    out: str = ""  # folder (or gs:// URL) of checkpoints, metrics.jsonl, tracker logs
    epochs: int = 3  # passes over the prepared rows
    batch_size: int = 4  # rows per data-parallel replica in a micro-step
    gradient_accumulation: int = 1  # micro-steps of an optimizer step
    lr: float = 8e-4  # of AdamW, at its highest; cosine decay to 0
    warmup: float = 0.03  # share of the optimizer steps
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 0.5  # gradients are scaled down to this norm
    init: str = "target"  # random | target: lm_head and norm are the target's | least_squares (draft/initialise.py)
    init_rows: int = 64  # rows whose target states shape the start
    reuse_states: bool = False  # run the target once over the data and keep its states on disk
    seed: int = 0  # of the start and the order of the rows
    log_every: int = 10  # micro-steps between rows of metrics.jsonl
    save_every: int = 500  # optimizer steps
    heldout_rows: int = 64  # rows of an evaluation, of all sources together; 0: none
    eval_every: int = 0  # optimizer steps between evaluations; 0: at the end of each epoch
    patience: int = 0  # stop after so many evaluations without a better acceptance length; 0: never
    keep: int = 2  # the newest checkpoints; the best by acceptance length is kept too
    warm_start: str = ""  # an exported head whose weights and draft vocabulary the run starts from
    tracker: str = "tensorboard"  # tensorboard | wandb | none


@dataclass
class PlanConfig:
    topology: str = "v4-32"  # the slice that `plan` compiles for (xla/tpu.py lists them)
    tokens: int = 0  # positions of the whole run, padding included; 0: what the prepared data and the epochs give
    price_per_chip_hour: float = 0.0  # dollars; 0: no price is printed
    layers: int = 0  # compile so many of the target's layers, extend the figures to all (plan/compiled.py); 0: all
    xla_flags: str = ""  # of the TPU compiler: "--xla_...=... --xla_...=..."; a run takes them as LIBTPU_INIT_ARGS


@dataclass
class Recipe:
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    xla: XlaConfig = field(default_factory=XlaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


CHOICES = {
    "target.dtype": ("float32", "bfloat16"),
    "data.deduplicate": ("near", "exact", "none"),
    "data.tool_turns": ("drop", "keep"),
    "data.truncated_answers": ("keep", "drop"),
    "data.packing": ("packed", "bucketed"),
    "data.too_long": ("cut", "turn"),
    "loss.rows": ("serving", "specforge"),
    "loss.mean_over": ("rows", "all"),
    "xla.device": ("xla", "cpu", "cuda"),
    "train.init": ("random", "target", "least_squares"),
    "train.tracker": ("tensorboard", "wandb", "none"),
}
OBJECTIVES = ("kl", "reverse_kl", "tv", "lk_alpha", "lk_lambda")
# Intervals as in mathematics: [ and ] belong to them, ( and ) don't. What is not named is only finite and storable.
RANGES = {
    "data.heldout_share": "[0, 1)",
    "data.conversations": "[0, inf)",
    "data.drop_system": "[0, 1]",
    "data.vary_system": "[0, 1]",
    "data.row_length": "[8, 131072]",
    "data.draft_vocab_size": "[1, inf)",
    "data.max_tokens": "[0, inf)",
    "data.seed": "[0, inf)",
    "data.workers": "[0, 1024]",
    "loss.ttt_length": "[1, 64]",
    "loss.decay": "(0, 1]",
    "xla.dp": "[1, 65536]",
    "xla.tp": "[1, 65536]",
    "xla.peak_tflops": "[0, inf)",
    "train.epochs": "[1, 1000000]",
    "train.batch_size": "[1, 65536]",
    "train.gradient_accumulation": "[1, 65536]",
    "train.lr": "(0, 1000]",
    "train.warmup": "[0, 1)",
    "train.beta1": "[0, 1)",
    "train.beta2": "[0, 1)",
    "train.weight_decay": "[0, inf)",
    "train.max_grad_norm": "(0, inf)",
    "train.init_rows": "[1, inf)",
    "train.seed": "[0, inf)",
    "train.log_every": "[1, inf)",
    "train.save_every": "[1, inf)",
    "train.heldout_rows": "[0, inf)",
    "train.eval_every": "[0, inf)",
    "train.patience": "[0, inf)",
    "train.keep": "[1, inf)",
    "plan.tokens": "[0, inf)",
    "plan.price_per_chip_hour": "[0, inf)",
    "plan.layers": "[0, inf)",
}
SOURCE_RANGES = {"share": "[0, inf)", "cap": "[0, inf)", "read": "[0, inf)"}
STORABLE = 2**63  # whole numbers below it fit everywhere


def recipe_names() -> list[str]:
    return sorted(
        file.name[:-5] for file in resources.files("eagle3_xla.recipes").iterdir() if file.name.endswith(".yaml")
    )


def load_recipe(name: str | None, overrides: list[str]) -> Recipe:
    """The recipe `name` (one that ships, or a YAML file) with `section.key=value` overrides.

    Raises UserError on an unknown recipe, an unknown key, a value of the wrong type or outside its range.
    """
    schema = OmegaConf.structured(Recipe)
    layers = _read(name) if name else []
    changes: Any = OmegaConf.create({})
    for override in overrides:
        with _foreign(f"setting {override}"):
            changes = OmegaConf.merge(changes, OmegaConf.from_dotlist([override]))
    merged: Any = schema
    for whose, layer in [*layers, ("command line", changes)]:
        with _foreign(whose):
            _check_keys(layer, schema, "")
            _sources_from_strings(layer)
            merged = OmegaConf.merge(merged, layer)
    with _foreign(name or "command line"):
        recipe: Any = OmegaConf.to_object(merged)
    _check_values(recipe)
    return recipe


def _read(name: str) -> list[tuple[str, DictConfig]]:
    """The recipe and those that it builds on, as (name, settings), the last base first."""
    layers: list[tuple[str, DictConfig]] = []
    files: list[Path] = []
    wanted = f"recipe {name!r}"
    while name:
        with _foreign(f"recipe {name}"):
            file = _recipe_file(name, files[-1].parent if files else Path(), wanted)
            given = OmegaConf.load(file)
            if not isinstance(given, DictConfig):
                raise UserError(f"{name}: a recipe is a mapping of sections")
            base = given.pop("base", "")
        if not isinstance(base, str):
            raise UserError(f"{name}: base is {_one_line(base)}; the name of one recipe is expected")
        if file.resolve() in files:
            raise UserError(f"{name}: its bases lead back to it: {' -> '.join([n for n, _ in layers] + [name])}")
        files.append(file.resolve())
        layers.append((name, given))
        name, wanted = base, f"recipe {base!r}, which {name} builds on"
    return layers[::-1]


def _recipe_file(name: str, folder: Path, wanted: str) -> Path:
    """A YAML file, relative to `folder`, or one of the recipes that ship."""
    path = folder / name
    if not path.exists() and name in recipe_names():
        path = Path(str(resources.files("eagle3_xla.recipes") / f"{name}.yaml"))
    if not path.is_file():
        raise UserError(f"no {_one_line(wanted)}; a YAML file or one of: {', '.join(recipe_names())}")
    return path


@contextlib.contextmanager
def _foreign(what: str) -> Iterator[None]:
    """YAML and OmegaConf raise errors of many kinds on texts that are no settings: each becomes a UserError."""
    import yaml

    try:
        yield
    except UserError:
        raise
    except OmegaConfBaseException as error:
        key, message = getattr(error, "full_key", None), _one_line(str(error).splitlines()[0])
        raise UserError(f"setting {_one_line(key)}: {message}" if key else f"{_one_line(what)}: {message}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{_one_line(what)}: not valid YAML ({_one_line(error)})") from None
    except Exception as error:
        raise UserError(f"{_one_line(what)}: not readable ({_one_line(error) or type(error).__name__})") from None


def _one_line(words: object) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(words).split()))[:300]


def _check_keys(given: DictConfig, schema: DictConfig, prefix: str) -> None:
    for key in given:
        full = f"{prefix}{key!s}"
        if key not in schema:
            nearest = difflib.get_close_matches(str(key), list(map(str, schema)), n=1, cutoff=0.0)[0]
            raise UserError(f"unknown setting {_one_line(full)}; the nearest known one is {prefix}{nearest}")
        if isinstance(schema[key], DictConfig):
            if not isinstance(given[key], DictConfig):
                raise UserError(f"setting {full} is a section; give one of {', '.join(map(str, schema[key]))} in it")
            _check_keys(given[key], schema[key], f"{full}.")
        elif isinstance(schema[key], ListConfig) and isinstance(given[key], DictConfig):
            raise UserError(f"setting {full} is a list; give it as [..., ...]")


def _sources_from_strings(given: DictConfig) -> None:
    """`data.train: [chats.jsonl]` means `[{path: chats.jsonl}]`."""
    for key in ("train", "heldout"):
        if isinstance(sources := given.get("data", {}).get(key), ListConfig):
            given.data[key] = [{"path": source} if isinstance(source, str) else source for source in sources]


def _check_values(recipe: Recipe) -> None:
    def value(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(recipe, section), key)

    _check_storable(asdict(recipe), "")
    for name, choices in CHOICES.items():
        if value(name) not in choices:
            raise UserError(f"setting {name} is {value(name)!r}; choose one of {', '.join(choices)}")
    objective_terms(recipe.loss.objective)
    for name, interval in RANGES.items():
        _check_range(f"setting {name}", value(name), interval)
    _check_sources(recipe.data)
    if recipe.xla.draft_data_parallel and recipe.train.batch_size % recipe.xla.tp:
        raise UserError(
            f"setting xla.draft_data_parallel deals the rows of a replica to its {recipe.xla.tp} devices; "
            f"train.batch_size is {recipe.train.batch_size}, no multiple of xla.tp"
        )


def objective_terms(text: str) -> dict[str, float]:
    """Name -> weight of the objectives that "kl" or "kl + 0.5*tv" adds up. Raises UserError."""
    terms: dict[str, float] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?(\w+)\s*", term, re.ASCII)
        weight, name = (float(match[1] or 1), match[2]) if match else (0.0, "")
        if name not in OBJECTIVES or name in terms or not 0 < weight < 1e6:
            raise UserError(
                f"setting loss.objective is {text!r}; choose one of {', '.join(OBJECTIVES)}, or a sum of them, each "
                "once, with weights above 0, such as kl + 0.5*tv"
            )
        terms[name] = weight
    return terms


def _check_storable(value: object, name: str) -> None:
    """Every number is finite and fits 64 bits, no text holds NUL."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_storable(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_storable(item, f"{name}[{number}]")
    elif isinstance(value, str):
        if "\0" in value:
            raise UserError(f"setting {name} is {value!r}; it holds NUL")
    elif isinstance(value, int | float) and not (-STORABLE <= value < STORABLE and math.isfinite(value)):
        raise UserError(f"setting {name} is {value!r:.60}; a finite number is expected, whole ones below 2**63")


def _check_range(name: str, value: float, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    if not above or not (value < high if interval[-1] == ")" else value <= high):
        wanted = f"in {interval}" if high < math.inf else f"{'more than' if interval[0] == '(' else 'at least'} {low:g}"
        raise UserError(f"{name} is {value}; it must be {wanted}")


def _check_sources(data: DataConfig) -> None:
    for key in ("train", "heldout"):
        for number, source in enumerate(getattr(data, key)):
            if not source.path:
                raise UserError(f"setting data.{key}[{number}].path is empty; name a file, a folder or a hub id")
            for name, interval in SOURCE_RANGES.items():
                _check_range(f"setting data.{key}[{number}].{name}", getattr(source, name), interval)
    shares = [source.share for source in data.train]
    if any(shares) and not all(shares):
        missing = data.train[shares.index(0)].path
        raise UserError(f"setting data.train: {missing} has no share, but other sources have; give each of them one")
    if any(shares) != bool(data.conversations):
        raise UserError("settings data.conversations and the sources' shares belong together; give both or neither")
    if not all(data.decontaminate):
        raise UserError("setting data.decontaminate names an empty path; name files of evaluation prompts")
    if data.drop_system + data.vary_system > 1:
        raise UserError("settings data.drop_system and data.vary_system are shares; their sum must be at most 1")
    if data.packing == "bucketed" and not all(8 <= length < data.row_length for length in data.buckets):
        raise UserError(f"setting data.buckets is {data.buckets}; lengths from 8 to below data.row_length are expected")
    if data.vary_system and not data.system_prompts:
        raise UserError("setting data.vary_system is set, but data.system_prompts is empty")
