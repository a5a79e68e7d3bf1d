"""A kernel written against Numba's ``cuda``, made to see the simulator's.

The kernel's module is not touched: the kernel and the device functions that it calls
are copied with a scope of their own, in which Numba's module is replaced.
"""

import contextlib
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

Made = dict[FunctionType, FunctionType]


def rebound(thing: Any, cuda: Any, made: Made | None = None) -> Any:
    """``thing`` as simulated code shall see it.

    Numba's cuda module becomes ``cuda``, a function (or what has one in ``.py_func``) a
    copy that sees only rebound things, and everything else stays what it is.
    """
    made = {} if made is None else made
    if isinstance(thing, ModuleType):
        return cuda if f".{thing.__name__}".endswith(".numba.cuda") else thing
    function = getattr(thing, "py_func", thing)
    if not isinstance(function, FunctionType):
        return thing
    if function not in made:
        _copy(function, cuda, made)
    return made[function]


def _copy(function: FunctionType, cuda: Any, made: Made) -> None:
    """Copy a function, and enter the copy in ``made`` first: it may call itself."""
    old_cells = function.__closure__ or ()
    cells = tuple(CellType() for _ in old_cells)
    old = function.__globals__
    scope = {name: old[name] for name in ("__builtins__", "__name__") if name in old}
    copy = made[function] = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    for name in _names(function.__code__) & old.keys():
        scope[name] = rebound(old[name], cuda, made)
    for cell, old_cell in zip(cells, old_cells, strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            cell.cell_contents = rebound(old_cell.cell_contents, cuda, made)


def _names(code: CodeType) -> set[str]:
    """Names of everything global that a function may use, in its inner ones too."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)
