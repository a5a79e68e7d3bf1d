"""The benchmark of the kernels as far as it goes without a GPU.

Its arms compute one thing, its clock is asked in the right order, a row holds what it
says, and without a GPU it refuses. Ours run in the simulator here.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))

import kernel_speed as speed  # noqa: E402

SMALL = {"rope": (2, 3, 16), "swiglu": (2, 40), "swiglu_backward": (2, 40)}
each_kernel = pytest.mark.parametrize("kernel", speed.FORMULAS)
each_dtype = pytest.mark.parametrize("dtype", speed.SIZES)


def small(kernel: str, dtype: str) -> dict[str, torch.Tensor]:
    return speed.inputs(kernel, SMALL.get(kernel, (3, 72)), dtype, "cpu")


# --- all arms compute one thing -------------------------------------------------------


@each_dtype
@each_kernel
def test_arms_agree_with_float64(kernel: str, dtype: str) -> None:
    arms = speed.calls(kernel, ("plain", "fast", "eager"))
    found = speed.errors(kernel, arms, small(kernel, dtype))
    assert found.keys() == {"plain", "fast", "eager"}
    speed.refuse_wrong(kernel, dtype, found)


def double(kernel: str) -> tuple[dict, list[torch.Tensor]]:
    """Inputs in float64, and the formula's answers."""
    given = {k: t.double() if t.is_floating_point() else t
             for k, t in small(kernel, "float32").items()}  # fmt: skip
    return given, [*speed.FORMULAS[kernel](given)]


def test_formulas_are_torchs_own_gradients() -> None:
    """The backward formulas, which all arms are held to, against autograd."""
    given, found = double("rmsnorm_backward")
    x, g = (given[n].clone().requires_grad_() for n in ("x", "g"))
    y = F.rms_norm(x, x.shape[-1:], g, speed.EPS)
    expected = torch.autograd.grad(y, (x, g), given["dy"])
    torch.testing.assert_close(found, [*expected], rtol=1e-6, atol=1e-6)

    given, found = double("swiglu_backward")
    gate, up = (given[n].clone().requires_grad_() for n in ("gate", "up"))
    expected = torch.autograd.grad(F.silu(gate) * up, (gate, up), given["dh"])
    torch.testing.assert_close(found, [*expected], rtol=1e-12, atol=1e-12)

    given, found = double("cross_entropy_backward")
    z = given["logits"].clone().requires_grad_()
    loss = F.cross_entropy(z, given["targets"], reduction="none")
    (expected,) = torch.autograd.grad(loss, z, given["dlosses"])
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-8)


def test_the_formula_of_rope_is_a_product_of_complex_numbers() -> None:
    given, (found,) = double("rope")
    x = torch.view_as_complex(given["x"].unflatten(-1, (-1, 2)))
    turns = torch.view_as_complex(given["turns"].unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(x * turns[:, None]).flatten(-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_plain_and_fast_are_different_kernels(monkeypatch) -> None:
    seen = []
    launch = speed.wrappers.launch

    def watched(kernel, *rest):
        seen.append(kernel.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(speed.wrappers, "launch", watched)
    given = small("swiglu", "float32")
    for arm in ("plain", "fast"):
        with speed.plainly(arm):
            speed.OURS["swiglu"](given)
    assert seen == ["swiglu_plain", "swiglu"]


def test_a_wrong_arm_stops_the_run() -> None:
    given = small("rmsnorm", "bfloat16")
    arms = {"doubled": lambda t: (2 * speed.FORMULAS["rmsnorm"](t)[0],)}
    found = speed.errors("rmsnorm", arms, given)
    assert found["doubled"] == pytest.approx(1, abs=0.01)
    with pytest.raises(RuntimeError, match="rmsnorm, doubled: differs .* by 1.0e"):
        speed.refuse_wrong("rmsnorm", "bfloat16", found)
    with pytest.raises(RuntimeError, match="differs"):
        speed.refuse_wrong("rmsnorm", "bfloat16", {"no number": float("nan")})


TRITON = """
import json, sys
sys.path.insert(0, "book")
import kernel_speed as speed
small = json.loads(sys.argv[1])
for kernel in speed.FORMULAS:
    for dtype in speed.SIZES:
        given = speed.inputs(kernel, small.get(kernel, (3, 1016)), dtype, "cpu")
        found = speed.errors(kernel, speed.calls(kernel, ("triton",)), given)
        speed.refuse_wrong(kernel, dtype, found)
print("all agree")
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="torch's CPU build has no Triton"
)
def test_the_triton_versions_agree_in_its_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRITON, json.dumps(SMALL)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "all agree\n", done.stderr[-2000:]


# --- turns and rows -------------------------------------------------------------------


def test_arms_take_turns_and_no_one_always_begins() -> None:
    order: list[str] = []
    turns = {name: (lambda name=name: order.append(name)) for name in "abc"}
    ticks = iter(range(100))

    def seconds(call) -> float:
        call()
        return float(next(ticks))

    times = speed.interleaved(turns, seconds, rounds=3, warm_up=2)
    assert "".join(order) == "abcbcacababcbca"
    assert times == {"a": [7, 9, 14], "b": [8, 10, 12], "c": [6, 11, 13]}


def test_a_row_says_what_was_timed() -> None:
    """1.879 GB in 500 us are 3,759 GB/s; the copy had 2**30 bytes in 250 us."""
    times = [400e-6, 500e-6, 900e-6, 450e-6, 550e-6]
    row = speed.row("rmsnorm", "bfloat16", "fast", times, [250e-6] * 3, 437e-6, 2e-3)
    assert [row[k] for k in ("us_low", "us", "us_high")] == pytest.approx(
        [450, 500, 550]
    )
    assert row["gb_per_s"] == pytest.approx(3758.65, abs=0.01)
    assert row["of_copy"] == pytest.approx(3758.65 / 4294.967, abs=1e-4)
    assert (row["floor_us"], row["shape"]) == (pytest.approx(437), "65536 x 7168")
    assert (row["kernel"], row["arm"], row["error"]) == ("rmsnorm", "fast", 2e-3)


def test_floors_are_of_the_card_that_is_there() -> None:
    on_h200 = speed.floor_here("swiglu", "bfloat16", "NVIDIA H200")
    assert 1e6 * on_h200 == pytest.approx(93.6, abs=0.1)
    assert speed.floor_here("swiglu", "bfloat16", "NVIDIA H100 80GB HBM3") > on_h200
    other = speed.floor_here("swiglu", "bfloat16", "NVIDIA A100-SXM4-80GB")
    assert other != other  # no number rather than a wrong one


def test_shapes_are_those_of_the_work() -> None:
    for kernel, dimensions in speed.DIMENSIONS.items():
        assert speed.SHAPES[kernel] == " x ".join(map(str, dimensions))


# --- refusal --------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    written: list = []
    monkeypatch.setattr(speed, "write", lambda *given: written.append(given))
    with pytest.raises(SystemExit) as stopped:
        speed.main([])
    assert stopped.value.code == speed.NO_GPU and not written
    assert "NVIDIA GPU" in speed.NO_GPU and "kernel_predictions.py" in speed.NO_GPU


def test_without_triton_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def version(package: str) -> str:
        raise speed.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(speed.metadata, "version", version)
    assert re.search(r"needs triton and numba-cuda: pip install", speed.refusal())


@pytest.mark.parametrize("words", [["--kernels", "matmul"], ["--dtypes", "float16"]])
def test_what_it_does_not_know_is_refused(words, capsys) -> None:
    with pytest.raises(SystemExit):
        speed.main(words)
    assert "invalid choice" in capsys.readouterr().err
