"""Cases of rotations, SwiGLU and cross-entropy; as in `kernel_cases`."""

from functools import lru_cache

import numpy as np

from minidsv3.primitives import numpy_ref
from tests.kernel_jobs import (
    BF16,
    F32,
    NAN,
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

u32, f32 = np.uint32, np.float32


# --- rotary positions ---------------------------------------------------------------


def rope(
    B: int, T: int, heads: int, head: int, d_R: int, block=PLAIN_THREADS,
    kind: str = F32, back: bool = False, per_text: bool = False, dead: float = NAN,
    size: float = 1,
) -> Job:  # fmt: skip
    """The last d_R of each head turned, in place; the rest (``dead``) is not ours."""
    x = np.full((B, T, heads, head), float(dead))
    if dead == dead:
        x[:] = draw(*x.shape, kind=kind)
    x[..., head - d_R :] = live = draw(B, T, heads, d_R, kind=kind, size=size, seed=1)
    positions = np.arange(T) + 4093
    if per_text:
        positions = positions + 1000 * np.arange(B)[:, None]
    theta = 10000.0 ** (-2 * np.arange(d_R // 2) / d_R)
    rotation = numpy_ref.rope_rotation(positions, theta, np.float32)
    exact = numpy_ref.rope_rotation(positions, theta, np.float64)
    exact = rotation.astype(exact.dtype)
    turns = rotation.reshape(-1, d_R // 2).view(np.float32)  # cosine, sine, cosine, …
    if back:
        turned = numpy_ref.rope_backward(live, (exact,))
    else:
        turned, _ = numpy_ref.rope_forward(live, exact)
    y, error, kept = x.copy(), np.zeros(x.shape), np.ones(x.shape, bool)
    y[..., head - d_R :], kept[..., head - d_R :] = turned, False
    pairs = np.abs(live.reshape(*live.shape[:-1], -1, 2)).sum(-1)
    error[..., head - d_R :] = np.repeat(pairs, 2, axis=-1) * 3 * U
    way = " back" * back + " per text" * per_text + " dead numbers" * (dead == dead)
    return Job(
        f"x {B, T, heads, head}, d_R {d_R}{way}, block {block}",
        "rope_plain" if block == PLAIN_THREADS else "rope_fast",
        B * T,
        block,
        {"x": encoded(x, kind), "turns": turns.ravel()},
        (u32(heads), u32(head), u32(d_R), u32(len(turns)), f32(-1 if back else 1)),
        {"x": y},
        {"x": error},
        kept={"x": kept.ravel()},
    )


# --- SwiGLU -------------------------------------------------------------------------

EDGES = np.array(
    [0, -0.0, 1e-30, -1e-30, 1, -1, 16, -16, 17.5, -17.5, 40, -40, 87, -87, 89, -89,
     100, -100, 1e4, -1e4, 1e30, -1e30, 1e38, -3e38, 104, -104]
)  # fmt: skip


def sigmoid_error(a: Array, s: Array) -> Array:
    """Relative error of σ(a): that of exp(-a), whose exponent is off by 2 |a| U.

    A GPU's 2ˣ may be off by two units in the last place besides, its 1/x by one.
    """
    return ((1 - s) * (np.minimum(2 * np.abs(a), 400) + 4) + 5) * U


def swiglu(n: int, each: int = 1, threads: int = 256, kind: str = F32) -> Job:
    """``silu(gate) up`` of n numbers, of which a thread takes one or eight."""
    a, b = gates(n, kind), draw(n, kind=kind, seed=1)
    h, s = numpy_ref.silu_forward(a)[0] * b, numpy_ref.sigmoid(a)
    return Job(
        f"{n} numbers in blocks of {threads}",
        "swiglu_plain" if each == 1 else "swiglu_fast",
        -(-n // (each * threads)),
        threads,
        {"gate": encoded(a, kind), "up": encoded(b, kind), "h": blank(n, kind)},
        (u32(n),),
        {"h": h},
        {"h": np.abs(h) * (sigmoid_error(a, s) + 4 * U) + flushed(a * b, s)},
    )


def swiglu_backward(n: int, each: int = 1, threads: int = 256, kind: str = F32) -> Job:
    """Its gradient."""
    a, b = gates(n, kind), draw(n, kind=kind, seed=1)
    dh = draw(n, kind=kind, seed=2)
    silu, saved = numpy_ref.silu_forward(a)
    dgate, s = numpy_ref.silu_backward(dh * b, saved), numpy_ref.sigmoid(a)
    relative = sigmoid_error(a, s)
    left = np.where(1 - s > U / 2, s * relative + U, 1 - s)  # error of 1 - σ
    slope = s * (1 + np.abs(a) * (1 - s)) * (relative + 5 * U) + s * np.abs(a) * left
    return Job(
        f"{n} numbers in blocks of {threads}",
        "swiglu_backward_plain" if each == 1 else "swiglu_backward_fast",
        -(-n // (each * threads)),
        threads,
        {"dh": encoded(dh, kind), "gate": encoded(a, kind), "up": encoded(b, kind),
         "dgate": blank(n, kind), "dup": blank(n, kind)},
        (u32(n),),
        {"dgate": dgate, "dup": dh * silu},
        {"dgate": np.abs(dh * b) * slope + flushed(a * b * dh, s),
         "dup": np.abs(dh * silu) * (relative + 3 * U) + flushed(a * dh, s)},
    )  # fmt: skip


def gates(n: int, kind: str) -> Array:
    """Numbers for the gate, the edges of σ first."""
    a = draw(n, kind=kind, size=3)
    a[: len(EDGES)] = rounded(EDGES, kind)[:n]
    return a


def flushed(factors: Array, s: Array) -> Array:
    """What is lost where σ is below the smallest normal number, or the result is."""
    return np.abs(factors) * np.minimum(s, SMALLEST) + SMALLEST


# --- cross-entropy ------------------------------------------------------------------


@lru_cache
def logits(rows: int, width: int, kind: str, what: str) -> Array:
    """Logits of a kind, by its name, (rows, width) in float64."""
    z = draw(rows, width, kind=kind, size=3)
    if what == "rising":  # a new largest in every vector of a thread
        z = z + np.linspace(-40, 40, width)
    elif what == "falling":
        z = z - np.linspace(-40, 40, width)
    elif what == "far below zero":
        z = z - 20000
    elif what == "large":
        z = z * 1000
    elif what == "equal":
        z = 0 * z + 2.5
    elif what == "masked":
        z[:, width // 3 :] = -np.inf
    elif what == "masked before":  # whole threads see nothing else at first, or ever
        z[:, : -(width // 3)] = -np.inf
    return rounded(z, kind)


def targets_of(rows: int, width: int, what: str) -> Array:
    """Targets first, last and between; where a mask is, before it."""
    last = max(width // 3 - 1, 0) if what == "masked" else width - 1
    first = width - width // 3 if what == "masked before" else 0
    middle = (first + last) // 2
    return np.resize([last, first, middle, max(last - 1, first)], rows).astype(np.int64)


def exponent_error(z: Array, terms: int) -> float:
    """Relative error of a probability: exponents are z log2(e), rounded twice."""
    return (4 * np.abs(z[np.isfinite(z)]).max() + terms + 10) * U


def cross_entropy(
    rows: int, width: int, threads: int = PLAIN_THREADS, kind: str = F32,
    what: str = "normal", online: bool = False,
) -> Job:  # fmt: skip
    """The loss of each row and its log-sum-exp."""
    z, t = logits(rows, width, kind, what), targets_of(rows, width, what)
    one = [numpy_ref.cross_entropy_forward(z[n], t[n : n + 1]) for n in range(rows)]
    losses = np.array([loss for loss, _ in one])
    log_sums = losses + z[np.arange(rows), t]
    error = np.full(rows, exponent_error(z, -(-width // threads) + threads // 32))
    return Job(
        f"{rows} of {width} on {threads}, {what}",
        "cross_entropy_fast" if online else "cross_entropy_plain",
        rows,
        threads,
        {"logits": encoded(z, kind), "targets": t,
         "losses": blank(rows, F32), "log_sums": blank(rows, F32)},
        (u32(width),),
        {"losses": losses, "log_sums": log_sums},
        {"losses": error, "log_sums": error},
    )  # fmt: skip


def no_target(online: bool, kind: str = F32) -> Job:
    """Targets just outside their rows, and far: NaN, whose log-sum-exp is right."""
    job = cross_entropy(4, 24, 32 if online else PLAIN_THREADS, kind, online=online)
    job.arrays["targets"][:] = [-1, 24, 2**32 + 3, -(2**63)]
    losses = np.full(4, NAN)
    return Job(
        "targets outside", job.kernel, 4, job.block, job.arrays, job.scalars,
        {**job.exact, "losses": losses}, job.error,
    )  # fmt: skip


def cross_entropy_backward(
    rows: int, width: int, threads: int = PLAIN_THREADS, kind: str = F32,
    what: str = "normal", wide: bool = False,
) -> Job:  # fmt: skip
    """``dz = (p - onehot) dloss`` in the place of z, the log-sum-exp given."""
    z, t = logits(rows, width, kind, what), targets_of(rows, width, what)
    _, saved = numpy_ref.cross_entropy_forward(z, t)
    log_sums = rounded(saved[1] + z.max(axis=-1), F32)
    dlosses = draw(rows)
    p = np.exp(z - log_sums[:, None])
    saved = (z, log_sums, t, z.shape)
    dz = numpy_ref.cross_entropy_backward(rows, saved) * dlosses[:, None]
    hot = np.zeros(z.shape)
    hot[np.arange(rows), t] = 1
    error = (p * exponent_error(z, 0) + 2 * U * hot) * np.abs(dlosses[:, None])
    return Job(
        f"{rows} of {width} on {threads}, {what}",
        "cross_entropy_backward_fast" if wide else "cross_entropy_backward_plain",
        rows,
        threads,
        {"logits": encoded(z, kind), "targets": t,
         "log_sums": encoded(log_sums, F32), "dlosses": encoded(dlosses, F32)},
        (u32(width),),
        {"logits": dz},
        {"logits": error + np.abs(dz) * 2 * U + SMALLEST},
    )  # fmt: skip


# --- the cases ----------------------------------------------------------------------


def rope_cases() -> list[Job]:
    """V3: 128 heads of 192, of which 64 turn; and a key of 64, one head."""
    found = []
    for kind in (F32, BF16):
        found += [
            rope(1, 1, 1, 2, 2, kind=kind), rope(2, 3, 3, 10, 6, kind=kind),
            rope(2, 3, 2, 12, 4, kind=kind, per_text=True, dead=3),
            rope(1, 2, 5, 64, 64, kind=kind, back=True, size=1e20),
            rope(1, 1, 4, 192, 64, kind=kind, dead=3, back=True),
            rope(1, 1, 1, 8, 8, (1, 1), kind), rope(2, 3, 3, 24, 8, (1, 2), kind),
            rope(2, 3, 2, 40, 16, (2, 2), kind, per_text=True, dead=3),
            rope(1, 2, 5, 64, 64, (8, 5), kind, back=True, size=1e20),
            rope(1, 1, 5, 192, 64, (8, 2), kind, dead=3, back=True),
            rope(3, 2, 1, 64, 64, (8, 1), kind, per_text=True, size=1e-20),
        ]  # fmt: skip
    found.append(rope(1, 1, 128, 192, 64, (8, 32), BF16))
    found.append(rope(1, 1, 128, 192, 64, kind=BF16))
    return found


def swiglu_cases() -> list[Job]:
    """Single numbers, less than a block, exactly one, one more, and two."""
    found = []
    for kind in (F32, BF16):
        for make in (swiglu, swiglu_backward):
            found += [make(n, kind=kind) for n in (1, 26, 255, 256, 257)]
            found += [make(n, 8, 32, kind) for n in (8, 248, 256, 264, 520)]
            found.append(make(2056, 8, 256, kind))
    return found


def loss_cases() -> list[Job]:
    """Words from 1 to V3's; the fast kernels' 32 threads reach 256 at once."""
    found = []
    several = ["rising", "falling", "far below zero", "large", "equal", "masked",
               "masked before"]  # fmt: skip
    odd = [(1, 1), (2, 7), (3, 127), (1, 128), (2, 129), (1, 300)]
    wide = [(1, 8, 64), (3, 248, 32), (1, 256, 32), (2, 264, 32), (1, 520, 64),
            (1, 4104, 512)]  # fmt: skip
    for kind in (F32, BF16):
        for make in (cross_entropy, cross_entropy_backward):
            found += [make(*shape, kind=kind) for shape in odd]
            found += [make(2, 260, kind=kind, what=what) for what in several]
            found += [make(*shape, kind, "normal", True) for shape in wide]
            found += [make(2, 1024, 32, kind, what, True) for what in several]
        found.append(cross_entropy(1, 264, 1024, kind, "normal", True))
        found += [no_target(False, kind), no_target(True, kind)]
    return found
