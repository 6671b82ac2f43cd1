"""What comes from outside, checked before anything relies on it: JSON files, their fields, and text for a terminal."""

import html
import json
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

from eagle3_xla import storage
from eagle3_xla.errors import UserError

MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~])")
LONGEST_SHOWN = 60  # characters of a foreign value in a message
LARGEST = 1 << 24  # size of a model: far beyond any, and far below what no memory holds


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises UserError when there is none."""
    file = Path(file)
    try:
        content = parse_json(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object but {shown(content)}")
    return content


def parse_json(text: str, where: str) -> Any:
    """Any JSON value. Raises UserError when the text is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
        raise UserError(f"{where} is not readable JSON: {type(error).__name__}") from None


def number(
    value: Any, where: str, least: float = -math.inf, most: float = math.inf, whole: bool = False, above: bool = False
) -> Any:
    """`value` if it is a finite number from `least` (`above`: greater than it) to `most`; whole: an int.

    where: FILE: FIELD, as the message names it. Raises UserError.
    """
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    fits = fits and (isinstance(value, int) or math.isfinite(value))
    if fits and (value > least if above else value >= least) and value <= most:
        return value
    raise UserError(f"{where} is {shown(value)}; {expected(least, most, whole, above)} is expected")


def expected(least: float, most: float, whole: bool, above: bool) -> str:
    words = "a whole number" if whole else "a number"
    if math.isfinite(least):
        words += f" above {least:g}" if above else f" from {least:g}"
    if math.isfinite(most):
        words += f" to {most:g}" if math.isfinite(least) and not above else f" up to {most:g}"
    return words


def config_fields(config: dict, where: str, sizes: Collection[str], mappings: Collection[str]) -> None:
    """Raises UserError for a field of a model's config.json that has another type; null is none. sizes, mappings:
    fields that are such."""
    for name, value in config.items():
        if value is None:
            continue
        if name in sizes:
            number(value, f"{where}: {name}", 1, LARGEST, whole=True)
        elif name in ("rope_theta", "rms_norm_eps"):
            number(value, f"{where}: {name}", 0, above=True)
        elif name in mappings:
            mapping(value, f"{where}: {name}")


def text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{where} is {shown(value)}; a text is expected")


def mapping(value: object, where: str) -> dict:
    if isinstance(value, dict):
        return value
    raise UserError(f"{where} is {shown(value)}; a mapping is expected")


def listing(value: object, where: str) -> list:
    if isinstance(value, list):
        return value
    raise UserError(f"{where} is {shown(value)}; a list is expected")


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """All of its message; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def of_this_machine(folder: str | Path, option: str) -> Path:
    """Raises UserError for a URL, of which a Path would make the name of a folder here."""
    if storage.is_url(folder):
        raise UserError(f"{option} {folder}: a folder of this machine is expected")
    return Path(folder)


def shown(value: object) -> str:
    """A foreign value in a message: short, on one line. None is JSON's null."""
    words = "null" if value is None else repr(value)
    return words if len(words) <= LONGEST_SHOWN else f"{words[:LONGEST_SHOWN]}..."


def printable(words: str) -> str:
    """Nothing that a file or a server wrote may drive the terminal: control characters are shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in words)


def in_colour(stream: TextIO | None) -> bool:
    """Whether it is a terminal whose user wants colours (no-color.org)."""
    return stream is not None and stream.isatty() and "NO_COLOR" not in os.environ


def escaped(words: str) -> str:
    """Text of anyone's, harmless in Markdown and HTML, on one line."""
    return html.escape(MARKDOWN.sub(r"\\\1", printable(" ".join(words.split()))), quote=False)


def without_credentials(words: str) -> str:
    """URLs without their user and password."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", words)
