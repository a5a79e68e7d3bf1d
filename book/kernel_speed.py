"""The first kernels on a GPU, beside torch, torch.compile, Triton and the floor.

    make bench-gpu        or        python book/kernel_speed.py

``kernel_speed.csv``: a row for each kernel and arm on the shape of its target. All arms
of a kernel take turns in one run: before each turn the L2 cache is filled with other
bytes, CUDA events stand before and after, the median of the turns counts. Each arm's
result is compared with the formula in float64 on some rows first; one that is wrong
stops the run. of_copy is the part of the bandwidth that a plain copy had in the same
run, which is an arm itself: by the bytes that the fast kernel must move, for all arms.

Needs an NVIDIA GPU, the ``cuda`` extra, and Triton (which torch brings for Linux).
"""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib import metadata
from statistics import quantiles
from unittest import mock

import torch
import torch.nn.functional as F
from kernel_predictions import (
    HEADS,
    LOSS_ROWS,
    ROTARY,
    SHAPES,
    SIZES,
    TOKENS,
    D,
    V,
    jobs,
)
from rows import Row, write
from torch import Tensor
from tqdm import tqdm

from minidsv3.gpu.roofline import MACHINES, floor
from minidsv3.primitives import cuda_kernels as wrappers

EPS = 1e-6
ROUNDS, WARM_UP = 50, 5
FLUSHED = 256 * 2**20
"""Bytes written before each turn: five times an H200's L2 cache."""
COPIED = 2**30
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
ARMS = ("plain", "fast", "eager", "compile", "triton")
NO_GPU = (
    "kernel_speed measures on an NVIDIA GPU, and torch finds none here. What the "
    "kernels should reach is predicted without one: book/kernel_predictions.py"
)
DIMENSIONS = {
    **dict.fromkeys(("rmsnorm", "add_rmsnorm", "rmsnorm_backward"), (TOKENS, D)),
    "rope": (TOKENS, HEADS, ROTARY),
    **dict.fromkeys(("swiglu", "swiglu_backward"), (32_768, 2_048)),
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), (LOSS_ROWS, V)),
}

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], tuple[Tensor, ...]]


# --- what is computed -----------------------------------------------------------------


