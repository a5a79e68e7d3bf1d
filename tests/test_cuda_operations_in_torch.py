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


def operators(dtype: torch.dtype) -> dict:
    """Each custom operator with arguments, some of which want a gradient."""
    x, other = draw(2, 3, 16, dtype=dtype), draw(2, 3, 16, dtype=dtype, seed=1)
    g, r = draw(16, seed=2), draw(6, seed=3).abs()
    heads, turns = draw(1, 2, 2, 8, dtype=dtype), draw(2, 8, seed=4)
    targets, sums = torch.tensor([[1, 2, 3], [0, 15, 7]]), draw(2, 3, seed=5)
    leaf = x.clone().requires_grad_()
    return {
        "_rmsnorm": (leaf, g.clone().requires_grad_(), EPS),
        "_add_rmsnorm": (leaf, other.clone().requires_grad_(), g, EPS),
        "_rmsnorm_backward": (x, other, g, r),
        "_turn_": (heads, turns, -1.0),
        "_swiglu": (leaf, other.clone().requires_grad_()),
        "_swiglu_backward": (x, other, other),
        "_cross_entropy": (leaf, targets),
        "_cross_entropy_backward_": (x.clone(), targets, sums, sums),
    }


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", operators(torch.float32))
def test_opcheck(name, dtype) -> None:
    """Schema, autograd registration, fake tensors and dynamic shapes, by torch."""
    torch.library.opcheck(getattr(ops, name), operators(dtype)[name])


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
R4 = torch.ones(1, 3, 2, 8)
REFUSED = {
    "float64": (TypeError, "rmsnorm: x is torch.float64; .*there are numpy_ref",
                lambda: ops.rmsnorm(X.double(), G, EPS)),
    "weight float16": (TypeError, "rmsnorm: weight is torch.float16",
                       lambda: ops.rmsnorm(X, G.half(), EPS)),
    "weight too short": (ValueError, r"weight of shape \(5,\) for rows of 6",
                         lambda: ops.rmsnorm(X, G[:5], EPS)),
    "weight of the columns": (ValueError, r"add_rmsnorm: weight of shape \(6, 1\)",
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
                           lambda: ops.cross_entropy_(Z.long(), torch.zeros(2))),
    "targets too few": (ValueError, r"logits of shape \(2, 3\) need .* got \(1,\)",
                        lambda: ops.cross_entropy_(Z, torch.zeros(1))),
    "no targets": (ValueError, r"one at least, got \(0,\)",
                   lambda: ops.cross_entropy_(Z[:0], torch.zeros(0))),
    "logits of a view": (ValueError, r"logits have strides \(1, 2\)",
                         lambda: ops.cross_entropy_(torch.ones(3, 2).T,
                                                    torch.zeros(2))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name) -> None:
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
