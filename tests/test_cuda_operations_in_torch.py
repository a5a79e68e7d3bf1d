"""What torch asks of the kernels' operations: a name, a gradient, a shape to compile.

And what the operations ask of their callers: the refusals.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidsv3.primitives import cuda_kernels as ops
from tests.test_cuda_operations import (
    BOTH,
    EPS,
    add_norm,
    assert_close,
    draw,
    gated,
    norm,
    rotated,
    rotation_of,
)
from tests.test_torch_model import needs_compiler

# --- custom operators ---------------------------------------------------------------


def columns(x: Tensor) -> Tensor:
    """The same numbers, the last axis not the nearest in memory."""
    return x.mT.contiguous().mT if x.ndim > 1 else pieces(x)


def pieces(x: Tensor) -> Tensor:
    """The same numbers, as every row's beginning and every second of them."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


LAYOUTS = {"contiguous": lambda x: x, "transposed": columns, "sliced": pieces}


def operators(dtype: torch.dtype, lie=LAYOUTS["contiguous"]) -> dict:
    """Each custom operator with arguments, some of which want a gradient.

    What is changed in place, and what another operator has made, is contiguous.
    """
    x, other = draw(2, 3, 16, dtype=dtype), draw(2, 3, 16, dtype=dtype, seed=1)
    g, r = lie(draw(16, seed=2)), draw(6, seed=3).abs()
    heads, turns = draw(1, 2, 2, 8, dtype=dtype), draw(2, 8, seed=4)
    targets, sums = lie(torch.tensor([[1, 2, 3], [0, 15, 7]])), draw(2, 3, seed=5)
    logits, x, other = x.clone(), lie(x), lie(other)
    leaf, second = x.detach().requires_grad_(), other.detach().requires_grad_()
    return {
        "_rmsnorm": (leaf, g.detach().requires_grad_(), EPS),
        "_add_rmsnorm": (leaf, second, g, EPS),
        "_rmsnorm_backward": (x, other, g, r),
        "_turn_": (heads, turns, -1.0),
        "_swiglu": (leaf, second),
        "_swiglu_backward": (x, other, other),
        "_cross_entropy": (logits.clone().requires_grad_(), targets),
        "_cross_entropy_backward_": (logits, targets, sums, sums, lie(sums)),
    }


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", operators(torch.float32))
def test_opcheck(name, layout, dtype) -> None:
    """Schema, autograd registration, fake tensors and dynamic shapes, by torch."""
    arguments = operators(dtype, LAYOUTS[layout])[name]
    torch.library.opcheck(getattr(ops, name), arguments)


def test_the_layouts_are_what_they_are_called() -> None:
    x = draw(2, 3, 16)
    assert columns(x).stride() == (48, 1, 3) and torch.equal(columns(x), x)
    assert pieces(x).stride() == (96, 32, 2) and torch.equal(pieces(x), x)


def test_every_operator_is_checked() -> None:
    found = {
        name
        for name, value in vars(ops).items()
        if isinstance(value, torch.library.CustomOpDef)
    }
    assert found == operators(torch.float32).keys()


# --- compiled -----------------------------------------------------------------------


def block(x: Tensor, residual: Tensor, g: Tensor, up: Tensor) -> Tensor:
    total, y = ops.add_rmsnorm(x, residual, g, EPS)
    return ops.swiglu(ops.rmsnorm(y, g, EPS), up) + total


def exact_block(x: Tensor, residual: Tensor, g: Tensor, up: Tensor) -> Tensor:
    total, y = add_norm(x, residual, g)
    return gated(norm(y, g), up) + total


ROTATION = rotation_of(3, 4)
TARGETS = torch.tensor([1, 2, 3])


def turned(x: Tensor) -> Tensor:
    """In place of what a projection leaves, as in the model."""
    return ops.rotate_(x * 2, ROTATION) * 3


def loss(h: Tensor, W: Tensor) -> Tensor:
    return ops.cross_entropy_(h @ W, TARGETS)


COMPILED = {
    "norms and gates": (block, exact_block, [(2, 16), (2, 16), (16,), (2, 16)]),
    "rotate_": (turned, lambda x: rotated(x * 2, ROTATION) * 3, [(2, 3, 2, 24)]),
    "cross_entropy_": (
        loss, lambda h, W: F.cross_entropy(h @ W, TARGETS), [(3, 5), (5, 24)]),
}  # fmt: skip


