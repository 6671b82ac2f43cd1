"""A recipe: every package's settings, and how they are read: defaults, YAML over them, --section.key=value over those.

`base: NAME` in a recipe names another one, which it changes. An unknown key is an error that
names the nearest known one. `run.yaml` beside every output holds the resolved recipe (outputs.py).
"""

import contextlib
import difflib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle3_xla.data.config import DataConfig
from eagle3_xla.draft.config import DraftConfig
from eagle3_xla.errors import UserError
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.plan.config import PlanConfig
from eagle3_xla.settings import check_values
from eagle3_xla.target.config import TargetConfig
from eagle3_xla.train.config import TrainConfig
from eagle3_xla.xla.config import XlaConfig


@dataclass
class Recipe:
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    xla: XlaConfig = field(default_factory=XlaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def recipe_names() -> list[str]:
    return sorted(
        file.name[:-5] for file in resources.files("eagle3_xla.recipes").iterdir() if file.name.endswith(".yaml")
    )


def load_recipe(name: str | None, overrides: list[str]) -> Recipe:
    """The recipe `name` (one that ships, or a YAML file) with `section.key=value` overrides.

    The value of a text setting is what it says (but for OmegaConf's `${...}`), every other one is YAML.

    Raises UserError on an unknown recipe, an unknown key, a value of the wrong type or outside its range.
    """
    schema = OmegaConf.structured(Recipe)
    layers = _read(name) if name else []
    changes: Any = OmegaConf.create({})
    for override in overrides:
        with _foreign(f"setting {override}"):
            changes = OmegaConf.merge(changes, _given(override))
    merged: Any = schema
    for whose, layer in [*layers, ("command line", changes)]:
        with _foreign(whose):
            _check_keys(layer, schema, "")
            _sources_from_strings(layer)
            merged = OmegaConf.merge(merged, layer)
    with _foreign(name or "command line"):
        recipe: Any = OmegaConf.to_object(merged)
    _check(recipe)
    _expand_homes(recipe.target, recipe.data, recipe.train)
    return recipe


def _expand_homes(target: TargetConfig, data: DataConfig, train: TrainConfig) -> None:
    target.path, data.prepared = expand_home(target.path), expand_home(data.prepared)
    train.out, train.warm_start = expand_home(train.out), expand_home(train.warm_start)
    data.decontaminate = [expand_home(path) for path in data.decontaminate]
    for source in [*data.train, *data.heldout]:
        source.path = expand_home(source.path)


def expand_home(path: str) -> str:
    """`~/...` as the folder that it means: a shell leaves it as it is after `--option=` and in brackets."""
    return os.path.expanduser(path) if path.partition("/")[0] == "~" else path


def _given(override: str) -> Any:
    """`section.key=value`. YAML would make 20240501 of a folder 2024_05_01, and nothing of what follows on ` #`."""
    name, equals, value = override.partition("=")
    section, _, key = name.partition(".")
    if equals and isinstance(asdict(Recipe()).get(section, {}).get(key), str):
        return {section: {key: value}}
    return OmegaConf.from_dotlist([override])


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
    path = folder / expand_home(name)
    if not path.is_file() and name in recipe_names():
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
        elif isinstance(schema[key], ListConfig) and not isinstance(given[key], ListConfig):
            item = "..., ..." if isinstance(given[key], DictConfig) else _one_line(given[key] or "...")
            raise UserError(f"setting {full} is a list; give it as [{item}]")


def _sources_from_strings(given: DictConfig) -> None:
    """`data.train: [chats.jsonl]` means `[{path: chats.jsonl}]`."""
    for key in ("train", "heldout"):
        if isinstance(sources := given.get("data", {}).get(key), ListConfig):
            given.data[key] = [{"path": source} if isinstance(source, str) else source for source in sources]


def _check(recipe: Recipe) -> None:
    for section in fields(recipe):
        check_values(getattr(recipe, section.name), section.name)
    recipe.data.check()
    recipe.loss.check()
    if 0 < recipe.draft.window < recipe.loss.ttt_length:
        raise UserError(
            f"setting draft.window is {recipe.draft.window}; 0, or at least loss.ttt_length ({recipe.loss.ttt_length}) "
            "is expected: a draft sees those before it"
        )
    if recipe.xla.draft_data_parallel and recipe.train.batch_size % recipe.xla.tp:
        raise UserError(
            f"setting xla.draft_data_parallel deals the rows of a replica to its {recipe.xla.tp} devices; "
            f"train.batch_size is {recipe.train.batch_size}, no multiple of xla.tp"
        )
