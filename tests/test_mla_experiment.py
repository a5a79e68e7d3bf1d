"""The numbers of chapter 4: where they come from, and one row computed again."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import mla_experiment as experiment  # noqa: E402
import rows  # noqa: E402

from minidsv3 import parameters  # noqa: E402
from minidsv3.config import MINI, V3  # noqa: E402
from minidsv3.mla import numpy_ref as mla  # noqa: E402
from minidsv3.model import numpy_ref as model  # noqa: E402
from minidsv3.primitives import numpy_ref as primitives  # noqa: E402
from tests import test_mla  # noqa: E402

TABLES = ("mla_quality", "mla_yarn")


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_where_they_come_from(table: str) -> None:
    head = (rows.RESULTS / f"{table}.csv").read_text().splitlines()[:3]
    assert head[0].startswith("# python book/mla_experiment.py --seeds ")
    assert "Python 3" in head[1] and "NumPy" in head[1]
    assert "sha256" in head[2]


def test_every_arm_has_the_same_seeds_and_at_least_three() -> None:
    quality = experiment.read("mla_quality")
    seeds = [r["seed"] for r in quality if r["arm"] == "MLA"]
    assert len(set(seeds)) == len(seeds) >= 3
    for arm in experiment.ARMS:
        assert [r["seed"] for r in quality if r["arm"] == arm] == seeds, arm
    yarn = experiment.read("mla_yarn")
    for arm in experiment.STRETCH:
        for tuned in (0, 1):
            mine = [r for r in yarn if (r["arm"], r["tuned"]) == (arm, tuned)]
            assert [r["seed"] for r in mine] == seeds


def test_all_kinds_have_as_many_parameters() -> None:
    """To a fifth of a percent, but for the narrow ones; the cache is the table's."""
    of_mha = parameters.count(experiment.MHA)
    for row in experiment.read("mla_quality"):
        config = experiment.ARMS[row["arm"]]
        assert row["parameters"] == parameters.count(config)
        narrow = row["arm"].endswith("narrow")
        assert narrow == (abs(row["parameters"] / of_mha - 1) > 2e-3)
        assert row["kept"] == experiment.kept(config)
    kept = {arm: experiment.kept(config) for arm, config in experiment.ARMS.items()}
    assert kept == {"MHA": 256, "GQA": 64, "MLA": 64, "MQA": 32, "MLA small": 32,
                    "GQA narrow": 64, "MQA narrow": 32}  # fmt: skip


@pytest.mark.slow
def test_one_row_computed_again() -> None:
    kept = next(r for r in experiment.read("mla_quality") if r["arm"] == "MLA small")
    row, _ = experiment.quality_row("MLA small", 0)
    assert row["bits"] == pytest.approx(kept["bits"], abs=0.02)


def test_bits_by_position_are_those_of_a_loop(monkeypatch) -> None:
    monkeypatch.setattr(experiment, "HELD_OUT", 3 * 10)
    config = experiment.ARMS["MLA"]
    params = parameters.initialise(config, 0, 0.3, np.float64)
    tokens = experiment.corpus.load_corpus().held_out[:30].astype(int)
    want = np.zeros(9)
    for row in tokens.reshape(3, 10):
        logits, _ = model.forward(params, config, row[None, :-1])
        law = primitives.softmax(logits[0])
        want -= np.log2(law[np.arange(9), row[1:]]) / 3
    ours = experiment.bits_by_position(params, config, 9)
    np.testing.assert_allclose(ours, want, rtol=1e-12)


def test_keys_and_values_are_what_the_cache_holds() -> None:
    """At position 0 nothing is turned, so there the cache has the same keys."""
    config = experiment.MHA
    params = parameters.initialise(config, 0, 0.3, np.float64)
    ids = np.array([[5], [77]])
    caches = model.new_caches(config, 1)
    model.forward(params, config, ids, caches)
    for ours, cache in zip(
        experiment.keys_and_values(params, config, ids), caches, strict=True
    ):
        kept = [a[:, 0].reshape(2, -1) for a in cache._arrays]
        np.testing.assert_allclose(ours, np.concatenate(kept, axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("N", "expanded", "naive", "absorbed"),
    [(4096, 0.369, 137.8, 1.174), (131_072, 10.77, 4409, 36.54)],
)
def test_multiplications_of_v3(N, expanded, naive, absorbed) -> None:
    """GFLOP of a decoded token: the table in the facts, A.7."""
    counts = experiment.multiplications(V3, 1, N)
    gflop = {form: 2 * n / 1e9 for form, n in counts.items()}
    assert gflop == pytest.approx(
        {"expanded": expanded, "naive": naive, "absorbed": absorbed}, rel=2e-3
    )


@pytest.mark.parametrize(("N", "chunk"), [(1024, 146), (10**9, 170.7)])
def test_where_the_forms_of_v3_cross(N: int, chunk: float) -> None:
    assert experiment.crossover(V3, N) == pytest.approx(chunk, abs=0.5)
    S = round(experiment.crossover(V3, N))
    below = experiment.multiplications(V3, S - 3, N)
    above = experiment.multiplications(V3, S + 3, N)
    assert below["absorbed"] < below["naive"] and above["absorbed"] > above["naive"]


def check_crossover(names=tuple(test_mla.CONFIGS)) -> None:
    """What decoding goes by: the number of the chapter, for a past without end."""
    for config in (V3, MINI, *(test_mla.CONFIGS[name] for name in names)):
        ours, N = mla.crossover(config), 10**8
        if ours == np.inf:  # no chunk is too long for the absorbed form
            chunks = {"absorbed": (1, 100, N // 2, N)}
        else:
            assert ours == pytest.approx(experiment.crossover(config, N), rel=1e-4)
            few, many = int(0.99 * ours), int(1.01 * ours) + 1
            chunks = {"absorbed": range(1, few + 1), "naive": (many, 2 * many, N)}
        for cheaper, lengths in chunks.items():
            for S in lengths:
                counts = experiment.multiplications(config, S, N)
                less = min(counts["absorbed"], counts["naive"])
                assert counts[cheaper] == less, (config, S)


def test_where_the_forms_cross_for_a_long_past() -> None:
    check_crossover()
    assert mla.crossover(V3) == pytest.approx(170.67, abs=0.01)
    assert mla.crossover(MINI) == np.inf


def test_the_temperature_is_the_only_difference() -> None:
    one, two = (
        replace(experiment.MLA, rope_scaling=experiment.STRETCH[arm])
        for arm in ("frequencies", "YaRN")
    )
    np.testing.assert_array_equal(
        primitives.rope_frequencies(one), primitives.rope_frequencies(two)
    )
    m = 0.1 * np.log(experiment.FAR) + 1
    ratio = primitives.softmax_scale(two) / primitives.softmax_scale(one)
    assert ratio == pytest.approx(m * m)
