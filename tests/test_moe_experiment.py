"""The numbers of chapter 3: where they come from, and the beginning of a row again."""

import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import kinds  # noqa: E402
import moe_experiment as experiment  # noqa: E402
import rows  # noqa: E402

TABLES = ("moe_balance", "moe_curves")


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_where_they_come_from(table: str) -> None:
    head = (rows.RESULTS / f"{table}.csv").read_text().splitlines()[:3]
    assert head[0].startswith("# python book/moe_experiment.py --seeds ")
    assert "Python 3" in head[1] and "NumPy" in head[1]
    assert "sha256" in head[2]


def test_every_arm_has_the_same_seeds_and_at_least_three() -> None:
    ends = experiment.read("moe_balance")
    seeds = [r["seed"] for r in ends if r["arm"] == "bias"]
    assert len(set(seeds)) == len(seeds) >= 3
    for arm in experiment.ARMS:
        assert [r["seed"] for r in ends if r["arm"] == arm] == seeds, arm
    looks = experiment.RECIPE.steps // experiment.EVERY
    assert len(experiment.read("moe_curves")) == looks * len(ends)


def test_an_end_is_the_end_of_its_way() -> None:
    last = {
        (r["arm"], r["seed"]): r
        for r in experiment.read("moe_curves")
        if r["step"] == experiment.RECIPE.steps
    }
    for row in experiment.read("moe_balance"):
        way = last[row["arm"], row["seed"]]
        assert row["bits"] == way["bits"]
        np.testing.assert_equal(row["max_vio"], way["max_vio"])


@pytest.mark.slow
def test_the_beginning_of_two_rows_again() -> None:
    """250 steps of 1,500, which the bias rule must tell from training without it.

    A router magnifies rounding: two runs that differ in the order of one addition were
    0.04 bits apart here, and a third in MaxVio. So this is as close as another machine,
    or a library that rounds otherwise, can be asked to come.
    """
    now = {}
    for arm in ("neither", "bias"):
        kept = next(r for r in experiment.read("moe_curves") if r["arm"] == arm)
        assert kept["seed"] == 0 and kept["step"] == experiment.EVERY
        *_, (_, params) = experiment.train(experiment.ARMS[arm], 0, experiment.EVERY)
        bits, loads = experiment.look(params, experiment.EXPERTS)
        now[arm] = experiment.balance(loads)["max_vio"]
        assert bits == pytest.approx(kept["bits"], abs=0.1)
        assert 1 / 1.5 < now[arm] / kept["max_vio"] < 1.5
    assert now["neither"] > 1.3 * now["bias"]


def test_the_sizes_of_the_models() -> None:
    """Counted by hand: what a token meets is as wide as the narrow dense model."""
    D, V = 64, 257
    attention, norms = 4 * D * D, 2 * D
    dense = 2 * (attention + norms + 3 * 192 * D) + D + V * D
    assert experiment.active(experiment.SMALL) == dense
    router = 256 * D + 256
    assert experiment.active(experiment.EXPERTS) == dense + 2 * router
    wide = experiment.ARMS["dense total"].config
    count = experiment.parameters.count
    assert count(experiment.EXPERTS) - count(wide) == 2 * router


def test_balance_of_known_loads() -> None:
    loads = np.array([[1, 1, 1, 1.0], [4, 0, 0, 0]])
    assert experiment.balance(loads) == {"max_vio": 1.5, "dead": 3 / 8}
    nothing = experiment.balance(np.zeros((0, 0)))
    assert np.isnan(nothing["max_vio"]) and np.isnan(nothing["dead"])


def test_kinds_of_bytes() -> None:
    """A letter a byte, in the order of KINDS."""
    source = '"""Doc."""\nx = 3.5  # nö\ndef f(a):\n    "döc"\n    return "s" + a\n'
    letters = "wnkodsDc"
    document = np.frombuffer(source.encode(), np.uint8).astype(int)
    tokens = np.concatenate([[120], [256], document, [256], [120, 61]])
    found = kinds.kinds(tokens)
    assert (found[[0, 1, -3, -2, -1]] == -1).all()
    written = "".join(letters[k] for k in found[2:-3])
    assert written == (
        "DDDDDDDDDDw" "nwowdddwwcccccw" "kkkwnonoow"
        "wwwwDDDDDDw" "wwwwkkkkkkwssswownw"
    )  # fmt: skip


def test_what_is_no_python_has_no_kind() -> None:
    prose = np.frombuffer(b"An 'open quote and (a bracket", np.uint8).astype(int)
    tokens = np.concatenate([[256], prose, [256]])
    assert (kinds.kinds(tokens) == -1).all()
