"""An answer's results beside the expected ones; the first thing that is wrong.

The order is fixed, from what is most basic: placeholder or None, number of results,
kind of number, shape, finiteness, values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number

import numpy as np

SMALL = 24  # numbers of an array that is printed whole
KINDS = {"b": "truth values", "O": "objects", "c": "complex numbers", "U": "text"}


@dataclass(frozen=True)
class Tolerance:
    """Relative to each number, and to the largest number of the array."""

    rtol: float
    atol: float

    def agree(self, yours: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Entry by entry, infinities by sign and NaN with NaN."""
        finite = expected[np.isfinite(expected)]
        largest = np.abs(finite).max() if finite.size else 0.0
        return np.isclose(
            yours, expected, self.rtol, self.atol * largest, equal_nan=True
        )


def as_tuple(value: object, names: Sequence[str]) -> tuple | None:
    """The results one by one, or None where their number or names are not right."""
    if isinstance(value, dict):
        value = [value[name] for name in names] if set(value) == set(names) else []
    elif len(names) == 1 and not isinstance(value, tuple):
        value = [value]
    if isinstance(value, tuple | list) and len(value) == len(names):
        return tuple(value)
    return None


def fault(
    value: object, expected: tuple, names: Sequence[str], tolerance: Tolerance
) -> str | None:
    """What is wrong with an answer's return value, in words; None if nothing is."""
    if value is ... or value is None:
        return _nothing(value)
    results = as_tuple(value, names)
    if results is None:
        return _wrong_number(value, names)
    known_as = names if len(names) > 1 else ("The result",)
    for check in (_placeholder, _kind, _shape, _finite):
        for name, yours, right in zip(known_as, results, expected, strict=True):
            if said := check(name, yours, np.asarray(right)):
                return said
    for name, yours, right in zip(known_as, results, expected, strict=True):
        if said := _values(name, np.asarray(yours), np.asarray(right), tolerance):
            return said
    return None


def same(value: object, other: object, names: Sequence[str], tol: Tolerance) -> bool:
    """Whether two return values are alike in everything that `fault` looks at."""
    if value is ... or value is None or other is ... or other is None:
        return value is other
    mine, theirs = as_tuple(value, names), as_tuple(other, names)
    if mine is None or theirs is None:
        return mine is theirs
    for one, two in zip(mine, theirs, strict=True):
        one, two = _array(one), _array(two)
        if one is None or two is None or one.shape != two.shape:
            return False
        if not (one.dtype.kind in "fiu" and two.dtype.kind in "fiu"):
            return False
        if not tol.agree(one, two).all():
            return False
    return True


def shown(array: object) -> str:
    """An array as it is printed: four digits, and no more than six lines."""
    text = np.array2string(
        np.asarray(array), precision=4, suppress_small=True, threshold=SMALL,
        edgeitems=2, max_line_width=66,
    )  # fmt: skip
    lines = text.splitlines()
    return "\n".join(lines[:6] + ["..."] * (len(lines) > 6))


def beside(yours: np.ndarray, expected: np.ndarray) -> str:
    """The two, one under the other and with the same indent."""
    pad = "\n" + " " * 10
    return (
        f"yours     {shown(yours).replace(chr(10), pad)}\n"
        f"expected  {shown(expected).replace(chr(10), pad)}"
    )


def _array(value: object) -> np.ndarray | None:
    try:
        return np.asarray(value)
    except ValueError:  # ragged
        return None


def _nothing(value: object) -> str:
    if value is None:
        return "Your function returns None. Does every path end in a return?"
    return "Your function returns ..., the placeholder."


def _wrong_number(value: object, names: Sequence[str]) -> str:
    if isinstance(value, dict):
        missing = [name for name in names if name not in value]
        extra = [str(key) for key in value if key not in names]
        said = [f"{', '.join(missing)} missing"] * bool(missing)
        said += [f"{', '.join(extra)} not asked for"] * bool(extra)
        return f"Your dictionary does not have the right keys: {'; '.join(said)}."
    found = "one value"
    if isinstance(value, tuple | list):
        found = f"a {type(value).__name__} of {len(value)}"
    wanted = f"{len(names)}: ({', '.join(names)})" if len(names) > 1 else "one array"
    return f"Your function returns {found}; expected {wanted}."


