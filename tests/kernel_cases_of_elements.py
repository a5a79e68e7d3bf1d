"""Cases of rotations, SwiGLU and cross-entropy; as in `kernel_cases`."""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from minidsv3.gpu.reductions import LOWEST
from minidsv3.primitives import numpy_ref
from tests.kernel_jobs import (
    BF16,
    F32,
    NAN,
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


# --- rotary positions ---------------------------------------------------------------


def rope(
    B: int, T: int, heads: int, head: int, d_R: int, down: int = 0, deep: int = 0,
    kind: str = F32, back: bool = False, per_text: bool = False, dead: float = NAN,
    size: float = 1,
) -> Job:  # fmt: skip
    """The last d_R of each head turned, in place; the rest (``dead``) is not ours.

    Fast: by blocks of ``down`` heads and ``deep`` tokens.
    """
    per = PER[kind]
    block = (d_R // per, down, deep) if down else PLAIN_THREADS
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
        "rope_fast" if down else "rope_plain",
        -(-B * T // deep) if down else B * T,
        block,
        {"x": encoded(x, kind), "turns": turns.ravel()},
        (*[u32(B * T)] * bool(down), u32(heads), u32(head), u32(d_R), u32(len(turns)),
         f32(-1 if back else 1)),
        {"x": y},
        {"x": error},
        (per,) if down else (),
        kept={"x": kept.ravel()},
    )  # fmt: skip


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


def swiglu(n: int, threads: int = 256, kind: str = F32, wide: bool = False) -> Job:
    """``silu(gate) up`` of n numbers, of which a thread takes one or 16 bytes."""
    each = PER[kind] if wide else 1
    a, b = gates(n, kind), draw(n, kind=kind, seed=1)
    h, s = numpy_ref.silu_forward(a)[0] * b, numpy_ref.sigmoid(a)
    return Job(
        f"{n} numbers in blocks of {threads}",
        "swiglu_fast" if wide else "swiglu_plain",
        -(-n // (each * threads)),
        threads,
        {"gate": encoded(a, kind), "up": encoded(b, kind), "h": blank(n, kind)},
        (u64(n),),
        {"h": h},
        {"h": np.abs(h) * (sigmoid_error(a, s) + 4 * U) + flushed(a * b, s)},
        (each,) if wide else (),
    )


def swiglu_backward(
    n: int, threads: int = 256, kind: str = F32, wide: bool = False
) -> Job:
    """Its gradient."""
    each = PER[kind] if wide else 1
    a, b = gates(n, kind), draw(n, kind=kind, seed=1)
    dh = draw(n, kind=kind, seed=2)
    silu, saved = numpy_ref.silu_forward(a)
    dgate, s = numpy_ref.silu_backward(dh * b, saved), numpy_ref.sigmoid(a)
    relative = sigmoid_error(a, s)
    left = np.where(1 - s > U / 2, s * relative + U, 1 - s)  # error of 1 - σ
    slope = s * (1 + np.abs(a) * (1 - s)) * (relative + 5 * U) + s * np.abs(a) * left
    return Job(
        f"{n} numbers in blocks of {threads}",
        "swiglu_backward_fast" if wide else "swiglu_backward_plain",
        -(-n // (each * threads)),
        threads,
        {"dh": encoded(dh, kind), "gate": encoded(a, kind), "up": encoded(b, kind),
         "dgate": blank(n, kind), "dup": blank(n, kind)},
        (u64(n),),
        {"dgate": dgate, "dup": dh * silu},
        {"dgate": np.abs(dh * b) * slope + flushed(a * b * dh, s),
         "dup": np.abs(dh * silu) * (relative + 3 * U) + flushed(a * dh, s)},
        (each,) if wide else (),
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
    elif what.startswith("around"):
        z = z + float(what.removeprefix("around"))
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


def coarse_error(z: Array, terms: int) -> float:
    """Relative error of a probability whose exponent is z log2(e), rounded twice."""
    return (4 * np.abs(z[np.isfinite(z)]).max() + terms + 10) * U


def below(z: Array) -> Array:
    """How far each logit is below its row's largest; 0 for what is infinitely far."""
    far = z.max(axis=-1, keepdims=True) - z
    return np.where(np.isfinite(far), far, 0)


def log_sum_error(z: Array, log_sums: Array, terms: int) -> Array:
    """Of the log-sum above the maximum, (rows); an offset of all logits is not in it.

    An exponent is a difference to the maximum, rounded, times a rounded log2(e), and
    an exp2 has 2^-22; terms are added. The logarithm has 2^-22, too, of itself or of 1.
    """
    p = np.exp(z - z.max(axis=-1, keepdims=True) - log_sums[:, None])
    exponents = (p * (3 * below(z) + 4)).sum(axis=-1)
    return (exponents + terms + 4 * np.maximum(np.log(2), log_sums) + 2 * log_sums) * U


def cross_entropy(
    rows: int, width: int, threads: int = PLAIN_THREADS, kind: str = F32,
    what: str = "normal", online: bool = False,
) -> Job:  # fmt: skip
    """The loss of each row, its maximum, and its log-sum above that."""
    z, t = logits(rows, width, kind, what), targets_of(rows, width, what)
    one = [numpy_ref.cross_entropy_forward(z[n], t[n : n + 1]) for n in range(rows)]
    losses = np.array([loss for loss, _ in one])
    log_sums = np.array([saved[1][0] for _, saved in one])
    highest = z.max(axis=-1)
    coarse = coarse_error(z, -(-width // threads) + threads // 32)
    each = PER[kind] if online else 1
    steps = -(-width // (each * threads))  # online, the sum shrinks once a step
    terms = steps * (each + 5 * online) + 10 + threads // 32
    error = log_sum_error(z, log_sums, terms)
    distance = highest - z[np.arange(rows), t]
    error_of_losses = error + (distance + np.abs(losses)) * U
    return Job(
        f"{rows} of {width} on {threads}, {what}",
        "cross_entropy_fast" if online else "cross_entropy_plain",
        rows,
        threads,
        {"logits": encoded(z, kind), "targets": t, "losses": blank(rows, F32),
         "highest": blank(rows, F32), "log_sums": blank(rows, F32)},
        (u32(width),),
        {"losses": losses, "highest": highest, "log_sums": log_sums},
        {"losses": np.minimum(error_of_losses, coarse), "highest": 0 * highest,
         "log_sums": np.minimum(error, coarse)},
        (PER[kind],) if online else (),
    )  # fmt: skip


def cross_entropy_backward(
    rows: int, width: int, threads: int = PLAIN_THREADS, kind: str = F32,
    what: str = "normal", online: bool = False,
) -> Job:  # fmt: skip
    """``dz = (p - onehot) dloss`` in the place of z; maximum and log-sum are given."""
    z, t = logits(rows, width, kind, what), targets_of(rows, width, what)
    highest = z.max(axis=-1)
    _, (_, log_sums, *_) = numpy_ref.cross_entropy_forward(z, t)
    log_sums = rounded(log_sums, F32)
    dlosses = draw(rows)
    saved = (z - highest[:, None], log_sums, t, z.shape)
    dz = numpy_ref.cross_entropy_backward(rows, saved) * dlosses[:, None]
    p = np.exp(saved[0] - log_sums[:, None])
    hot = np.zeros(z.shape)
    hot[np.arange(rows), t] = 1
    relative = (4 * (below(z) + log_sums[:, None]) + 5) * U
    relative = np.minimum(relative, coarse_error(z, 0))
    error = (p * relative + 2 * U * hot) * np.abs(dlosses[:, None])
    return Job(
        f"{rows} of {width} on {threads}, {what}",
        "cross_entropy_backward_fast" if online else "cross_entropy_backward_plain",
        rows,
        threads,
        {"logits": encoded(z, kind), "targets": t,
         "highest": encoded(highest, F32), "log_sums": encoded(log_sums, F32),
         "dlosses": encoded(dlosses, F32)},
        (u32(width),),
        {"logits": dz},
        {"logits": error + np.abs(dz) * 2 * U + SMALLEST},
        (PER[kind],) if online else (),
    )  # fmt: skip


def no_target(make, online: bool, kind: str) -> Job:
    """Targets just outside their rows, far, and torch's -100: NaN, and theirs only."""
    job = make(6, 24, 32 if online else PLAIN_THREADS, kind, online=online)
    targets = job.arrays["targets"].copy()
    targets[1:] = [-1, 24, 2**32 + 3, -(2**63), -100]
    exact = dict(job.exact)
    result = "losses" if make is cross_entropy else "logits"
    exact[result] = exact[result].copy()
    exact[result][1:] = NAN
    arrays = {**job.arrays, "targets": targets}
    return replace(job, name="targets outside", arrays=arrays, exact=exact)


def nothing_left(make, online: bool, kind: str) -> Job:
    """The last row is -inf alone: its loss and its gradient are none, as torch's."""
    job = make(2, 24, 32 if online else PLAIN_THREADS, kind, online=online)
    arrays, exact = dict(job.arrays), dict(job.exact)
    z = logits(2, 24, kind, "normal").copy()
    z[1] = -np.inf
    arrays["logits"] = encoded(z, kind)
    row = {"losses": NAN, "highest": float(LOWEST), "log_sums": -np.inf, "logits": NAN}
    for name, values in row.items():
        if name in exact:
            exact[name] = exact[name].copy()
            exact[name][1] = values
        elif name in arrays and name != "logits":
            arrays[name] = arrays[name].copy()
            arrays[name][1] = values
    return replace(job, name="a row of -inf", arrays=arrays, exact=exact)


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
            rope(1, 1, 1, 8, 8, 1, 1, kind), rope(2, 3, 3, 24, 8, 2, 1, kind),
            rope(2, 3, 2, 40, 16, 2, 4, kind, per_text=True, dead=3),
            rope(1, 2, 5, 64, 64, 5, 1, kind, back=True, size=1e20),
            rope(1, 1, 5, 192, 64, 2, 2, kind, dead=3, back=True),
            rope(3, 2, 1, 64, 64, 1, 3, kind, per_text=True, size=1e-20),
            rope(1, 5, 1, 8, 8, 1, 4, kind, dead=3),
        ]  # fmt: skip
    found.append(rope(1, 1, 128, 192, 64, 32, 1, BF16))
    found.append(rope(1, 1, 128, 192, 64, kind=BF16))
    return found


def swiglu_cases() -> list[Job]:
    """Single numbers, less than a block, exactly one, one more, and two."""
    found = []
    for kind in (F32, BF16):
        for make in (swiglu, swiglu_backward):
            found += [make(n, kind=kind) for n in (1, 26, 255, 256, 257)]
            for vectors in (31, 1, 32, 33, 65):
                found.append(make(PER[kind] * vectors, 32, kind, True))
            found.append(make(PER[kind] * 257, 256, kind, True))
    return found


def loss_cases() -> list[Job]:
    """Words from 1 to V3's; the fast kernels' 32 threads reach 32 vectors at once."""
    found = []
    several = ["rising", "falling", "far below zero", "large", "equal", "masked",
               "masked before", "around 100", "around -1e4", "around 1e4"]  # fmt: skip
    odd = [(1, 1), (2, 7), (3, 127), (1, 128), (2, 129), (1, 300)]
    in_vectors = [(3, 31, 32), (1, 1, 64), (1, 32, 32), (2, 33, 32), (1, 65, 64),
                  (1, 513, 512)]  # fmt: skip
    for kind in (F32, BF16):
        wide = [(n, PER[kind] * width, threads) for n, width, threads in in_vectors]
        for make in (cross_entropy, cross_entropy_backward):
            found += [make(*shape, kind=kind) for shape in odd]
            found += [make(2, 260, kind=kind, what=what) for what in several]
            found += [make(*shape, kind, "normal", True) for shape in wide]
            found += [make(2, 1024, 32, kind, what, True) for what in several]
            for online in (False, True):
                found += [no_target(make, online, kind)]
                found += [nothing_left(make, online, kind)]
        found.append(cross_entropy(1, 264, 1024, kind, "normal", True))
    return found
