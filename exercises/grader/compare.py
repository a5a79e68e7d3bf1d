"""An answer's results beside the expected ones; the first thing that is wrong.

The order is fixed, from what is most basic: placeholder or None, number of results,
kind of number, shape, finiteness, values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-13  # what float64 leaves of a zero
MANY = 4  # with more results than this, all are listed
SMALL = 24  # numbers of an array that is printed whole
KINDS = {"b": "truth values", "O": "objects", "c": "complex numbers", "U": "text"}


class ByName(dict):
    """Results that a check's ``call`` has put under their names."""


class WithGradients(ByName):
    """An answer's results, and behind them what autograd found of it."""


class WrongForm(Exception):
    """What came back cannot be taken apart; the message is for the learner."""


@dataclass(frozen=True)
class Tolerance:
    """Relative to each number, and to the largest number of the array."""

    rtol: float
    atol: float
    exact_zeros: bool = False
    joint: bool = False

    def agree(
        self, yours: np.ndarray, expected: np.ndarray, scale: float | None = None
    ) -> np.ndarray:
        """Entry by entry, infinities by sign and NaN with NaN."""
        scale = largest(expected) if scale is None else scale
        atol = self.atol * scale + ROUNDING
        good = np.isclose(yours, expected, self.rtol, atol, equal_nan=True)
        if self.exact_zeros:
            good &= (expected != 0) | (yours == 0)
        return good


def largest(array: np.ndarray) -> float:
    """The largest finite magnitude, 0 if there is none."""
    finite = np.abs(array[np.isfinite(array)])
    return float(finite.max()) if finite.size else 0.0


def as_tuple(value: object, names: Sequence[str]) -> tuple | None:
    """The results one by one, or None where their number or names are not right."""
    if isinstance(value, ByName):
        found = [value[name] for name in names] if set(value) == set(names) else []
    elif len(names) == 1:
        found = [] if isinstance(value, tuple | dict) else [value]
    elif isinstance(value, tuple | list) or np.ndim(value):
        found = list(value)
    else:
        found = []
    return tuple(found) if len(found) == len(names) else None


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
    table = [
        (name, yours, np.asarray(right))
        for name, yours, right in zip(known_as, results, expected, strict=True)
    ]
    for check in (_placeholder, _kind):
        for name, yours, right in table:
            if said := check(name, yours, right):
                return said
    for name, yours, right in table:
        if said := _shape(name, np.asarray(yours), right):
            for other, theirs, its in table:  # of the right shape: not exchanged
                if its.shape == np.shape(yours) != np.shape(theirs):
                    return f"{said} That is the shape of {other}: exchanged?"
            return said
    for name, yours, right in table:
        if said := _finite(name, np.asarray(yours), right):
            return said
    scale = max(largest(right) for *_, right in table) if tolerance.joint else None
    said = [_values(n, np.asarray(y), r, tolerance, scale) for n, y, r in table]
    first = next(filter(None, said), None)
    if first and len(table) > MANY:
        right = [
            name for (name, *_), fault in zip(table, said, strict=True) if not fault
        ]
        wrong = [name for (name, *_), fault in zip(table, said, strict=True) if fault]
        headline, _, rest = first.partition("\n")
        lists = f"right: {', '.join(right) or 'none'}\nwrong: {', '.join(wrong)}"
        return f"{headline}\n{lists}" + f"\n{rest}" * bool(rest)
    return first


def same(value: object, other: object, names: Sequence[str], tol: Tolerance) -> bool:
    """Whether two return values are alike in everything that `fault` looks at."""
    if value is ... or value is None or other is ... or other is None:
        return value is other
    mine, theirs = as_tuple(value, names), as_tuple(other, names)
    if mine is None or theirs is None:
        return mine is theirs
    pairs = [(_array(a), _array(b)) for a, b in zip(mine, theirs, strict=True)]
    for one, two in pairs:
        if one is None or two is None or one.shape != two.shape:
            return False
        if not (one.dtype.kind in "fiu" and two.dtype.kind in "fiu"):
            return False
    scale = max(largest(two) for _, two in pairs) if tol.joint else None
    return all(tol.agree(one, two, scale).all() for one, two in pairs)


