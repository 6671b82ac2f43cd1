"""What a setting may be, said at its field, and the check of it.

Each package has its settings in a `config.py` of its own, a dataclass; config.py puts them together as a recipe.
"""

import dataclasses
import math
from typing import Any

from eagle3_xla.errors import UserError

AMONG, WITHIN, FREE = "among", "within", "free"  # keys of a field's metadata
STORABLE = 2**63  # whole numbers below it fit everywhere


def setting(default: Any, *, among: tuple[str, ...] = (), within: str = "", free: bool = False) -> Any:
    """The field of a setting that is one of `among`, or lies within an interval.

    within: as in mathematics, "[0, 1)": `[` and `]` belong to it, `(` and `)` don't; free: no row and no weight
    depends on its value (a path: what lies there is compared instead), so that what was begun with one value goes on
    with another. A plain field is a setting whose value is only of its type, finite and storable, and not free.
    """
    return dataclasses.field(default=default, metadata={AMONG: among, WITHIN: within, FREE: free})


def allowed(field: dataclasses.Field) -> str:
    """What a setting may be, "a | b" or "[0, 1)"; "" for anything of its type."""
    return " | ".join(field.metadata.get(AMONG, ())) or field.metadata.get(WITHIN, "")


def binding(values: Any) -> dict[str, Any]:
    """Name -> value of the settings that rows or weights depend on, of a dataclass; what it holds as dictionaries."""
    free = {field.name for field in dataclasses.fields(values) if field.metadata.get(FREE)}
    return {name: value for name, value in dataclasses.asdict(values).items() if name not in free}


def check_values(values: Any, section: str) -> None:
    """Raises UserError for the first setting of a dataclass that may not be what it is, in dataclasses in it too.

    values: an instance; section: its name in messages, `train` for `train.lr`.
    """
    for field in dataclasses.fields(values):
        name, value = f"{section}.{field.name}", getattr(values, field.name)
        among, within = field.metadata.get(AMONG), field.metadata.get(WITHIN)
        _check_storable(name, value)
        if among and value not in among:
            raise UserError(f"setting {name} is {value!r}; choose one of {', '.join(among)}")
        if within:
            _check_range(name, value, within)


def _check_storable(name: str, value: object) -> None:
    """Every number is finite and fits 64 bits, text is UTF-8 without NUL."""
    if dataclasses.is_dataclass(value):
        check_values(value, name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_storable(f"{name}[{number}]", item)
    elif isinstance(value, str):
        if "\0" in value or value.encode(errors="ignore").decode() != value:
            raise UserError(f"setting {name} is {value!r}; text in UTF-8 without NUL is expected")
    elif isinstance(value, int | float) and not (-STORABLE <= value < STORABLE and math.isfinite(value)):
        raise UserError(f"setting {name} is {value!r:.60}; a finite number is expected, whole ones below 2**63")


def _check_range(name: str, value: float, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    if not above or not (value < high if interval[-1] == ")" else value <= high):
        wanted = f"in {interval}" if high < math.inf else f"{'more than' if interval[0] == '(' else 'at least'} {low:g}"
        raise UserError(f"setting {name} is {value}; it must be {wanted}")
