"""The shape checker itself; then the NumPy modules under it."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import minidsv3
from minidsv3 import parameters
from minidsv3.config import PLAIN, TrainConfig
from minidsv3.generation import numpy_ref as generation
from minidsv3.model import numpy_ref as model
from minidsv3.mtp import numpy_ref as mtp
from minidsv3.primitives import attention_numpy_ref as attention
from minidsv3.primitives import numpy_ref as primitives
from tests.shapes import checked_shapes, parse_shapes, unannotated

HEADER = """import numpy as np
from minidsv3.config import PLAIN
def f(x):
"""


@pytest.fixture
def planted(tmp_path):
    """A function: makes a module whose f(x) has the given body."""

    def make(body: str, header: str = HEADER) -> ModuleType:
        file = tmp_path / "planted.py"
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        file.write_text(header + indented, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("planted", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return make


X = np.zeros((2, 3, 8))
RIGHT = [
    "y = x  # (B, T, D)",
    "y = x  # (2, 3, 8)",
    "y = x  # (B, T, D): words may follow",
    "y = x  # (..., D)",
    "y = x  # (…, T, D)",
    "y = x  # (…, B, T, D)",
    "y = x[0, 0]  # (D)",
    "y = x[0, 0]  # (D,)",
    "y = x[0, 0]  # (d_c')",
    "y = 3.0  # ()",
    "y = x.sum()  # ()",
    "y, z = x, x[0]  # (B, T, D), (T, D)",
    "y, z = x, {}  # (B, T, D)",
    "y = z = x  # (B, T, D)",
    "y = x  # (B, T, N_h*4)\nz = x.reshape(2, 3, 2, 4)  # (B, T, N_h, 4)",
    "B = 2\ny = x  # (B, B + 1, 4*B)",
    "y = x[0]  # (T, D)\nz = x[:, :, 0]  # (D/4, T)",
    "y = x[0]  # (T, D)\nz = np.zeros(4)  # (T+1)",
    "y = x[0]  # (T, D)\nz = np.zeros(24)  # (T·D)",
    "y = x  # (D - 6, T, D)",  # the axis that is alone teaches D first
    "y: np.ndarray = x  # (B, T, D)",
    "y = x\ny += 1  # (B, T, D)",
    "y = {}\ny['k'] = x  # (B, T, D)",
    "y = np.zeros((5, 8))\ny[:, :2] = 1  # (N, 2)",
    "y = np.concatenate(\n    [x, x],\n    axis=0,\n)  # (2*B, T, D)",
    "y = (\n    x + x\n)  # (B, T, D)",
    "y = np.stack([a for a in x])  # (B, T, D)",
    "y = (lambda a: a)(x)  # (B, T, D)",
    "for i in range(3):\n    y = x[:, i]  # (B, D)",
    "for N in range(3):\n    y = x[:, :N]  # (B, N, D)",
    "return x  # (B, T, D)",
    "return x, {}  # (B, T, D)",
    "return x, x[0]  # (B, T, D), (T, D)",
    "with np.errstate():\n    return x  # (B, T, D)",
    "try:\n    y = x.reshape(7)  # (7)\nexcept ValueError:\n    return x  # (B, T, D)",
    "config = PLAIN\ny = np.zeros((3, 128, 4, 32))  # (N, D, N_h, d_R)",
    "config = PLAIN\ny = x[0]  # (K, d)",  # no experts: K is free
    "B = True\ny = x  # (B, T, D)",
    "y = x[0]  # (P//2, D)\nz = np.zeros(7)  # (P)",  # 6 or 7: not settled yet
    "y = np.zeros((0, 8))  # (N, D)",
]
WRONG = [
    ("y = x  # (B, T)", "the comment says (B, T), but the shape is (2, 3, 8)"),
    ("y = x  # (B, T, N_h, d)", "but the shape is (2, 3, 8)"),
    ("y = x  # (2, 3, 9)", "but the shape is (2, 3, 8)"),
    ("y = x  # (B, B, D)", "but the shape is (2, 3, 8)"),
    ("y = x  # (B, T, D)\nz = x[0]  # (B, D)", "the shape is (3, 8) (B=2, T=3, D=8)"),
    ("y = x  # (B, T, 2*T)", "but the shape is (2, 3, 8)"),
    ("y = x  # (B, T, 3*d)", "but the shape is (2, 3, 8)"),
    ("y = x  # (B, T, P*Q)", "nothing says how large P and Q are"),
    ("y = x[0, 0]  # (..., T, D, D)", "but the shape is (8,)"),
    ("y = x  # (..., T)\nz = x  # (..., T, D)", "but the shape is (2, 3, 8)"),
    ("y = x  # ()", "but the shape is (2, 3, 8)"),
    ("y = 3  # (B)", "but the shape is ()"),
    ("y = [x]  # (1, B, T, D)", "but the value is a list"),
    ("y, z = x, x[0]  # (B, T, D), (B, D)", "but the shape is (3, 8)"),
    ("y = x  # (B, T, D), (B, T, D)", "but there are 1 value(s)"),
    ("B = 5\ny = x  # (B, T, D)", "but the shape is (2, 3, 8) (B=5)"),
    ("config = PLAIN\ny = x  # (B, T, D)", "but the shape is (2, 3, 8)"),
    ("y = {}\ny['k'] = x  # (B, T)", "but the shape is (2, 3, 8)"),
    ("y = np.concatenate(\n    [x, x],\n)  # (B, T, D, 1)", "the shape is (4, 3, 8)"),
    ("y = (\n    x + x\n)  # (B, T)", "but the shape is (2, 3, 8)"),
    ("return x  # (B, T)", "but the shape is (2, 3, 8)"),
    ("return x, x  # (B, T, D), (B, T)", "but the shape is (2, 3, 8)"),
    ("with np.errstate():\n    return x  # (B, T)", "but the shape is (2, 3, 8)"),
    ("for i in (2, 3):\n    y = x[:, :i]  # (B, T, D)", "T=2, D=8, i=3)"),
    ("y = x[:, :2]  # (B, 2, D)\nfor y in x:\n    y = y  # (B, D)", "is (3, 8)"),
]


@pytest.mark.parametrize("body", RIGHT)
def test_true_comments_pass(planted, body) -> None:
    module = planted(body)
    with checked_shapes(module) as report:
        module.f(X)
    lines = {statement.first for statement in report.unexercised}
    assert not lines - {5}, "only what an exception skips is not run"
    assert report.exercised


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_false_comments_are_named(planted, body, message) -> None:
    module = planted(body)
    with pytest.raises(AssertionError) as failure, checked_shapes(module):
        module.f(X)
    assert message in str(failure.value)
    assert f"{module.__file__}:" in str(failure.value)


def test_the_line_of_the_statement_is_named(planted) -> None:
    module = planted("y = 1\nz = (\n    x\n)  # (B, T)")
    with pytest.raises(AssertionError) as failure, checked_shapes(module):
        module.f(X)
    assert "planted.py:5: " in str(failure.value)


def test_each_call_has_its_own_symbols(planted) -> None:
    module = planted("y = x  # (N)\nreturn y if len(y) > 5 else f(np.zeros(9))")
    with checked_shapes(module):
        module.f(np.zeros(2))
        module.f(np.zeros(7))


def test_what_was_not_run_is_reported(planted) -> None:
    module = planted("if x is None:\n    y = x  # (B)\nz = x  # (B, T, D)")
    with checked_shapes(module) as report:
        module.f(X)
    assert [statement.first for statement in report.unexercised] == [5]
    assert [statement.first for statement in report.exercised] == [6]


def test_an_error_inside_passes_through_and_tracing_ends(planted) -> None:
    import sys

    before = sys.gettrace()
    module = planted("y = x  # (B)\nraise KeyError(3)")
    with pytest.raises(KeyError), checked_shapes(module):
        module.f(X)
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    ("comment", "shapes"),
    [
        ("# (B, T)", ("(B, T)",)),
        ("# (B, T), (B, D): both", ("(B, T)", "(B, D)")),
        ("# (..., d_R/2)", ("(..., d_R/2)",)),
        ("# ()", ("()",)),
        ("# why (B, T)", ()),
        ("# (unlike the paper) we add", ()),
        ("# (B, T) (see above)", ("(B, T)",)),
        ("# noqa: E501", ()),
        ("# (f(x), B)", ()),
        ("# (a.b, B)", ()),
    ],
)
def test_prose_in_brackets_is_no_shape(comment, shapes) -> None:
    assert parse_shapes(comment) == shapes


def test_reshapes_without_a_shape_are_found() -> None:
    source = (
        "def f(x):\n"
        "    y = x.reshape(3)\n"  # 2
        "    y = x.reshape(3)  # (3)\n"
        "    z = np.einsum('i,i', x, x)  # because\n"  # 4
        "    a = einsum(\n"  # 5
        "        x,\n"
        "    )\n"
        "    b = np.swapaxes(\n"
        "        x, 0, 1\n"
        "    )  # (T, B)\n"
        "    c = x + x\n"
        "    return 1 + x.transpose(1, 0)\n"  # 12
    )
    assert unannotated(source) == [2, 4, 5, 12]


# --- the library ------------------------------------------------------------------

NUMPY_FILES = sorted(Path(minidsv3.__file__).parent.rglob("*numpy_ref.py"))


@pytest.mark.parametrize("file", NUMPY_FILES, ids=lambda file: file.parent.name)
def test_every_reshape_says_its_shape(file) -> None:
    lines = unannotated(file.read_text(encoding="utf-8"))
    assert not lines, f"{file}: no shape comment on line {lines}"


ODD = replace(  # widths that are all different
    PLAIN,
    vocab_size=31,
    hidden_size=20,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    qk_rope_head_dim=4,
    v_head_dim=5,
)


@pytest.mark.parametrize("modules", [0, 2])
def test_the_model_says_true_shapes(modules: int) -> None:
    """Forward, backward and generation, with MTP and without."""
    config = replace(ODD, num_nextn_predict_layers=modules)
    params = parameters.initialise(config, seed=0, std=0.02)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, size=(3, 8))
    with checked_shapes(primitives, attention, mtp, model, generation) as report:
        model.loss_and_grads(params, config, ids, TrainConfig())
        sampling = {"temperature": 0.7, "top_p": 0.9, "speculative": modules > 0}
        generation.generate(params, config, ids[:, :4], 3, **sampling)
    assert len(report.exercised) >= (60 if modules else 40)
    missed = {s.first for s in report.unexercised if s.file == mtp.__file__}
    assert not (modules and missed)
