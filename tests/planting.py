"""Mistakes planted in the library's source, to see whether the tests notice."""

import inspect
import sys
from types import ModuleType

import pytest


def plant(patch: pytest.MonkeyPatch, module: ModuleType, *lines: tuple[str, str]):
    """Change lines of a module, and everyone who has imported its functions.

    A port's classes are changed too: modules made from now on have the mistake.
    """
    source = inspect.getsource(module)
    for old, new in lines:
        assert source.count(old) == 1, f"{old!r} stands there {source.count(old)} times"
        source = source.replace(old, new)
    wrong = dict(vars(module))
    exec(compile(source, module.__file__, "exec"), wrong)
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