def shown(array: object) -> str:
    """An array as it is printed: four digits, and no more than six lines."""
    array = np.asarray(array)
    if array.ndim == 0:
        return f"{array[()]:.6g}" if array.dtype.kind in "fiu" else str(array[()])
    whole = array.dtype.kind not in "f" or largest(array) > 1e-3
    text = np.array2string(
        array + 0.0 if array.dtype.kind == "f" else array,  # no -0.
        precision=4, suppress_small=whole, threshold=SMALL,
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
    if isinstance(value, ByName):
        missing = [name for name in names if name not in value]
        extra = [str(key) for key in value if key not in names]
        said = [f"{', '.join(missing)} missing"] * bool(missing)
        said += [f"{', '.join(extra)} not asked for"] * bool(extra)
        return f"Your dictionary does not have the right keys: {'; '.join(said)}."
    found = "one value"
    if isinstance(value, tuple | list):
        found = f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, dict):
        found = "a dictionary"
    wanted = f"{len(names)}: ({', '.join(names)})" if len(names) > 1 else "one array"
    comma = len(names) == 1 and isinstance(value, tuple) and len(value) == 1
    return f"Your function returns {found}; expected {wanted}." + (
        " A comma behind the value makes it a tuple." * comma
    )


def _placeholder(name: str, yours: object, expected: np.ndarray) -> str | None:
    if yours is ... or yours is None:
        return f"{name} is {'None' if yours is None else 'still the placeholder ...'}."
    return None


def _kind(name: str, yours: object, expected: np.ndarray) -> str | None:
    if isinstance(yours, list | tuple):
        return f"{name} is a {type(yours).__name__}; expected an array."
    array = np.asarray(yours)
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


def _shape(name: str, yours: np.ndarray, expected: np.ndarray) -> str | None:
    if yours.shape == expected.shape:
        return None
    said = f"{name} has shape {yours.shape}, expected {expected.shape}."
    if expected.ndim > 1 and yours.shape == expected.shape[::-1]:
        return said + " Is it transposed?"
    if yours.squeeze().shape == expected.squeeze().shape:
        return said + " An axis of length 1 makes the difference (keepdims?)."
    if yours.shape == ():
        return said + " Did a sum take all axes?"
    if yours.ndim == expected.ndim + 1:
        return said + " Is a sum over one axis missing?"
    return said


def _finite(name: str, yours: np.ndarray, expected: np.ndarray) -> str | None:
    bad = ~np.isfinite(yours) & np.isfinite(expected)
    if not bad.any():
        return None
    i = tuple(int(n) for n in np.argwhere(bad)[0])
    place = f"{name}{list(i)}" if i else name
    return f"{place} is {yours[i]}, expected {expected[i]:.4g}."


def _values(
    name: str,
    yours: np.ndarray,
    expected: np.ndarray,
    tolerance: Tolerance,
    scale: float | None,
) -> str | None:
    good = tolerance.agree(yours, expected, scale)
    if good.all():
        return None
    said = f"{name}: {_pattern(yours, expected, good, tolerance)}"
    if tolerance.exact_zeros and (good | (expected == 0)).all():
        said = f"{name}: what should be exactly 0 is not"
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
    factor = np.median(yours[big] / expected[big]) if big.any() else np.nan
    if np.isfinite(factor) and factor and tol.agree(yours, factor * expected).all():
        return f"every number is {factor:.4g} times the expected one"
    offset = np.median(yours - expected)
    if np.isfinite(offset) and tol.agree(yours, expected + offset).all():
        return f"every number is off by the same {offset:.4g}"
    return bad