def _placeholder(name: str, yours: object, expected: np.ndarray) -> str | None:
    if yours is ... or yours is None:
        return f"{name} is {'None' if yours is None else 'still the placeholder ...'}."
    return None


def _kind(name: str, yours: object, expected: np.ndarray) -> str | None:
    array = _array(yours)
    if array is None:
        return f"{name} is a list of unequal rows; expected an array."
    whole_expected = expected.dtype.kind in "iu"
    if array.dtype.kind in "iu" and not whole_expected:
        return f"{name} holds whole numbers ({array.dtype}); expected floats."
    if array.dtype.kind == "b" and expected.dtype.kind == "b":
        return None
    if array.dtype.kind not in "fiu":
        what = KINDS.get(array.dtype.kind, str(array.dtype))
        if array.dtype.kind == "O" and not isinstance(yours, np.ndarray):
            what = f"a {type(yours).__name__}"
        return f"{name} holds {what}; expected numbers of type {expected.dtype}."
    if array.dtype == np.float16 and expected.dtype != np.float16:
        return f"{name} is float16, three digits; keep float32 or better."
    return None


def _shape(name: str, yours: object, expected: np.ndarray) -> str | None:
    array = np.asarray(yours)
    if array.shape == expected.shape:
        return None
    said = f"{name} has shape {array.shape}, expected {expected.shape}."
    if expected.ndim > 1 and array.shape == expected.shape[::-1]:
        return said + " Is it transposed?"
    if array.squeeze().shape == expected.squeeze().shape:
        return said + " An axis of length 1 makes the difference (keepdims?)."
    if isinstance(yours, Number) or array.shape == ():
        return said + " Did a sum take all axes?"
    return said


def _finite(name: str, yours: object, expected: np.ndarray) -> str | None:
    array = np.asarray(yours)
    bad = ~np.isfinite(array) & np.isfinite(expected)
    if not bad.any():
        return None
    i = tuple(int(n) for n in np.argwhere(bad)[0])
    place = f"{name}{list(i)}" if i else name
    return f"{place} is {array[i]}, expected {expected[i]:.4g}."


def _values(
    name: str, yours: np.ndarray, expected: np.ndarray, tolerance: Tolerance
) -> str | None:
    good = tolerance.agree(yours, expected)
    if good.all():
        return None
    said = f"{name}: {_pattern(yours, expected, good, tolerance)}"
    if expected.size <= SMALL:
        return f"{said}\n{beside(yours, expected)}"
    gap = np.where(good, 0, np.abs(np.nan_to_num(yours - expected, nan=np.inf)))
    i = tuple(int(n) for n in np.unravel_index(gap.argmax(), gap.shape))
    return f"{said}\nat {list(i)}: yours {yours[i]:.6g}, expected {expected[i]:.6g}"


def _pattern(
    yours: np.ndarray, expected: np.ndarray, good: np.ndarray, tol: Tolerance
) -> str:
    """How the wrong numbers are related to the right ones, if they are at all."""
    bad = f"{(~good).sum()} of {good.size} numbers differ"
    if good.size < 2:
        return "the number differs"
    if tol.agree(yours, -expected).all():
        return "every number has the opposite sign"
    square = yours.ndim > 1 and yours.shape == expected.T.shape
    if square and tol.agree(yours, expected.T).all():
        return "the numbers are right but transposed"
    big = np.abs(expected) > 1e-3 * np.abs(expected).max()
    factor = np.median(yours[big] / expected[big])
    if np.isfinite(factor) and factor and tol.agree(yours, factor * expected).all():
        return f"every number is {factor:.4g} times the expected one"
    offset = np.median(yours - expected)
    if np.isfinite(offset) and tol.agree(yours, expected + offset).all():
        return f"every number is off by the same {offset:.4g}"
    return bad
