"""What the numbers of a frozen dataclass must be, checked from its annotations."""

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import NoReturn


class ConfigError(ValueError):
    """A value that no model can have. The message names field, value and remedy."""


def refuse(field: str, value: object, allowed: str) -> NoReturn:
    """Raise `ConfigError`: the field, its value and what is allowed."""
    raise ConfigError(f"{field} = {value!r}: must be {allowed}")


def check_numbers(
    obj: object, least: Mapping[str, int], above: Mapping[str, float], where: str = ""
) -> None:
    """Check every int and float field of a dataclass, and store Python's own numbers.

    A whole number is at least ``least[name]``, or 1; any other is finite and more than
    ``above[name]``, or at least 0. True is no number, 2.0 is no whole one, NumPy's are
    taken. None is allowed where it is the default. Raises `ConfigError`.
    """
    for field in fields(obj):
        name, value = field.name, getattr(obj, field.name)
        if value is None and field.default is None:
            continue
        if field.type in (int, int | None):
            number = _whole(where + name, value, least.get(name, 1))
        elif field.type is float:
            number = _real(where + name, value, above.get(name))
        else:
            continue
        object.__setattr__(obj, name, number)


def _whole(field: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        refuse(field, value, f"a whole number, at least {least}")
    if value < least:
        refuse(field, value, f"at least {least}")
    return int(value)


def _real(field: str, value: object, above: float | None) -> float:
    allowed = "at least 0" if above is None else f"more than {above}"
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(field, value, f"a number, {allowed}")
    in_range = value >= 0 if above is None else value > above
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not (in_range and math.isfinite(number)):
        refuse(field, value, f"finite and {allowed}")
    return number
