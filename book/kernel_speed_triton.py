"""The first kernels in Triton, to be timed beside ours: as few lines as do it well.

A program a row or a token, a whole row in registers where it fits, float32 arithmetic.
Needs Triton; with ``TRITON_INTERPRET=1`` it runs on a processor, one program at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-6
ELEMENTS = 1024  # of an elementwise program
LOGITS = 4096  # at a time
SHARES = 528  # programs of RMSNorm's gradient, each with a share of dg
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)


def whole(width: int) -> int:
    """A power of two in which a row fits: Triton's blocks are such."""
    return triton.next_power_of_2(width)


@triton.jit
def _rmsnorm(x, residual, g, total, y, width, eps, adds: tl.constexpr,
             block: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    here = at < width
    value = tl.load(x + row + at, mask=here, other=0.0).to(tl.float32)
    if adds:
        value += tl.load(residual + row + at, mask=here, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + at, rounded, mask=here)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    gain = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row + at, (value * scale * gain).to(y.dtype.element_ty), mask=here)


def rmsnorm(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x = t["x"]
    y, (rows, width) = torch.empty_like(x), x.shape
    _rmsnorm[(rows,)](x, x, t["g"], x, y, width, EPS, False, whole(width), num_warps=8)
    return (y,)


def add_rmsnorm(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x, residual = t["x"], t["residual"]
    total, y, (rows, width) = torch.empty_like(x), torch.empty_like(x), x.shape
    given = x, residual, t["g"], total, y, width, EPS, True, whole(width)
    _rmsnorm[(rows,)](*given, num_warps=8)
    return total, y


@triton.jit
def _rmsnorm_backward(dy, x, g, r, dx, partial, rows, width, block: tl.constexpr):
    first = tl.program_id(0)
    at = tl.arange(0, block)
    here = at < width
    gain = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
    dg = tl.zeros((block,), tl.float32)
    wide = tl.full((), width, tl.int64)
    for n in range(first, rows, tl.num_programs(0)):
        row = n * wide + at
        up = tl.load(dy + row, mask=here, other=0.0).to(tl.float32)
        value = tl.load(x + row, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(r + n)
        dg += up * value * scale
        dz = up * gain
        shared = tl.sum(dz * value, 0) / width * scale * scale
        found = scale * (dz - value * shared)
        tl.store(dx + row, found.to(dx.dtype.element_ty), mask=here)
    tl.store(partial + first.to(tl.int64) * width + at, dg, mask=here)


def rmsnorm_backward(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    dy, x, g, r = (t[name] for name in ("dy", "x", "g", "r"))
    dx, (rows, width) = torch.empty_like(x), x.shape
    shares = min(rows, SHARES)
    partial = torch.empty(shares, width, device=x.device)
    given = dy, x, g, r, dx, partial, rows, width, whole(width)
    _rmsnorm_backward[(shares,)](*given, num_warps=16)
    return dx, partial.sum(0).to(g.dtype)


@triton.jit
def _rope(x, turns, heads, rotary: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)
    column = tl.arange(0, rotary)
    at = x + (token * heads + head[:, None]) * rotary + column[None, :]
    here = (head < heads)[:, None]
    pairs = tl.load(at, mask=here, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(pairs, (block, rotary // 2, 2)))
    turn = tl.load(turns + token * rotary + column)
    cos, sin = tl.split(tl.reshape(turn, (1, rotary // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (block, rotary))
    tl.store(at, turned.to(x.dtype.element_ty), mask=here)


def rope(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x = t["x"]
    _, tokens, heads, rotary = x.shape
    block = min(64, whole(heads))
    _rope[(tokens, triton.cdiv(heads, block))](x, t["turns"], heads, rotary, block)
    return (x,)


@triton.jit
def _swiglu(gate, up, h, n, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < n
    a = tl.load(gate + at, mask=here).to(tl.float32)
    b = tl.load(up + at, mask=here).to(tl.float32)
    tl.store(h + at, (a * tl.sigmoid(a) * b).to(h.dtype.element_ty), mask=here)


def swiglu(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    h = torch.empty_like(t["gate"])
    grid = (triton.cdiv(h.numel(), ELEMENTS),)
    _swiglu[grid](t["gate"], t["up"], h, h.numel(), ELEMENTS)
    return (h,)


@triton.jit
def _swiglu_backward(dh, gate, up, dgate, dup, n, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < n
    above = tl.load(dh + at, mask=here).to(tl.float32)
    a = tl.load(gate + at, mask=here).to(tl.float32)
    b = tl.load(up + at, mask=here).to(tl.float32)
    s = tl.sigmoid(a)
    to_gate = above * b * s * (1 + a * (1 - s))
    tl.store(dgate + at, to_gate.to(dgate.dtype.element_ty), mask=here)
    tl.store(dup + at, (above * a * s).to(dup.dtype.element_ty), mask=here)


def swiglu_backward(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    dgate, dup = torch.empty_like(t["gate"]), torch.empty_like(t["up"])
    n = dup.numel()
    given = t["dh"], t["gate"], t["up"], dgate, dup, n, ELEMENTS
    _swiglu_backward[(triton.cdiv(n, ELEMENTS),)](*given)
    return dgate, dup


@triton.jit
def _cross_entropy(logits, targets, losses, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    largest = tl.full((block,), LOWEST, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        here = start + at < width
        z = tl.load(logits + row * width + start + at, mask=here, other=LOWEST)
        z = z.to(tl.float32) * LOG2_E
        z = tl.where(here, z, LOWEST)
        now = tl.maximum(largest, z)
        total = total * tl.exp2(largest - now) + tl.exp2(z - now)
        largest = now
    highest = tl.max(largest, 0)
    total = tl.sum(total * tl.exp2(largest - highest), 0)
    target = tl.load(targets + row)
    z = tl.load(logits + row * width + target).to(tl.float32)
    tl.store(losses + row, (highest + tl.log2(total)) * LN_2 - z)


def cross_entropy(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    rows, width = t["logits"].shape
    losses = torch.empty(rows, device=t["logits"].device)
    block = min(LOGITS, whole(width))
    given = t["logits"], t["targets"], losses, width, block
    _cross_entropy[(rows,)](*given, num_warps=8)
    return (losses,)


@triton.jit
def _cross_entropy_backward(
    logits, targets, highest, log_sums, dlosses, width, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < width
    z = tl.load(logits + row * width + at, mask=here, other=0.0).to(tl.float32)
    above = z - tl.load(highest + row) - tl.load(log_sums + row)
    p = tl.exp2(above * LOG2_E)
    p = tl.where(at == tl.load(targets + row), p - 1, p) * tl.load(dlosses + row)
    tl.store(logits + row * width + at, p.to(logits.dtype.element_ty), mask=here)


def cross_entropy_backward(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logits = t["logits"]
    rows, width = logits.shape
    block = min(LOGITS, whole(width))
    each = t["targets"], t["highest"], t["log_sums"], t["dlosses"]
    grid = rows, triton.cdiv(width, block)
    _cross_entropy_backward[grid](logits, *each, width, block, num_warps=8)
    return (logits,)


CALLS = {
    call.__name__: call
    for call in (
        rmsnorm, add_rmsnorm, rmsnorm_backward, rope, swiglu, swiglu_backward,
        cross_entropy, cross_entropy_backward,
    )
}  # fmt: skip
