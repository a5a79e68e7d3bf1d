"""The numbers of chapter 2: where they come from, and one row computed again."""

import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import mtp_experiment as experiment  # noqa: E402
import rows  # noqa: E402

TABLES = ("mtp_training", "mtp_agreement", "mtp_drafts")


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_where_they_come_from(table: str) -> None:
    head = (rows.RESULTS / f"{table}.csv").read_text().splitlines()[:3]
    assert head[0].startswith("# python book/mtp_experiment.py --seeds ")
    assert "Python 3" in head[1] and "NumPy" in head[1]
    assert "sha256" in head[2]


def test_every_arm_has_the_same_seeds_and_at_least_three() -> None:
    rows = experiment.read("mtp_training")
    seeds = {arm: [r["seed"] for r in rows if r["arm"] == arm] for arm in
             ("without", "with", "equal time")}  # fmt: skip
    assert len(set(seeds["with"])) == len(seeds["with"]) >= 3
    assert seeds["without"] == seeds["with"] == seeds["equal time"]
    drafts = experiment.read("mtp_drafts")
    agreed = experiment.read("mtp_agreement")
    for arm in ("start", "end"):
        assert [r["seed"] for r in agreed if r["arm"] == arm] == seeds["with"]
    per_seed = len(experiment.LAYERS) * len(experiment.TEMPERATURES)
    assert len(drafts) == per_seed * len(seeds["with"])


def test_equal_time_is_what_the_clock_said() -> None:
    rows = {(r["arm"], r["seed"]): r for r in experiment.read("mtp_training")}
    for (arm, seed), row in rows.items():
        if arm == "equal time":
            pair = rows["with", seed], rows["without", seed]
            ratio = pair[0]["ms_per_step"] / pair[1]["ms_per_step"]
            assert row["steps"] == pytest.approx(1000 * ratio, abs=1)


@pytest.mark.slow
def test_one_row_computed_again() -> None:
    """Counts may differ a little where another BLAS rounds otherwise."""
    rows = experiment.read("mtp_drafts")
    by_key = {(r["seed"], r["layers"], r["temperature"]): r for r in rows}
    kept = by_key[0, 2, 0.8]
    config = experiment.small(1, 2)
    params, _ = experiment.train(config, 0, experiment.DRAFT_STEPS)
    now = experiment.draft_row(params, config, 0.8, 0)
    assert now["acceptance"] == pytest.approx(kept["acceptance"], abs=0.02)
    assert now["tokens_per_pass"] == pytest.approx(kept["tokens_per_pass"], abs=0.04)


def test_a_trunk_is_the_same_with_and_without_a_module() -> None:
    """So the arms differ in the module alone: same weights to begin with."""
    with_one = experiment.parameters.initialise(experiment.small(1), 3, 0.02)
    without = experiment.parameters.initialise(experiment.small(0), 3, 0.02)
    assert without.keys() < with_one.keys()
    assert all(np.array_equal(without[k], with_one[k]) for k in without)


def test_what_a_draft_costs() -> None:
    """By hand, for two layers of width 64: module and head over trunk and head."""
    D, wide, V = 64, 192, 257
    block = 2 * 2 * 32 * D + 2 * 64 * D + 3 * wide * D  # q, k: 64 rows; v, o; SwiGLU
    assert experiment.module_cost(2) == pytest.approx(
        (2 * D * D + block + V * D) / (2 * block + V * D)
    )
