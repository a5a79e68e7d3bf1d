"""The numbers of chapter 5: where they come from, and the beginning of a row again."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import mini_experiment as experiment  # noqa: E402
import rows  # noqa: E402

from minidsv3 import parameters  # noqa: E402
from minidsv3.config import MINI  # noqa: E402

TABLES = ("mini_ablation", "mini_curves")


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_where_they_come_from(table: str) -> None:
    head = (rows.RESULTS / f"{table}.csv").read_text().splitlines()[:3]
    assert head[0].startswith("# python book/mini_experiment.py --seeds ")
    assert "Python 3" in head[1] and "NumPy" in head[1]
    assert "sha256" in head[2]


def test_every_arm_has_the_same_seeds_and_at_least_three() -> None:
    ends = experiment.read("mini_ablation")
    seeds = [r["seed"] for r in ends if r["arm"] == "MINI"]
    assert len(set(seeds)) == len(seeds) >= 3
    for arm in experiment.ARMS:
        assert [r["seed"] for r in ends if r["arm"] == arm] == seeds, arm
    looks = experiment.RECIPE.steps // experiment.EVERY
    assert len(experiment.read("mini_curves")) == looks * len(ends)


def test_rows_are_of_these_models() -> None:
    for row in experiment.read("mini_ablation"):
        config = experiment.ARMS[row["arm"]]
        assert row["parameters"] == parameters.count(config)
        assert row["cache"] == experiment.cache_bytes(config)
        assert np.isnan(row["max_vio"]) == (not config.uses_moe)
        drafts = config.num_nextn_predict_layers > 0
        assert np.isnan(row["kept_08"]) == (not drafts)


@pytest.mark.slow
def test_the_beginning_of_a_row_again() -> None:
    """80 steps of 400, of the model that trains fastest."""
    kept = next(r for r in experiment.read("mini_curves") if r["arm"] == "with none")
    config = experiment.ARMS["with none"]
    record, params = next(
        pair for pair in experiment.train(config, 0) if pair[0].step == experiment.EVERY
    )
    assert kept["step"] == record.step and kept["seed"] == 0
    bits, _ = experiment.look(params, config)
    assert bits == pytest.approx(kept["bits"], abs=0.02)


def test_one_mechanism_is_off_at_a_time() -> None:
    arms = experiment.ARMS
    assert arms["without MTP"] == replace(MINI, num_nextn_predict_layers=0)
    assert arms["without MoE"].n_routed_experts is None
    assert arms["without MoE"].kv_lora_rank == MINI.kv_lora_rank
    assert arms["without MLA"].kv_lora_rank is None
    assert arms["without MLA"].n_routed_experts == MINI.n_routed_experts
    none = arms["with none"]
    assert not (none.uses_mla or none.uses_moe or none.num_nextn_predict_layers)


def test_the_dense_model_is_as_wide_as_what_a_token_meets() -> None:
    """Over three layers: one dense, two with eight experts and a shared one."""
    met = MINI.intermediate_size + 2 * (8 + 1) * MINI.moe_intermediate_size
    assert abs(3 * experiment.ACTIVE - met) < 3


def test_what_the_cache_keeps() -> None:
    """In float32: three layers of 32 + 16 numbers, or of 4 heads of 32 + 32."""
    assert experiment.cache_bytes(MINI) == 3 * 48 * 4
    assert experiment.cache_bytes(experiment.ARMS["without MLA"]) == 3 * 4 * 64 * 4
