"""What every setting means: the comments at the fields of the settings, for `config --show` and the documentation."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from importlib import resources
from itertools import takewhile
from typing import Any, NamedTuple

from eagle3_xla.config import Recipe, load_recipe, recipe_names
from eagle3_xla.data.config import Source
from eagle3_xla.errors import UserError
from eagle3_xla.settings import allowed


class Setting(NamedTuple):
    """name: section.key; allowed: its choices or interval, "" for any; meaning: the comment at its field."""

    name: str
    kind: str
    default: object
    allowed: str
    meaning: str


def settings() -> list[Setting]:
    """Every setting of a recipe, in the order of its sections and their fields."""
    sections = {section.name: type(getattr(Recipe(), section.name)) for section in dataclasses.fields(Recipe)}
    return [found for name, kind in sections.items() for found in _settings_of(kind, f"{name}.")]


def source_settings() -> list[Setting]:
    """The fields of a source in data.train or data.heldout."""
    return _settings_of(Source, "")


def _settings_of(section: type, prefix: str) -> list[Setting]:
    comments, plain, found = _comments(section), section(), []
    for field in dataclasses.fields(section):
        default = getattr(plain, field.name)
        kind = re.sub(r"\w+\.", "", inspect.formatannotation(field.type))
        found.append(Setting(prefix + field.name, kind, default, allowed(field), comments[field.name]))
    return found


def _comments(section: type) -> dict[str, str]:
    """Field -> the comment on the lines directly above it and on its own."""
    source = inspect.getsource(section)
    lines = source.splitlines()
    words = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            found[ast.unparse(node.target)] = " ".join(
                words[i] for i in range(first, (node.end_lineno or 0) + 1) if i in words
            )
    return found


def recipes() -> dict[str, str]:
    """Shipped recipe -> the comment that its file begins with."""
    folder = resources.files("eagle3_xla.recipes")
    return {name: _heading((folder / f"{name}.yaml").read_text()) for name in recipe_names()}


def _heading(text: str) -> str:
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment)


def values(recipe: Recipe) -> dict[str, Any]:
    """section.key -> its resolved value; a source is a mapping of what differs from its defaults."""
    flat: dict[str, Any] = {}
    for section, fields in dataclasses.asdict(recipe).items():
        flat |= {f"{section}.{key}": value for key, value in fields.items()}
    plain = dataclasses.asdict(Source())
    for name in ("data.train", "data.heldout"):
        flat[name] = [{key: x for key, x in source.items() if x != plain[key]} for source in flat[name]]
    return flat


def list_recipes() -> dict:
    """`config` alone."""
    found = recipes()
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in found.items()]
    return {"recipes": found, "screen": "\n".join(lines)}


def show(name: str, overrides: list[str]) -> dict:
    """`config --show`: the resolved settings, as YAML that `--config` reads, with what each means."""
    from omegaconf import OmegaConf

    flat = values(load_recipe(name, overrides))
    lines, section = [], ""
    for setting in settings():
        here, key = setting.name.split(".")
        lines += [f"{here}:"] if here != section else []
        section = here
        value = flat[setting.name]
        text = OmegaConf.to_yaml(OmegaConf.create({key: value})).rstrip().replace("\n", "\n  ")
        about = setting.meaning
        if setting.allowed:
            about += f"; {setting.allowed}" if " | " in setting.allowed else f"; in {setting.allowed}"
        if value != setting.default:
            about += f"; default: {_short(setting.default)}"
        lines += [f"  # {about}", f"  {text}"]
    return {"recipe": name, "settings": flat, "screen": "\n".join(lines)}


def difference(names: list[str], overrides: list[str]) -> dict:
    """`config --diff A B`: every setting in which two recipes differ, as [A's, B's]."""
    if names[0] == names[1]:
        raise UserError(f"--diff {names[0]} {names[1]}: two recipes are expected")
    first, second = (values(load_recipe(name, overrides)) for name in names)
    differing = {name: [first[name], second[name]] for name in first if first[name] != second[name]}
    width = max(map(len, differing), default=0)
    lines = [f"{name:<{width}}  {_short(a)} -> {_short(b)}" for name, (a, b) in differing.items()]
    return {"recipes": names, "differences": differing, "screen": "\n".join(lines) or "no difference"}


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
