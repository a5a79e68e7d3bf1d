"""The house's rules hold here, and each check finds what it is for."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import layout

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("check", layout.CHECKS, ids=lambda check: check.__name__)
def test_this_tree(check) -> None:
    problems = check(ROOT)
    assert not problems, "\n".join([check.__doc__, *problems])


# --- small trees ------------------------------------------------------------------

PROJECT = """[project]
name = "minidsv3"
dependencies = ["numpy>=2", "safetensors"]
[project.optional-dependencies]
torch = ["torch"]
book = ["jupyter-book<2"]
"""
MAP = '''"""The map::

    model       numpy_ref · torch_port
    mla         numpy_ref · cuda_kernels
    mtp         numpy_ref
    gpu         launch
    config      sizes
    corpus      text
    __main__    the command line
"""
'''
GOOD = {
    "pyproject.toml": PROJECT,
    "minidsv3/__init__.py": MAP,
    "minidsv3/config.py": '"""Sizes."""\n',
    "minidsv3/corpus.py": '"""Text."""\nfrom minidsv3.config import X\n',
    "minidsv3/gpu/__init__.py": '"""Gpu."""\n',
    "minidsv3/gpu/launch.py": '"""Launch."""\nimport minidsv3.config\n',
    "minidsv3/mla/__init__.py": '"""Mla."""\n',
    "minidsv3/mla/numpy_ref.py": '"""Mla."""\nfrom minidsv3 import config\n',
    "minidsv3/mla/cuda_kernels.py": '"""Mla."""\nfrom minidsv3.gpu import launch\n',
    "minidsv3/mtp/__init__.py": '"""Mtp."""\n',
    "minidsv3/mtp/numpy_ref.py": '"""Mtp."""\n',
    "minidsv3/model/__init__.py": '"""Model."""\n',
    "minidsv3/model/numpy_ref.py": '"""Model."""\nfrom ..mla import numpy_ref\n',
    "minidsv3/model/torch_port.py": '"""Model."""\nfrom . import numpy_ref\n',
    "minidsv3/__main__.py": '"""Run."""\nfrom minidsv3.model import numpy_ref\n',
    "tests/__init__.py": "",
    "tests/test_x.py": '"""T."""\n',
}
GOOD["minidsv3/config.py"] += "X = 1\n"


def plant(root: Path, changes: dict[str, str | None]) -> Path:
    for name, text in {**GOOD, **changes}.items():
        if text is not None:
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", "-A"], check=True)
    return root


@pytest.mark.parametrize("check", layout.CHECKS, ids=lambda check: check.__name__)
def test_a_good_tree_has_no_problems(tmp_path, check) -> None:
    assert check(plant(tmp_path, {})) == []


def importing(line: str) -> str:
    return f'"""M."""\n\n\ndef f() -> None:\n    """F."""\n    {line}\n'


UPWARDS = [
    ("config.py", "import minidsv3.model.numpy_ref"),
    ("config.py", "from minidsv3 import mla"),
    ("config.py", "from . import mla"),
    ("corpus.py", "from .gpu import launch"),
    ("mla/numpy_ref.py", "from minidsv3.mtp import numpy_ref"),
    ("mla/numpy_ref.py", "from ..mtp.numpy_ref import f"),
    ("mla/numpy_ref.py", "from minidsv3.gpu import launch"),
    ("mla/numpy_ref.py", "from minidsv3 import model"),
    ("gpu/launch.py", "from minidsv3.mla import cuda_kernels"),
    ("model/numpy_ref.py", "from minidsv3 import __main__"),
    ("model/numpy_ref.py", "from minidsv3.training import numpy_ref"),
    ("training/numpy_ref.py", "from minidsv3.generation import numpy_ref"),
    ("generation/numpy_ref.py", "from minidsv3.training import numpy_ref"),
]


@pytest.mark.parametrize(("name", "line"), UPWARDS)
def test_imports_point_one_way(tmp_path, name, line) -> None:
    root = plant(tmp_path, {f"minidsv3/{name}": importing(line)})
    [problem] = layout.imports_upwards(root)
    assert problem.startswith(f"minidsv3/{name}:6: ")


LONG = "x = [\n" + "    1,\n" * 297 + "]\n"  # 299 lines
BODY = "    y = x + 1\n    z = y * y\n    return z\n"
OTHER = "    b = a + 1\n    c = b * b\n    return c\n"
COPY = f'"""M."""\n\n\ndef one(x: int) -> int:\n    """Say."""\n{BODY}'
NOTEBOOK = {"cells": [{"cell_type": "code", "outputs": [], "execution_count": None}]}
ANSWERED = {"cells": [{"cell_type": "code", "outputs": [{}], "execution_count": None}]}
COUNTED = {"cells": [{"cell_type": "code", "outputs": [], "execution_count": 3}]}
PROBLEMS = [
    ("unknown_rooms", {"minidsv3/attic/x.py": '"""A."""\n'}, "attic: on no floor"),
    (
        "heavy_imports",
        {"minidsv3/mla/numpy_ref.py": importing("import torch.nn")},
        "mla/numpy_ref.py:6: must not import torch.nn",
    ),
    (
        "heavy_imports",
        {"minidsv3/mla/numpy_ref.py": importing("from numba import cuda")},
        "must not import numba.cuda",
    ),
    (
        "heavy_imports",
        {"minidsv3/mla/numpy_ref.py": importing("from . import torch_port")},
        "must not import minidsv3.mla.torch_port",
    ),
    (
        "heavy_imports",
        {"minidsv3/model/torch_port.py": importing("import numba")},
        "model/torch_port.py:6: must not import numba",
    ),
    (
        "heavy_loads",
        {"minidsv3/__init__.py": MAP + "from minidsv3 import config\n"},
        "minidsv3/__init__.py: loads minidsv3.config",
    ),
    (
        "heavy_loads",  # by way of another module
        {
            "minidsv3/config.py": '"""C."""\nimport torch\nX = 1\n',
            "torch.py": '"""A small stand-in."""\n',
        },
        "minidsv3.mla.numpy_ref, minidsv3.model.numpy_ref, minidsv3.mtp.numpy_ref load",
    ),
    (
        "heavy_loads",
        {
            "minidsv3/model/torch_port.py": '"""C."""\nimport numba\n',
            "numba.py": '"""A small stand-in."""\n',
        },
        "torch_port: minidsv3.model.torch_port load numba",
    ),
    (
        "heavy_loads",
        {
            "minidsv3/gpu/warps.py": '"""W."""\nimport torch\n',
            "torch.py": '"""A small stand-in."""\n',
        },
        "gpu: minidsv3.gpu, minidsv3.gpu.warps load torch",
    ),
    (
        "heavy_loads",
        {
            "minidsv3/gpu/launch.py": '"""L."""\nimport numba\n',
            "numba.py": '"""A small stand-in."""\n',
        },
        "launch: minidsv3.gpu.launch load numba",
    ),
    (
        "heavy_imports",
        {"minidsv3/mla/cuda_kernels.py": importing("from minidsv3.gpu import ptx")},
        "mla/cuda_kernels.py:6: must not import minidsv3.gpu.ptx",
    ),
    (
        "heavy_imports",
        {"minidsv3/gpu/launch.py": importing("from minidsv3.gpu.ptx import exp2")},
        "gpu/launch.py:6: must not import minidsv3.gpu.ptx.exp2",
    ),
    ("shadows", {"minidsv3/numpy.py": '"""N."""\n'}, "minidsv3/numpy.py: hides the"),
    ("shadows", {"minidsv3/torch/x.py": '"""N."""\n'}, "minidsv3/torch/: hides the"),
    ("shadows", {"book/json.py": '"""N."""\n'}, "book/json.py: hides the package"),
    ("shadows", {"book/random/page.md": "# R\n"}, "book/random/: hides the package"),
    ("shadows", {"jupyter_book/x.py": '"""N."""\n'}, "jupyter_book/: hides the"),
    ("too_long", {"book/x.py": f"x = '{'y' * 83}'\n"}, "book/x.py:1: 89 columns, over"),
    ("too_long", {"tests/test_x.py": f"# {'y' * 87}\n"}, "x.py:1: 89 columns, over 88"),
    ("too_long", {"minidsv3/config.py": LONG + "y = 1\nz = 2\n"}, "301 lines of code"),
    (
        "too_long",
        {"tests/x.py": "def f():\n" + "    x = 1\n" * 60},
        "tests/x.py:1: f has 61 lines, over 60",
    ),
    (
        "too_long",
        {"tests/x.py": "def _f_body():\n" + "    x = 1\n" * 150},
        "tests/x.py:1: _f_body has 151 lines, over 150",
    ),
    ("empty_modules", {"minidsv3/gpu/x.py": "# to come\n\n"}, "gpu/x.py: empty"),
    ("empty_modules", {"tests/test_x.py": ""}, "tests/test_x.py: empty"),
    ("empty_modules", {"minidsv3/mtp/__init__.py": ""}, "mtp/__init__.py: empty"),
    ("undocumented", {"minidsv3/config.py": "X = 1\n"}, "config.py:1: the module has"),
    (
        "undocumented",
        {"minidsv3/config.py": '"""M."""\ndef f() -> None:\n    pass\n'},
        "config.py:2: f has no docstring",
    ),
    (
        "undocumented",
        {"minidsv3/config.py": '"""M."""\nclass A:\n    x = 1\n'},
        "config.py:2: A has no docstring",
    ),
    (
        "undocumented",
        {"minidsv3/config.py": '"""M."""\nclass A:\n    "A."\n    def f(): 1\n'},
        "config.py:4: A.f has no docstring",
    ),
    (
        "unannotated",
        {"minidsv3/config.py": 'def f(a, *b, c: int, **d) -> None:\n    "F."\n'},
        "config.py:1: f does not say the type of a, b, d",
    ),
    (
        "unannotated",
        {"minidsv3/config.py": "class A:\n    def __call__(self, x): 1\n"},
        "config.py:2: A.__call__ does not say the type of x, the result",
    ),
    (
        "duplicates",
        {"minidsv3/config.py": COPY, "minidsv3/mtp/numpy_ref.py": COPY},
        "mtp/numpy_ref.py:4: one is a copy of minidsv3/config.py:4: one",
    ),
    (
        "duplicates",  # under other names, and without its docstring
        {"minidsv3/config.py": f"{COPY}\n\ndef two(a):\n{OTHER}"},
        "config.py:11: two is a copy of minidsv3/config.py:4: one",
    ),
    ("untrue_map", {"minidsv3/fp8.py": '"""F."""\n'}, "the map does not name fp8"),
    ("untrue_map", {"minidsv3/corpus.py": None}, "names corpus, which does not exist"),
    (
        "untrue_map",
        {"minidsv3/mtp/torch_port.py": '"""T."""\n'},
        "the map does not name mtp/torch_port",
    ),
    (
        "untrue_map",
        {"minidsv3/model/torch_port.py": None},
        "the map invents model/torch_port",
    ),
    ("untrue_map", {"minidsv3/__init__.py": ""}, "the map does not name config"),
    (
        "untrue_map",
        {"minidsv3/__init__.py": MAP.replace("config ", "corpus ")},
        "the map names corpus twice",
    ),
    (
        "committed_outputs",
        {"exercises/a.ipynb": json.dumps(ANSWERED)},
        "exercises/a.ipynb: cell 0 has outputs",
    ),
    (
        "committed_outputs",
        {"exercises/a.ipynb": json.dumps(COUNTED)},
        "exercises/a.ipynb: cell 0 has outputs",
    ),
    ("committed_outputs", {"book/_build/x.html": "<p>"}, "made by a build, not to be"),
]
# Put together here, or this file would be the first to contain one.
PATHS = ["/" + "home/ada/x.py", "/" + "tmp/run", "C:\\" + "Users\\ada", "/" + "root/.x"]
PROBLEMS += [
    ("machine_paths", {"book/x.md": f"See `{path}`.\n"}, f"book/x.md:1: {path}")
    for path in PATHS
]


@pytest.mark.parametrize(("check", "changes", "message"), PROBLEMS)
def test_each_check_finds_what_it_is_for(tmp_path, check, changes, message) -> None:
    problems = getattr(layout, check)(plant(tmp_path, changes))
    assert any(message in problem for problem in problems), problems


ALLOWED = [
    ("too_long", {"minidsv3/config.py": f'"""A\n\nB."""\n\n# c\n{LONG}y = 1\n'}),
    ("too_long", {"tests/test_x.py": LONG + LONG}),
    ("too_long", {"book/x.py": f"x = '{'y' * 80}'  # noqa: X1\n"}),
    ("too_long", {"tests/x.py": "def f():\n" + "    x = 1\n\n    # c\n" * 59}),
    ("too_long", {"tests/x.py": "def _f_body():\n" + "    x = 1\n" * 149}),
    (
        "duplicates",
        {"minidsv3/config.py": f"def f(a, x):\n{BODY}\ndef g(a, x):\n{OTHER}"},
    ),
    ("duplicates", {"minidsv3/config.py": "def f():\n    g()\n    h()\n" * 2}),
    ("undocumented", {"minidsv3/config.py": '"""M."""\ndef _f():\n    pass\n'}),
    ("unannotated", {"minidsv3/config.py": "def _f(x):\n    pass\n"}),
    ("empty_modules", {"tests/benchmarks/__init__.py": ""}),
    ("committed_outputs", {"exercises/a.ipynb": json.dumps(NOTEBOOK)}),
    (
        "machine_paths",
        {"book/x.md": "https://x.org/home/ada /usr/bin ~/tmp/x a/root/b"},
    ),
]


MACHINE_SIDE = {
    "minidsv3/gpu/ptx.py": '"""P."""\nimport numba\n',
    "minidsv3/gpu/compile.py": importing("from minidsv3.gpu import ptx"),
    "numba.py": '"""A small stand-in."""\n',
}
ALLOWED += [(check, MACHINE_SIDE) for check in ("heavy_loads", "heavy_imports")]


@pytest.mark.parametrize(("check", "changes"), ALLOWED)
def test_what_is_allowed_is_not_found(tmp_path, check, changes) -> None:
    assert getattr(layout, check)(plant(tmp_path, changes)) == []


def test_a_learners_answers_are_not_committed_outputs(tmp_path) -> None:
    root = plant(tmp_path, {"exercises/a.ipynb": json.dumps(NOTEBOOK)})
    (root / "exercises/a.ipynb").write_text(json.dumps(ANSWERED))
    assert layout.committed_outputs(root) == []


def test_a_tree_without_git_is_read_too(tmp_path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "x.py").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("")
    assert layout.files(tmp_path) == ["a/b.py"]
