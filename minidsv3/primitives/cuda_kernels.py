r"""The primitives on Numba CUDA kernels, as operations of PyTorch.

What `torch_port` says with torch's own operations, computed by our kernels: on a GPU
by the GPU, on tensors of the processor by the simulator (`minidsv3.gpu.launch`). Each
is an operator that torch knows by name, with a gradient of ours, so ``backward()``,
``torch.compile`` and CUDA graphs take it as it is. Where rows are multiples of 16
bytes and begin at such, it is a kernel of `fast_cuda_kernels`, else of
`plain_cuda_kernels`. Tensors are float32 or bfloat16; arithmetic is in float32.
"""

import math

import torch
from numpy import float32, uint32, uint64
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidsv3.gpu.launch import launch
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain

NUMBERS = (torch.float32, torch.bfloat16)
WARP = 32
ELEMENTWISE_THREADS = 256
LOSS_THREADS = 512
MOST_KEPT, MOST_KEPT_BACKWARD = 32, 16
"""Numbers of its row that a thread keeps; the gradient of a norm keeps three rows."""
MOST_ROW_THREADS = 512
"""Threads for a row: with 128 registers each they are all that a multiprocessor has."""
BACKWARD_BLOCKS, BACKWARD_ROWS = 264, 4
"""Blocks of RMSNorm's gradient at most, and rows of each at least. Every block writes a
share of dg, a row in float32. Two blocks run at once on each of 132 multiprocessors."""
Layout = torch.contiguous_format


def _numbers(operation: str, **tensors: Tensor) -> None:
    """Raise TypeError for tensors of another dtype than kernels compute."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype}; the kernels take float32 and "
                "bfloat16 (for float64 there are numpy_ref and torch_port)"
            )


def _same_shape(operation: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all shapes and dtypes are equal."""
    kinds = {(tuple(t.shape), t.dtype) for t in tensors.values()}
    if len(kinds) > 1:
        given = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in tensors.items())
        raise ValueError(f"{operation}: needs equal shapes and dtypes, got {given}")


def per_vector(x: Tensor) -> int:
    """Numbers in 16 bytes: 8 of bfloat16, 4 of float32."""
    return 16 // x.element_size()


def wide(width: int, *tensors: Tensor) -> bool:
    """Whether rows of this width can be read and written 16 bytes at a time.

    The first tensor says how many numbers that is.
    """
    aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
    return width % per_vector(tensors[0]) == 0 and aligned


