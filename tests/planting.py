"""Mistakes planted in the library's source, to see whether the tests notice."""

import inspect
import sys
from types import ModuleType

import pytest


def changed(module: ModuleType, *lines: tuple[str, str]) -> dict:
    """What a module would hold with other lines."""
    source = inspect.getsource(module)
    for old, new in lines:
        assert source.count(old) == 1, f"{old!r} stands there {source.count(old)} times"
        source = source.replace(old, new)
    wrong = dict(vars(module))
    exec(compile(source, module.__file__, "exec"), wrong)
    return wrong


def plant(patch: pytest.MonkeyPatch, module: ModuleType, *lines: tuple[str, str]):
    """Change lines of a module, and everyone who has imported its functions.

    A port's classes are changed too: modules made from now on have the mistake.
    """
    wrong = changed(module, *lines)
    port = module.__name__.endswith("torch_port")
    right = {
        id(value): name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or (port and inspect.isclass(value)))
        and value.__module__ == module.__name__
    }
    ours = [m for n, m in sys.modules.items() if n.startswith(("minidsv3", "tests"))]
    for other in ours:
        for name, value in list(vars(other).items()):
            if id(value) in right:
                patch.setattr(other, name, wrong[right[id(value)]])


def plant_methods(patch: pytest.MonkeyPatch, module: ModuleType, *lines):
    """Change the methods of a module's classes where they are: their heirs follow."""
    wrong = changed(module, *lines)
    for name, right in list(vars(module).items()):
        if not inspect.isclass(right) or right.__module__ != module.__name__:
            continue
        for attribute, value in vars(wrong[name]).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(function):
                for cell in function.__closure__ or ():
                    if cell.cell_contents is wrong[name]:
                        cell.cell_contents = right  # super() asks it
                patch.setattr(right, attribute, value)
        wrong[name] = right


def plant_loops(patch: pytest.MonkeyPatch, module: ModuleType, *lines):
    """The compiled functions of a module as plain Python, with other lines.

    Instructions that only the compiler can write do nothing.
    """
    with patch.context() as uncompiled:
        uncompiled.setattr(module.numba, "njit", lambda **how: lambda f: f)
        nothing = lambda *given: None  # noqa: E731
        uncompiled.setattr(module.numba.extending, "intrinsic", lambda f: nothing)
        wrong = changed(module, *lines)
    for name, function in wrong.items():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            patch.setattr(module, name, function)


def changed_in(module: ModuleType, name: str, *lines: tuple[str, str]) -> dict:
    """What a module would hold with other lines in one of its functions.

    Functions of the module see the changed one, for they are all made anew.
    """
    source = old = inspect.getsource(getattr(module, name))
    for right, wrong in lines:
        assert source.count(right) == 1, f"{right!r}: {source.count(right)} in {name}"
        source = source.replace(right, wrong)
    return changed(module, (old, source))
