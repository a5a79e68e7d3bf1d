"""Chapter 11's reports of compiled kernels: the committed rows, and what they claim."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy import float32, uint32

BOOK = Path(__file__).parents[2] / "book"
sys.path.insert(0, str(BOOK))

import kernel_reports as reports  # noqa: E402
from rows import read  # noqa: E402

from minidsv3.gpu.simulator import launch  # noqa: E402

ROWS = {(r["case"], r["architecture"]): r for r in read("kernel_reports")}
each_case = pytest.mark.parametrize("case", reports.CASES)
hopper = {case: ROWS[case, "sm_90a"] for case in reports.CASES}
EPS = 1e-6


def test_every_case_has_a_row_for_every_architecture() -> None:
    assert list(ROWS) == [
        (case, arch) for case in reports.CASES for arch in reports.ARCHITECTURES
    ]


@each_case
@pytest.mark.parametrize("architecture", reports.ARCHITECTURES)
def test_the_rows_are_what_the_compiler_says(case: str, architecture: str) -> None:
    assert settled(reports.row(case, architecture)) == settled(ROWS[case, architecture])


def settled(row: dict) -> dict:
    """A row without what changes from build to build.

    Of "bins", whose bins lie in memory, the compiler makes now 38 and now 40 loads and
    stores there for sm_80, from the same source; what is claimed is that there are any.
    """
    if row["case"] != "bins":
        return row
    assert int(row["spills"]) > 8, "fewer than one a bin"
    loose = {"spills", "instructions", "order"}
    return {name: value for name, value in row.items() if name not in loose}


def test_rows_say_where_they_come_from() -> None:
    head = (BOOK / "results/kernel_reports.csv").read_text().splitlines()[:2]
    assert head[0] == "# python book/kernel_reports.py"
    assert "numba-cuda 0." in head[1] and "nvidia-nvjitlink 13." in head[1]


def test_order_counts_neighbours() -> None:
    sass = "".join(
        f"        /*{16 * n:04x}*/                   {line} ;\n"
        for n, line in enumerate(
            ("LDG.E.128 R4, [R2]", "LDG.E R8, [R2]", "IADD3 R1, R1, 1, RZ",
             "@P0 LDG.E R9, [R2]", "FFMA R4, R4, R4, RZ", "BAR.SYNC 0x0",
             "@!PT LDS RZ, [RZ]", "@!PT LDG.E R1, [R2]", "STG.E [R2], R4")
        )
    )  # fmt: skip
    assert reports.order(sass) == "LDG*3 FFMA BAR STG"


def until_the_barrier(order: str) -> list[str]:
    return order[: order.index("BAR")].split()


# --- what the chapter says ------------------------------------------------------------


def test_the_guard_makes_bfloat16_wait_and_not_float32() -> None:
    for arch in reports.ARCHITECTURES:
        assert ROWS["loads first", arch]["order"].startswith("LDG*4 FFMA*32 BAR")
        waiting = "LDG FFMA*8 LDG FFMA*8 LDG FFMA*8 LDG FFMA*8 BAR"
        assert ROWS["guarded", arch]["order"].startswith(waiting)
        lifted = "LDG*8 FFMA*32 BAR"
        assert ROWS["guarded, float32", arch]["order"].startswith(lifted)
    assert hopper["loads first"]["under_way"] == 64
    assert hopper["guarded"]["under_way"] == 16


def test_the_library_asks_for_gains_before_the_barrier() -> None:
    for case, early in (("library", 8), ("loads first", 4)):
        words = until_the_barrier(hopper[case]["order"])
        loads = [w.removeprefix("LDG") for w in words if w.startswith("LDG")]
        assert sum(int(n[1:] or 1) for n in loads) == early


def test_only_the_controls_spill() -> None:
    spilling = {case for case, row in hopper.items() if row["spills"] or row["stack"]}
    assert spilling == {"32 registers", "counted", "bins"}


def test_float64_slips_where_it_must() -> None:
    doubles = {case: row["doubles"] for case, row in hopper.items() if "*" in case}
    assert {case for case, n in doubles.items() if n} == {"a * 0.1", "a * 0.5 + b"}


def test_a_quotient_has_a_way_out() -> None:
    exact, near = hopper["a / b"], hopper["a * reciprocal(b)"]
    assert exact["instructions"] > 3 * near["instructions"]
    assert exact["branches"] > near["branches"] == 1


# --- the variations are right ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        (reports.rmsnorm_guarded, ()),
        (reports.rmsnorm_loads_first, ()),
        (reports.rmsnorm_counted, (uint32(4),)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_variations_normalise(kernel, more: tuple, dtype: str) -> None:
    rng, rows, width = np.random.default_rng(0), 2, 1000  # 125 vectors for 4 × 32
    x, g = rng.standard_normal((rows, width)), rng.normal(1, 0.2, width)
    if dtype == "bfloat16":
        bits = [a.astype(ml_dtypes.bfloat16).view(np.uint16) for a in (x, g)]
        x, g = (b.view(ml_dtypes.bfloat16).astype(float) for b in bits)
    else:
        bits = [a.astype(np.float32) for a in (x, g)]
        x, g = (b.astype(float) for b in bits)
    y, r = np.zeros_like(bits[0]).reshape(-1), np.zeros(rows, np.float32)
    numbers = uint32(width), float32(1 / width), float32(EPS)
    launch(kernel, rows, 32, bits[0].reshape(-1), bits[1], y, r, *numbers, *more)
    exact = g * x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS)
    ours = y.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else y
    error = np.abs(ours.astype(float).reshape(rows, width) - exact).max()
    assert error < (2e-2 if dtype == "bfloat16" else 5e-6)


def test_bins_count_and_pick_picks() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1000, 16 * 5, dtype=np.uint32)
    y = np.zeros(8 * 5, np.float32)
    launch(reports.bins, 1, 32, x, y, uint32(5))
    expected = [np.bincount(part & 7, minlength=8) for part in x.reshape(5, 16)]
    np.testing.assert_array_equal(y.reshape(5, 8), expected)
    numbers = rng.standard_normal(8 * 5).astype(np.float32)
    which, out = rng.integers(0, 8, 5, dtype=np.uint32), np.zeros(5, np.float32)
    launch(reports.picked, 1, 32, numbers, which, out, uint32(5))
    np.testing.assert_array_equal(out, numbers.reshape(5, 8)[np.arange(5), which])