def inputs(kernel: str, shape: Sequence[int], dtype: str, device: str) -> Tensors:
    """Random tensors of a kernel, the same at every call."""
    torch.manual_seed(0)
    number = getattr(torch, dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=number)

    if kernel == "rope":
        tokens, heads, rotary = shape
        angles = torch.rand(tokens, rotary // 2, device=device) * 6.28
        turns = torch.stack((angles.cos(), angles.sin()), -1).flatten(1)
        return {"x": normal(1, tokens, heads, rotary), "turns": turns}
    names = {
        "rmsnorm": "x",
        "add_rmsnorm": "x residual",
        "rmsnorm_backward": "dy x",
        "swiglu": "gate up",
        "swiglu_backward": "dh gate up",
    }.get(kernel, "logits")
    given = {name: normal(*shape) for name in names.split()}
    if "norm" in kernel:
        given["g"] = normal(shape[-1])
    if kernel == "rmsnorm_backward":
        squares = given["x"].float().square().mean(-1)
        given["r"] = (squares + EPS).rsqrt()
    if "logits" in given:
        given["targets"] = torch.randint(shape[-1], shape[:1], device=device)
        given["highest"] = given["logits"].float().amax(-1)
        log_sums = given["logits"].float().logsumexp(-1)
        given["log_sums"] = log_sums - given["highest"]
        given["dlosses"] = torch.full(shape[:1], 1 / shape[0], device=device)
    return given


def _up(x: Tensor) -> Tensor:
    """In float32, or more where it is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], g, EPS)


def _add_rmsnorm(t: Tensors) -> tuple[Tensor, ...]:
    total = t["x"] + t["residual"]
    return total, _normed(total, t["g"])


def _rmsnorm_backward(t: Tensors) -> tuple[Tensor, ...]:
    dy, x, r = _up(t["dy"]), _up(t["x"]), t["r"][:, None]
    dz = dy * _up(t["g"])
    dx = r * (dz - x * (dz * x).mean(-1, keepdim=True) * r * r)
    return dx.to(t["x"].dtype), (dy * x * r).sum(0).to(t["g"].dtype)


def _rope(t: Tensors) -> tuple[Tensor, ...]:
    even, odd = _up(t["x"]).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = t["turns"].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return (turned.flatten(-2).to(t["x"].dtype),)


def _swiglu_backward(t: Tensors) -> tuple[Tensor, ...]:
    dh, a, up = (_up(t[name]) for name in ("dh", "gate", "up"))
    s = a.sigmoid()
    found = dh * up * s * (1 + a * (1 - s)), dh * a * s
    return tuple(x.to(t["gate"].dtype) for x in found)


def _cross_entropy_backward(t: Tensors) -> tuple[Tensor, ...]:
    p = (_up(t["logits"]) - (t["highest"] + t["log_sums"])[:, None]).exp()
    word = torch.arange(p.shape[-1], device=p.device)
    p = p - (word == t["targets"][:, None]).to(p.dtype)
    return ((p * t["dlosses"][:, None]).to(t["logits"].dtype),)


FORMULAS: dict[str, Call] = {
    "rmsnorm": lambda t: (_normed(t["x"], t["g"]),),
    "add_rmsnorm": _add_rmsnorm,
    "rmsnorm_backward": _rmsnorm_backward,
    "rope": _rope,
    "swiglu": lambda t: (F.silu(t["gate"]) * t["up"],),
    "swiglu_backward": _swiglu_backward,
    "cross_entropy": lambda t: (
        F.cross_entropy(_up(t["logits"]), t["targets"], reduction="none"),
    ),
    "cross_entropy_backward": _cross_entropy_backward,
}
"""As one writes it in torch."""


def _turned(t: Tensors) -> tuple[Tensor, ...]:
    wrappers._turn_(t["x"], t["turns"], 1.0)
    return (t["x"],)


def _lost(t: Tensors) -> tuple[Tensor, ...]:
    wrappers._cross_entropy_backward_(
        t["logits"], t["targets"], t["highest"], t["log_sums"], t["dlosses"]
    )
    return (t["logits"],)


OURS: dict[str, Call] = {
    "rmsnorm": lambda t: wrappers._rmsnorm(t["x"], t["g"], EPS)[:1],
    "add_rmsnorm": lambda t: wrappers._add_rmsnorm(t["x"], t["residual"], t["g"], EPS)[
        :2
    ],
    "rmsnorm_backward": lambda t: wrappers._rmsnorm_backward(
        t["dy"], t["x"], t["g"], t["r"]
    ),
    "rope": _turned,
    "swiglu": lambda t: (wrappers._swiglu(t["gate"], t["up"]),),
    "swiglu_backward": lambda t: wrappers._swiglu_backward(t["dh"], t["gate"], t["up"]),
    "cross_entropy": lambda t: wrappers._cross_entropy(t["logits"], t["targets"])[:1],
    "cross_entropy_backward": _lost,
}


def plainly(arm: str) -> AbstractContextManager:
    """While inside, our operators take the plain kernels, if that is the arm."""
    if arm != "plain":
        return nullcontext()
    return mock.patch.object(wrappers, "wide", return_value=False)


def calls(kernel: str, arms: Sequence[str] = ARMS) -> dict[str, Call]:
    """How each arm computes a kernel."""
    found: dict[str, Call] = {}
    for arm in arms:
        if arm in ("plain", "fast"):
            found[arm] = OURS[kernel]
        elif arm == "eager":
            found[arm] = FORMULAS[kernel]
        elif arm == "compile":
            found[arm] = torch.compile(FORMULAS[kernel], fullgraph=True)
        else:
            import kernel_speed_triton

            found[arm] = kernel_speed_triton.CALLS[kernel]
    return found


def errors(kernel: str, arms: dict[str, Call], given: Tensors) -> dict[str, float]:
    """Relative error of each arm's results against the formula in float64.

    Kernels that work in place get copies.
    """
    exact = FORMULAS[kernel]({
        name: t.double() if t.is_floating_point() else t for name, t in given.items()
    })  # fmt: skip
    found = {}
    for arm, call in arms.items():
        with plainly(arm):
            got = call({name: t.clone() for name, t in given.items()})
        gaps = [(a.double() - b.double()).norm() / b.double().norm()
                for a, b in zip(got, exact, strict=True)]  # fmt: skip
        found[arm] = float(max(gaps))
    return found


def refuse_wrong(kernel: str, dtype: str, found: dict[str, float]) -> None:
    """Raise RuntimeError if an arm does not compute what the others do."""
    for arm, error in found.items():
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{kernel}, {arm}: differs from float64 by {error:.1e}, and for "
                f"{dtype} {TOLERANCE[dtype]:.0e} is allowed; a wrong kernel is not "
                "timed"
            )


# --- how it is timed ------------------------------------------------------------------


def interleaved(
    turns: dict[str, Callable[[], object]],
    seconds: Callable[[Callable[[], object]], float],
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Seconds of each turn in each round, without the first rounds.

    Every round begins with another one, so that nobody always follows the same.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for n in range(warm_up + rounds):
        at = n % len(names)
        for name in names[at:] + names[:at]:
            taken = seconds(turns[name])
            if n >= warm_up:
                times[name].append(taken)
    return times


def on_the_gpu() -> Callable[[Callable[[], object]], float]:
    """A clock: seconds that the GPU takes for a call, its L2 cache emptied before.

    While the GPU writes the flushed bytes, the host prepares the call; so what is
    between the events is the GPU's time, and not the host's.
    """
    other = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def seconds(call: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3

    return seconds


def copying() -> Callable[[], object]:
    """A copy on the GPU, whose bandwidth the kernels are measured by."""
    a, b = (torch.empty(COPIED // 2, dtype=torch.uint8, device="cuda") for _ in "ab")
    return lambda: a.copy_(b)


def row(
    kernel: str, dtype: str, arm: str, times: list[float], copy: list[float],
    least: float, error: float,
) -> Row:  # fmt: skip
    """One line of the table: microseconds, and what part of the copy's bandwidth.

    copy: seconds of the copies of COPIED bytes in the same run. least: the floor.
    """
    low, middle, high = quantiles(times, n=4, method="inclusive")
    _, of_copy, _ = quantiles(copy, n=4, method="inclusive")
    bytes = jobs(SIZES[dtype], True)[kernel].bytes
    bandwidth = bytes / middle
    return {
        "kernel": kernel, "dtype": dtype, "shape": SHAPES[kernel], "arm": arm,
        "us": 1e6 * middle, "us_low": 1e6 * low, "us_high": 1e6 * high,
        "gb_per_s": bandwidth / 1e9, "of_copy": bandwidth / (COPIED / of_copy),
        "floor_us": 1e6 * least, "error": error,
    }  # fmt: skip


def floor_here(kernel: str, dtype: str, name: str) -> float:
    """Seconds by `gpu.roofline` on the machine of this name; NaN where it has none."""
    work = jobs(SIZES[dtype], True)[kernel].work
    known = [machine for machine in MACHINES if machine.name in name]
    return floor(known[0], work).seconds if known else float("nan")


def measured(kernel: str, dtype: str) -> list[Row]:
    """All arms of one kernel, in turns."""
    given = inputs(kernel, DIMENSIONS[kernel], dtype, "cuda")
    arms = calls(kernel)
    few = inputs(kernel, (64, *DIMENSIONS[kernel][1:]), dtype, "cuda")
    wrong = errors(kernel, arms, few)
    refuse_wrong(kernel, dtype, wrong)

    def turn(arm: str) -> Callable[[], object]:
        def run() -> object:
            with plainly(arm):
                return arms[arm](given)

        return run

    turns = {arm: turn(arm) for arm in arms} | {"copy": copying()}
    times = interleaved(turns, on_the_gpu())
    least = floor_here(kernel, dtype, torch.cuda.get_device_name())
    return [
        row(kernel, dtype, arm, times[arm], times["copy"], least, wrong[arm])
        for arm in arms
    ]


# --- all of it ------------------------------------------------------------------------


def refusal() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if not torch.cuda.is_available():
        return NO_GPU
    missing = []
    for package in ("triton", "numba-cuda"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return (
            f"kernel_speed also needs {' and '.join(missing)}: pip install "
            "'minidsv3[cuda]' with torch's build for CUDA (make TORCH=plain)"
        )
    return None


def driver_version() -> str:
    """The version of CUDA that the driver here is made for: 13.0."""
    from minidsv3.gpu.launch import driver

    _, version = driver().cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def head(words: Sequence[str]) -> list[str]:
    """Where the rows come from: command, machine, driver, versions, date."""
    tools = ("torch", "triton", "numba", "numba-cuda")
    said = ", ".join(f"{tool} {metadata.version(tool)}" for tool in tools)
    return [
        f"# python book/kernel_speed.py {' '.join(words)}".rstrip(),
        f"# {date.today()}, {torch.cuda.get_device_name()}, driver for CUDA "
        f"{driver_version()}, Python {platform.python_version()}, {said}",
        f"# median of {ROUNDS} turns, all arms of a kernel in one run",
    ]


def main(words: Sequence[str]) -> None:
    """Measure everything, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=FORMULAS, default=[*FORMULAS])
    parser.add_argument("--dtypes", nargs="+", choices=SIZES, default=["bfloat16"])
    options = parser.parse_args(words)
    if why := refusal():
        sys.exit(why)
    found = []
    for kernel in tqdm(options.kernels):
        for dtype in options.dtypes:
            found += measured(kernel, dtype)
            torch.cuda.empty_cache()
    write("kernel_speed", found, head(words))


if __name__ == "__main__":
    main(sys.argv[1:])
