"""The first kernels' awkward cases, each with its exact answer from `numpy_ref`.

Sizes: one row, one token, one head; rows shorter than a warp, just below, at and just
above what a block reaches at once; more warps than one. Numbers: huge, tiny, zero,
negative, -inf where a mask makes it. Bounds of errors count roundings to float32
(`kernel_jobs.U` each): a sum of n terms in order has n, and elementary functions have a
few; what float32 cannot hold, it may flush to zero.
"""

import numpy as np

from minidsv3.primitives import numpy_ref
from tests.kernel_cases_of_elements import (
    cross_entropy,
    cross_entropy_backward,
    loss_cases,
    rope_cases,
    swiglu_cases,
)
from tests.kernel_jobs import (
    BF16,
    F32,
    PER,
    PLAIN_THREADS,
    SMALLEST,
    Array,
    Job,
    U,
    blank,
    draw,
    encoded,
    rounded,
)

u32, u64, f32 = np.uint32, np.uint64, np.float32


# --- RMSNorm ------------------------------------------------------------------------


def row_of(width: int, vectors: int | None, threads: int, kind: str) -> tuple[str, int]:
    """How a row is shared out, for people, and the terms that a sum of it adds up."""
    per_thread = PER[kind] * vectors if vectors else -(-width // threads)
    return f"width {width} on {threads}", per_thread + 10 + threads // 32


def constants_of(vectors: int | None, kind: str) -> tuple[int, ...]:
    """What a fast kernel is made of; nothing for a plain one."""
    return (vectors, PER[kind]) if vectors else ()


def norm_sum_error(terms: int) -> float:
    """Relative, of (mean + eps)^(-1/2): half of its sum's, and a few."""
    return (terms / 2 + 6) * U


def rmsnorm(
    x: Array, vectors: int | None = None, threads: int = PLAIN_THREADS,
    kind: str = F32, g_kind: str | None = None, eps: float = 1e-6, what: str = "",
) -> Job:  # fmt: skip
    """RMSNorm of the rows of x."""
    rows, width = x.shape
    g_kind = g_kind or kind
    g = draw(width, kind=g_kind, seed=1)
    y, (_, _, r) = numpy_ref.rmsnorm_forward(x, g, eps)
    name, terms = row_of(width, vectors, threads, kind)
    relative = norm_sum_error(terms)
    return Job(
        f"{name} {what} g {g_kind}",
        "rmsnorm_fast" if vectors else "rmsnorm_plain",
        rows,
        threads,
        {"x": encoded(x, kind), "g": encoded(g, g_kind),
         "y": blank(x.size, kind), "r": blank(rows, F32)},
        (u32(width), f32(1 / width), f32(eps)),
        {"y": y, "r": r},
        {"y": np.abs(y) * (relative + 3 * U) + SMALLEST, "r": r * relative},
        constants_of(vectors, kind),
    )  # fmt: skip


def add_rmsnorm(
    x: Array, vectors: int, threads: int, kind: str = F32, g_kind: str | None = None
) -> Job:
    """RMSNorm of a sum as its dtype holds it: the sum is exact but for one rounding."""
    rows, width = x.shape
    residual = draw(rows, width, kind=kind, seed=2)
    total = rounded((x.astype(f32) + residual.astype(f32)), kind)
    norm = rmsnorm(total, vectors, threads, kind, g_kind)
    arrays = {
        "x": encoded(x, kind), "residual": encoded(residual, kind),
        "g": norm.arrays["g"], "total": blank(x.size, kind),
        "y": norm.arrays["y"], "r": norm.arrays["r"],
    }  # fmt: skip
    return Job(
        norm.name, "add_rmsnorm_fast", rows, threads, arrays, norm.scalars,
        {**norm.exact, "total": total}, {**norm.error, "total": 0 * total},
        norm.constants,
    )  # fmt: skip


def add(n: int, kind: str = F32) -> Job:
    """A sum of n numbers, a thread each, in blocks of 256."""
    x, residual = draw(n, kind=kind), draw(n, kind=kind, seed=1)
    return Job(
        f"{n} numbers", "add_plain", -(-n // 256), 256,
        {"x": encoded(x, kind), "residual": encoded(residual, kind),
         "total": blank(n, kind)},
        (u64(n),), {"total": x + residual}, {"total": np.abs(x + residual) * U},
    )  # fmt: skip


def rmsnorm_backward(
    x: Array, blocks: int, vectors: int | None = None, threads: int = PLAIN_THREADS,
    kind: str = F32, g_kind: str | None = None, eps: float = 1e-6,
) -> Job:  # fmt: skip
    """Its gradient; block b has rows b, b + blocks, …, and their share of dg."""
    rows, width = x.shape
    g_kind = g_kind or kind
    g, dy = draw(width, kind=g_kind, seed=1), draw(rows, width, kind=kind, seed=2)
    _, (_, _, r) = numpy_ref.rmsnorm_forward(x, g, eps)
    r = rounded(r, F32)  # the kernel is given it so
    dx, _ = numpy_ref.rmsnorm_backward(dy, (x, g, r))
    shares = [
        numpy_ref.rmsnorm_backward(dy[b::blocks], (x[b::blocks], g, r[b::blocks]))[1]
        for b in range(blocks)
    ]
    sizes = [np.abs(dy * x * r)[b::blocks].sum(axis=0) for b in range(blocks)]
    name, terms = row_of(width, vectors, threads, kind)
    dz = np.abs(g * dy)
    dot = np.mean(dz * np.abs(x), axis=-1, keepdims=True) * r**2
    error_dx = r * (4 * dz + np.abs(x) * dot * (terms + 10)) * U + SMALLEST
    error_dg = np.stack(sizes) * (rows / blocks + 5) * U
    return Job(
        f"{rows} rows in {blocks} blocks, {name}",
        "rmsnorm_backward_fast" if vectors else "rmsnorm_backward_plain",
        blocks,
        threads,
        {"dy": encoded(dy, kind), "x": encoded(x, kind), "g": encoded(g, g_kind),
         "r": encoded(r, F32), "dx": blank(x.size, kind),
         "partial": blank(blocks * width, F32)},
        (u32(rows), u32(width), f32(1 / width)),
        {"dx": dx, "partial": np.stack(shares)},
        {"dx": error_dx, "partial": error_dg},
        constants_of(vectors, kind),
    )  # fmt: skip


# --- the cases ----------------------------------------------------------------------


def norm_cases() -> list[Job]:
    """Rows of the fast kernels in vectors: 31, 32, 33 are the edges of 32 threads.

    Among them rows of one vector, of fewer than a warp has threads, and such that a
    thread, or all, have nothing in their second vector or their last.
    """
    odd = [(1, 1), (2, 7), (2, 127), (1, 128), (2, 129), (1, 300)]
    in_vectors = [
        (2, 31, 1, 32), (1, 1, 1, 32), (1, 32, 1, 32), (2, 33, 2, 32),
        (1, 127, 4, 32), (1, 129, 3, 64), (1, 1, 2, 64), (2, 65, 1, 96),
    ]  # fmt: skip
    found = []
    for kind, other in ((F32, BF16), (BF16, F32)):
        rows = [(n, PER[kind] * width, *how) for n, width, *how in in_vectors]
        found += [rmsnorm(draw(*shape, kind=kind), kind=kind) for shape in odd]
        for n, width, vectors, threads in rows:
            x = draw(n, width, kind=kind)
            how = (vectors, threads, kind)
            found += [rmsnorm(x, *how), add_rmsnorm(x, *how)]
        x = draw(3, 40, kind=kind)
        found += [
            rmsnorm(x, kind=kind, g_kind=other), rmsnorm(x, 1, 32, kind, other),
            add_rmsnorm(x, 1, 32, kind, other), add(1, kind), add(300, kind),
            rmsnorm_backward(x, 2, kind=kind, g_kind=other),
            rmsnorm_backward(x, 2, 1, 32, kind, other),
        ]  # fmt: skip
        for size in (0, 1e-12, 1e-3, 1e16):
            x = draw(2, 48, kind=kind, size=size)
            name = f"size {size}"
            found += [rmsnorm(x, None, 128, kind, eps=1e-5, what=name)]
            found += [rmsnorm(x, 1, 32, kind, eps=1e-5, what=name)]
            found += [rmsnorm_backward(x, 1, None, 128, kind, eps=1e-5)]
            found += [rmsnorm_backward(x, 1, 1, 32, kind, eps=1e-5)]
        for (n, width), blocks in zip(odd, (1, 1, 2, 1, 3, 2), strict=True):
            x = draw(n, width, kind=kind)
            found.append(rmsnorm_backward(x, blocks, kind=kind))
        for n, width, vectors, threads in rows:
            x = draw(n + 2, width, kind=kind)
            found.append(rmsnorm_backward(x, n, vectors, threads, kind))
        found.append(rmsnorm_backward(draw(1, 16, kind=kind), 2, 1, 32, kind))
        found.append(rmsnorm_backward(draw(5, 8, kind=kind), 1, 1, 32, kind))
        found += of_v3s_width(kind)
    x = draw(1, 264, kind=BF16)  # 32 warps, of which two have work
    found += [rmsnorm(x, 1, 1024, BF16), add_rmsnorm(x, 1, 1024, BF16)]
    found.append(rmsnorm_backward(x, 1, 1, 1024, BF16))
    return found


def of_v3s_width(kind: str) -> list[Job]:
    """A row of V3's 7,168 numbers, on 7 and 14 warps, as the host shares it out."""
    x, per = draw(1, 7168, kind=kind), PER[kind]
    forward, backward = (32 // per, 224), (16 // per, 448)
    return [
        rmsnorm(x, *forward, kind), add_rmsnorm(x, *forward, kind),
        rmsnorm_backward(x, 1, *backward, kind),
    ]  # fmt: skip


def all_cases() -> list[Job]:
    """Every case that takes a moment in the simulator."""
    return norm_cases() + rope_cases() + swiglu_cases() + loss_cases()


def of_v3(kind: str = BF16) -> list[Job]:
    """One row of V3's 129,280 words: seconds in the simulator."""
    V = 129_280
    return [
        cross_entropy(1, V, 512, kind, online=True),
        cross_entropy_backward(1, V, 512, kind, online=True),
    ]
