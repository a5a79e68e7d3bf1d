"""A kernel made to see another world: the simulator's ``cuda``, or the compiler's.

The kernel's module is not touched: the kernel and the device functions that it calls
are copied with a scope of their own, in which some things are replaced.
"""

import contextlib
from collections.abc import Callable
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

Made = dict[FunctionType, Any]
Seen = Callable[[Any], Any]


def numbas(cuda: Any) -> Seen:
    """Replaces Numba's cuda module by another cuda."""

    def seen(thing: Any) -> Any:
        if isinstance(thing, ModuleType):
            return cuda if f".{thing.__name__}".endswith(".numba.cuda") else None
        return None

    return seen


def rebound(
    thing: Any,
    seen: Seen,
    made: Made | None = None,
    device: Callable[[FunctionType], Any] = lambda function: function,
) -> Any:
    """``thing`` as the copy of a kernel shall see it.

    What ``seen`` has a replacement for, is replaced; a function (or what has one in
    ``.py_func``) becomes a copy that sees only rebound things, wrapped by ``device`` if
    it is not the kernel itself; everything else stays what it is.
    """
    outermost = made is None
    made = {} if made is None else made
    replacement = seen(thing)
    if replacement is not None:
        return replacement
    function = getattr(thing, "py_func", thing)
    if not isinstance(function, FunctionType):
        return thing
    if function not in made:
        wrap = (lambda copy: copy) if outermost else device
        _copy(function, seen, made, wrap, device)
    return made[function]


def _copy(
    function: FunctionType, seen: Seen, made: Made, wrap: Callable, device: Callable
) -> None:
    """Copy a function, and enter the copy in ``made`` first: it may call itself."""
    old_cells = function.__closure__ or ()
    cells = tuple(CellType() for _ in old_cells)
    old = function.__globals__
    scope = {name: old[name] for name in ("__builtins__", "__name__") if name in old}
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = function.__module__
    made[function] = wrap(copy)
    for name in _names(function.__code__) & old.keys():
        scope[name] = rebound(old[name], seen, made, device)
    for cell, old_cell in zip(cells, old_cells, strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            cell.cell_contents = rebound(old_cell.cell_contents, seen, made, device)


def _names(code: CodeType) -> set[str]:
    """Names of everything global that a function may use, in its inner ones too."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)