def row_plan(width: int, per: int, kept: int = MOST_KEPT) -> tuple[int, int] | None:
    """Threads of a block for a row of this width, and vectors that each keeps.

    Whole warps, as few as keep no more than ``kept`` numbers a thread; None for a row
    that `MOST_ROW_THREADS` cannot keep.
    """
    vectors = width // per
    threads = WARP * math.ceil(vectors / (WARP * kept // per))
    if threads > MOST_ROW_THREADS:
        return None
    return threads, math.ceil(vectors / threads)


# --- RMSNorm ------------------------------------------------------------------------


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""RMSNorm, :math:`y = g ⊙ x\,(\overline{x^2}+ε)^{-1/2}`: (..., D) -> (..., D).

    As `torch_port.RMSNorm`; x and weight float32 or bfloat16, y in x's dtype. Raises
    TypeError for other dtypes, ValueError if weight is not (D,).
    """
    _check_norm("rmsnorm", x, weight)
    return _rmsnorm(x, weight, eps)[0]


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    r"""``total = x + residual`` and its RMSNorm, in one pass: a block's inner step.

    Shapes: x, residual (..., D) of one dtype -> (total, y). Raises as `rmsnorm` does.
    """
    _check_norm("add_rmsnorm", x, weight)
    _same_shape("add_rmsnorm", x=x, residual=residual)
    total, y, _ = _add_rmsnorm(x, residual, weight, eps)
    return total, y


def _check_norm(operation: str, x: Tensor, weight: Tensor) -> None:
    _numbers(operation, x=x, weight=weight)
    if weight.shape != x.shape[-1:] or weight.numel() == 0:
        raise ValueError(
            f"{operation}: x of shape {tuple(x.shape)} needs a weight for each number "
            f"of its rows and one at least, got {tuple(weight.shape)}"
        )


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _like(x: Tensor) -> Tensor:
    """Room for a result: as the kernels write it, contiguous."""
    return torch.empty_like(x, memory_format=Layout)


@torch.library.custom_op("minidsv3::rmsnorm", mutates_args=())
def _rmsnorm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, and each row's r for the gradient."""
    x, weight, D, rows = x.contiguous(), weight.contiguous(), x.shape[-1], _rows(x)
    y, r, per = _like(x), x.new_empty(rows, dtype=torch.float32), per_vector(x)
    kernel, threads = plain.rmsnorm_plain, plain.THREADS
    if wide(D, x, weight, y) and (plan := row_plan(D, per)):
        threads, vectors = plan
        kernel = fast.rmsnorm_fast(vectors, per)
    numbers = uint32(D), float32(1 / D), float32(eps)
    launch(kernel, rows, threads, x, weight, y, r, *numbers)
    return y, r


@torch.library.custom_op("minidsv3::add_rmsnorm", mutates_args=())
def _add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its normalised rows, and each row's r."""
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    D, rows, per = x.shape[-1], _rows(x), per_vector(x)
    total, y, r = _like(x), _like(x), x.new_empty(rows, dtype=torch.float32)
    numbers = uint32(D), float32(1 / D), float32(eps)
    if wide(D, x, residual, weight, total, y) and (plan := row_plan(D, per)):
        threads, vectors = plan
        kernel = fast.add_rmsnorm_fast(vectors, per)
        launch(kernel, rows, threads, x, residual, weight, total, y, r, *numbers)
        return total, y, r
    _elementwise(plain.add_plain, 1, x, residual, total)
    launch(plain.rmsnorm_plain, rows, plain.THREADS, total, weight, y, r, *numbers)
    return total, y, r


@torch.library.custom_op("minidsv3::rmsnorm_backward", mutates_args=())
def _rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and dg. Each block adds up its rows' share of dg, torch adds the blocks."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    D, rows, per = x.shape[-1], _rows(x), per_vector(x)
    blocks = min(math.ceil(rows / BACKWARD_ROWS), BACKWARD_BLOCKS)
    dx, partial = _like(x), x.new_empty((blocks, D), dtype=torch.float32)
    kernel, threads = plain.rmsnorm_backward_plain, plain.THREADS
    if wide(D, x, dy, weight, dx, partial) and (
        plan := row_plan(D, per, MOST_KEPT_BACKWARD)
    ):
        threads, vectors = plan
        kernel = fast.rmsnorm_backward_fast(vectors, per)
    numbers = uint32(rows), uint32(D), float32(1 / D)
    launch(kernel, blocks, threads, dy, x, weight, r, dx, partial, *numbers)
    return dx, partial.sum(0).to(weight.dtype)


@_rmsnorm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(_rows(x), dtype=torch.float32)


@_add_rmsnorm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), x.new_empty(_rows(x), dtype=torch.float32)


@_rmsnorm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(weight)


def _keep_norm(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_gradient(ctx, dy: Tensor, _dr: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, r = ctx.saved_tensors
    return *_rmsnorm_backward(dy, x, weight, r), None


def _keep_add_norm(ctx, inputs, output) -> None:
    total, _, r = output
    ctx.save_for_backward(total, inputs[2], r)


def _add_norm_gradient(
    ctx, dtotal: Tensor, dy: Tensor, _dr: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, r = ctx.saved_tensors
    dx, dg = _rmsnorm_backward(dy, total, weight, r)
    dx = dx + dtotal  # both summands of a sum have its gradient
    return dx, dx, dg, None


_rmsnorm.register_autograd(_norm_gradient, setup_context=_keep_norm)
_add_rmsnorm.register_autograd(_add_norm_gradient, setup_context=_keep_add_norm)


# --- rotary positions ---------------------------------------------------------------


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    r"""Turn the last d_R numbers of every head by their token's angles, in place.

    DeepSeek's interleaved pairs. x (B, T, H, d), contiguous, as a projection leaves it:
    of each head the last d_R numbers rotate. rotation as `torch_port.rope_rotation`
    makes it, (2, T, d_R/2) or (2, B, 1, T, d_R/2). Returns x. What was in x before is
    gone; its gradient is the rotation back. Raises TypeError for other dtypes than
    float32 and bfloat16, ValueError for shapes that do not fit and for an x that is not
    contiguous.
    """
    _numbers("rotate_", x=x)
    B, T, _, d = x.shape
    per_text = rotation.ndim == 5
    expected = (2, B, 1, T) if per_text else (2, T)
    if rotation.shape[:-1] != expected or not 0 < 2 * rotation.shape[-1] <= d:
        raise ValueError(
            f"rotate_: x of shape {tuple(x.shape)} needs a rotation (2, {T}, d_R/2) or "
            f"(2, {B}, 1, {T}, d_R/2) with d_R at most {d}, got {tuple(rotation.shape)}"
        )
    if not x.is_contiguous():
        raise ValueError(
            f"rotate_: x has strides {x.stride()}; it is changed in place, so it must "
            "be contiguous"
        )
    turns = torch.stack(tuple(rotation.float()), -1).flatten(-2)  # (..., T, d_R)
    return _Rotate.apply(x, turns.reshape(-1, turns.shape[-1]))


class _Rotate(torch.autograd.Function):
    """A rotation in place, and the rotation back of a copy of the gradient, once."""

    @staticmethod
    def forward(ctx, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        ctx.mark_dirty(x)
        _turn_(x, turns, 1.0)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        dx = dy.clone(memory_format=Layout)
        _turn_(dx, turns, -1.0)
        return dx, None


@torch.library.custom_op("minidsv3::turn_", mutates_args={"x"})
def _turn_(x: Tensor, turns: Tensor, sign: float) -> None:
    """x (B, T, H, d) in place; turns (T or B T, d_R) of cosines and sines in turn."""
    (B, T, H, d), d_R, per = x.shape, turns.shape[-1], per_vector(x)
    shape = uint32(H), uint32(d), uint32(d_R), uint32(len(turns))
    across = d_R // per
    if d % per or across > ELEMENTWISE_THREADS or not wide(d_R, x, turns):
        launch(plain.rope_plain, B * T, plain.THREADS, x, turns, *shape, float32(sign))
        return
    down = max(1, min(H, ELEMENTWISE_THREADS // across))
    deep = max(1, min(64, ELEMENTWISE_THREADS // (across * down)))  # tokens a block
    blocks = math.ceil(B * T / deep)
    given = uint32(B * T), *shape, float32(sign)
    launch(fast.rope_fast(per), blocks, (across, down, deep), x, turns, *given)


# --- SwiGLU -------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    r"""``silu(gate) * up``, elementwise, in one pass; all of one shape and dtype.

    Raises TypeError for other dtypes than float32 and bfloat16, ValueError for unequal
    shapes.
    """
    _numbers("swiglu", gate=gate, up=up)
    _same_shape("swiglu", gate=gate, up=up)
    return _swiglu(gate, up)


def _elementwise(kernel, each: int, *tensors: Tensor) -> None:
    """Launch over all numbers of equal tensors, ``each`` of them a thread."""
    n = tensors[0].numel()
    blocks = math.ceil(n / (each * ELEMENTWISE_THREADS))
    launch(kernel, blocks, ELEMENTWISE_THREADS, *tensors, uint64(n))


@torch.library.custom_op("minidsv3::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    h = _like(gate)
    if wide(h.numel(), gate, up, h):
        per = per_vector(h)
        _elementwise(fast.swiglu_fast(per), per, gate, up, h)
    else:
        _elementwise(plain.swiglu_plain, 1, gate, up, h)
    return h


@torch.library.custom_op("minidsv3::swiglu_backward", mutates_args=())
def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dh, gate, up = dh.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = _like(gate), _like(up)
    tensors = dh, gate, up, dgate, dup
    if wide(dh.numel(), *tensors):
        per = per_vector(dh)
        _elementwise(fast.swiglu_backward_fast(per), per, *tensors)
    else:
        _elementwise(plain.swiglu_backward_plain, 1, *tensors)
    return dgate, dup


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _like(gate)


@_swiglu_backward.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _like(gate), _like(up)


def _keep_swiglu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx, dh: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(dh, *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_keep_swiglu)


# --- cross-entropy ------------------------------------------------------------------


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean of :math:`-\log \mathrm{softmax}(z)_{target}`, in nats, float32.

    Shapes: logits (..., V), targets (...) of integers. ``backward()`` writes the
    gradient into the memory of the logits, so there is never a second array of that
    size; whoever reads them afterwards reads the gradient, and a second ``backward()``
    is refused by torch. A target outside 0 … V-1, like torch's -100, makes the loss and
    its row of the gradient NaN: on a GPU nobody looks at the targets before. Raises
    TypeError for other dtypes than float32 and bfloat16 and for targets that are no
    integers, ValueError if the shapes do not fit or there is no target, for logits that
    are not contiguous, and for logits that are a leaf, a parameter.
    """
    _numbers("cross_entropy_", logits=logits)
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(
            f"cross_entropy_: targets are {targets.dtype}; they are ids, integers"
        )
    if targets.shape != logits.shape[:-1] or targets.numel() == 0:
        raise ValueError(
            f"cross_entropy_: logits of shape {tuple(logits.shape)} need a target for "
            f"each row and one at least, got {tuple(targets.shape)}"
        )
    if not logits.is_contiguous():
        raise ValueError(
            f"cross_entropy_: logits have strides {logits.stride()}; their gradient "
            "takes their place, so they must be contiguous"
        )
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "cross_entropy_: the logits are a leaf that requires a gradient, and that "
            "would destroy them; give it what a head computes"
        )
    return _cross_entropy(logits, targets.long())[0].mean()


def _loss_kernel(fast_kernel, plain_kernel, logits: Tensor) -> tuple:
    if wide(logits.shape[-1], logits):
        per = per_vector(logits)
        warps = math.ceil(logits.shape[-1] / (per * WARP))
        return fast_kernel(per), min(LOSS_THREADS, WARP * warps)
    return plain_kernel, plain.THREADS


@torch.library.custom_op("minidsv3::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, its maximum and its log-sum above that: (...) float32."""
    targets, V, rows = targets.contiguous(), logits.shape[-1], _rows(logits)
    losses, highest, log_sums = _each_row(logits), _each_row(logits), _each_row(logits)
    kernel, threads = _loss_kernel(
        fast.cross_entropy_fast, plain.cross_entropy_plain, logits
    )
    given = logits, targets, losses, highest, log_sums
    launch(kernel, rows, threads, *given, uint32(V))
    return losses, highest, log_sums


def _each_row(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("minidsv3::cross_entropy_backward_", mutates_args={"logits"})
def _cross_entropy_backward_(
    logits: Tensor, targets: Tensor, highest: Tensor, log_sums: Tensor, dlosses: Tensor
) -> None:
    """The gradient takes the place of the logits."""
    kernel, threads = _loss_kernel(
        fast.cross_entropy_backward_fast, plain.cross_entropy_backward_plain, logits
    )
    given = targets.contiguous(), highest, log_sums, dlosses.contiguous()
    launch(kernel, _rows(logits), threads, logits, *given, uint32(logits.shape[-1]))


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _each_row(logits), _each_row(logits), _each_row(logits)


def _keep_loss(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _loss_gradient(
    ctx, dlosses: Tensor, _dhighest: Tensor, _dlog_sums: Tensor
) -> tuple[Tensor, None]:
    logits, *rest = ctx.saved_tensors
    _cross_entropy_backward_(logits, *rest, dlosses)
    return logits, None


_cross_entropy.register_autograd(_loss_gradient, setup_context=_keep_loss)