def run(function, inputs: list[Tensor]) -> list[Tensor]:
    """The value and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * weights).sum().backward()
    return [y.detach(), *[leaf.grad for leaf in leaves]]


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_like_eager_and_right(name, backend) -> None:
    torch.compiler.reset()
    function, exact, shapes = COMPILED[name]
    inputs = [draw(*shape, seed=n) for n, shape in enumerate(shapes)]
    eager = run(function, inputs)
    compiled = run(torch.compile(function, fullgraph=True, backend=backend), inputs)
    expected = run(exact, [x.double() for x in inputs])
    for ours, theirs, right in zip(compiled, eager, expected, strict=True):
        assert_close(ours, right)
        assert_close(theirs, right)
        if backend == "aot_eager":  # inductor may contract sums of its own
            assert torch.equal(ours, theirs)


# --- refusals -----------------------------------------------------------------------

X, G, Z = torch.ones(2, 6), torch.ones(6), torch.ones(2, 3)
R4, IDS = torch.ones(1, 3, 2, 8), torch.zeros(2, dtype=torch.int64)
REFUSED = {
    "float64": (TypeError, "rmsnorm: x is torch.float64; .*there are numpy_ref",
                lambda: ops.rmsnorm(X.double(), G, EPS)),
    "weight float16": (TypeError, "rmsnorm: weight is torch.float16",
                       lambda: ops.rmsnorm(X, G.half(), EPS)),
    "weight too short": (ValueError, r"shape \(2, 6\) needs a weight .* got \(5,\)",
                         lambda: ops.rmsnorm(X, G[:5], EPS)),
    "rows of nothing": (ValueError, r"shape \(2, 0\) needs .* one at least, got \(0,\)",
                        lambda: ops.rmsnorm(X[:, :0], G[:0], EPS)),
    "no numbers": (TypeError, "cross_entropy_: targets are torch.complex64",
                   lambda: ops.cross_entropy_(Z, torch.zeros(2).cfloat())),
    "targets of numbers": (
        TypeError, "targets are torch.float32; they are ids, integers",
        lambda: ops.cross_entropy_(Z, torch.zeros(2))),
    "logits of a leaf": (
        ValueError, "the logits are a leaf that requires a gradient",
        lambda: ops.cross_entropy_(Z.clone().requires_grad_(), IDS)),
    "weight of the columns": (ValueError, r"add_rmsnorm: x of .* got \(6, 1\)",
                              lambda: ops.add_rmsnorm(X, X, G[:, None], EPS)),
    "residual of one row": (ValueError, r"equal shapes .* x \(2, 6\) .*residual \(6,\)",
                            lambda: ops.add_rmsnorm(X, G, G, EPS)),
    "residual in bfloat16": (ValueError, "equal shapes and dtypes.*torch.bfloat16",
                             lambda: ops.add_rmsnorm(X, X.bfloat16(), G, EPS)),
    "swiglu of integers": (TypeError, "swiglu: up is torch.int64",
                           lambda: ops.swiglu(X, X.long())),
    "swiglu of two shapes": (ValueError, "swiglu: needs equal shapes",
                             lambda: ops.swiglu(X, X[:1])),
    "rotate float64": (TypeError, "rotate_: x is torch.float64",
                       lambda: ops.rotate_(R4.double(), rotation_of(3, 4))),
    "rotation of other tokens": (
        ValueError, r"needs a rotation \(2, 3, d_R/2\) or \(2, 1, 1, 3, d_R/2\) with "
        r"d_R at most 8, got \(2, 4, 4\)", lambda: ops.rotate_(R4, rotation_of(4, 4))),
    "rotation of other texts": (ValueError, r"got \(2, 2, 1, 3, 4\)",
                                lambda: ops.rotate_(R4, rotation_of(3, 4, B=2))),
    "rotation too wide": (ValueError, r"got \(2, 3, 5\)",
                          lambda: ops.rotate_(R4, rotation_of(3, 5))),
    "rotation of nothing": (ValueError, r"got \(2, 3, 0\)",
                            lambda: ops.rotate_(R4, torch.ones(2, 3, 0))),
    "rotation of a view": (ValueError, r"rotate_: x has strides \(48, 8, 24, 1\)",
                           lambda: ops.rotate_(torch.ones(1, 2, 3, 8).transpose(1, 2),
                                               rotation_of(3, 4))),
    "logits of integers": (TypeError, "cross_entropy_: logits is torch.int64",
                           lambda: ops.cross_entropy_(Z.long(), IDS)),
    "targets too few": (ValueError, r"logits of shape \(2, 3\) need .* got \(1,\)",
                        lambda: ops.cross_entropy_(Z, IDS[:1])),
    "no targets": (ValueError, r"one at least, got \(0,\)",
                   lambda: ops.cross_entropy_(Z[:0], IDS[:0])),
    "logits of a view": (ValueError, r"logits have strides \(1, 2\)",
                         lambda: ops.cross_entropy_(torch.ones(3, 2).T, IDS)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name) -> None:
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
