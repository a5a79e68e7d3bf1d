"""A model with MLA, experts and a module is trained, killed, resumed, judged and used.

As its user does it: by commands, in processes of their own where one may be killed.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minidsv3 import checkpoints, parameters
from minidsv3.__main__ import main
from minidsv3.config import MINI, TINY, TrainConfig
from minidsv3.corpus import batch, encode, load_corpus
from minidsv3.generation.numpy_ref import speculate
from minidsv3.model.numpy_ref import loss_and_grads
from minidsv3.training import run_folder
from tests.test_cli import ROOT, minidsv3, text, wait_for_log  # noqa: F401, a fixture
from tests.test_moe_model import is_bias
from tests.test_training import same

TRAIN = ["train", "--backend", "numpy", "--preset", "tiny", "--batch-size", "4",
         "--sequence-length", "24", "--set", "bias_update_speed=0.01"]  # fmt: skip


# --- bit for bit ----------------------------------------------------------------------

STEPS = 240


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "minidsv3", *map(str, arguments)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere)


def record(folder: Path) -> list[list[str]]:
    """The log without the one column that may differ, the seconds."""
    rows = [row.split(",") for row in (folder / run_folder.LOG).read_text().split()]
    place = rows[0].index("seconds")
    return [row[:place] + row[place + 1 :] for row in rows]


def check_same_run(one: Path, other: Path) -> None:
    """Weights, moments, router biases, the log, and the file of the model."""
    states = [run_folder.read_tensors(f / run_folder.STATE) for f in (one, other)]
    assert states[0][1] == states[1][1] and same(states[0][0], states[1][0])
    files = [(f / checkpoints.WEIGHTS).read_bytes() for f in (one, other)]
    assert files[0] == files[1]
    assert record(one) == record(other)


def test_a_run_is_reproducible_and_survives_kills(
    tmp_path: Path,
    text: Path,  # noqa: F811
) -> None:
    """Twice undisturbed, and once killed at moments that nobody chose.

    Where every step is saved it dies while saving, else between two saves.
    """
    given = [*TRAIN, "--text", text, "--steps", str(STEPS)]
    whole, twice, killed = (tmp_path / n for n in ("whole", "twice", "killed"))
    for out in (whole, twice):
        done = minidsv3(*given, "--out", out)
        assert done.returncode == 0, done.stderr
    check_same_run(whole, twice)
    tensors, _ = run_folder.read_tensors(whole / run_folder.STATE)
    biases = [a for k, a in tensors.items() if is_bias(k) and k.startswith("params/")]
    assert len(biases) == 2 and all(np.abs(b).max() > 0.05 for b in biases)

    dice, reached, resume = random.Random(), 0, []
    for often in ("1", "9", "1", "9"):
        reached += dice.randrange(5, 40)
        process = start(*given, "--save-every", often, "--out", killed, *resume)
        wait_for_log(killed / run_folder.LOG, reached)
        time.sleep(dice.uniform(0, 0.03))
        process.kill()
        assert process.wait() != 0, "it ended before it was killed"
        resume = ["--resume"]
    resumed = minidsv3(*given, "--out", killed, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    check_same_run(whole, killed)


# --- the commands ---------------------------------------------------------------------


def trained(out: Path, text: Path, *more: str, steps: int = 12) -> None:  # noqa: F811
    given = ["--text", str(text), "--out", str(out), "--steps", str(steps)]
    assert main([*TRAIN, *given, *more]) == 0


def check_log(folder: Path, text: Path) -> None:  # noqa: F811
    """The total is the sum that the report says; λ falls after 10 of 14.8 parts.

    MaxVio is that of the batch, counted again for the first one, over both layers.
    """
    header, *rows = (folder / run_folder.LOG).read_text().splitlines()
    parts = ["main_nats", "mtp_1_nats", "balance", "max_vio"]
    assert header.split(",") == [*run_folder.COLUMNS, *parts] and len(rows) == 12
    for row in rows:
        step, total, *_, of_trunk, module, balance, max_vio = map(float, row.split(","))
        weight = 0.3 if step <= 9 else 0.1
        expected = of_trunk + weight * module + 1e-4 * balance
        assert total == pytest.approx(expected, rel=1e-6)
        assert 1.9 < balance < 2.5, "two layers, one each if all were balanced"
        assert 0 < max_vio < 8 / 3
    params = parameters.initialise(TINY, 0, TrainConfig().init_std)
    first = batch(load_corpus(text).train, 4, 24, seed=0, step=0)
    load = loss_and_grads(params, TINY, first, TrainConfig())[2]["load"].values()
    fullest = [counts.max() / (counts.sum() / len(counts)) - 1 for counts in load]
    assert float(rows[0].split(",")[-1]) == pytest.approx(sum(fullest) / 2, rel=1e-6)


def test_from_training_to_text(
    tmp_path: Path,
    text: Path,  # noqa: F811
    capfdbinary,
) -> None:
    out = tmp_path / "run"
    trained(out, text)
    said = capfdbinary.readouterr()
    assert f"{parameters.count(TINY):,} parameters".encode() in said.out
    for word in (b"bits per byte", b"mtp_1", b"balance 2."):
        assert word in said.err.splitlines()[-1].split(b"\r")[-1]
    check_log(out, text)
    config, params = checkpoints.load(out)
    assert config == TINY
    for name in filter(is_bias, params):
        steps = params[name] / 0.01
        np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
        assert 1 <= np.abs(steps).max() < 12.5

    bits = said.out.split(b"held-out text: ")[1].split()[0]
    judge = ["evaluate", "--model", str(out), "--text", str(text)]
    assert main(judge) == 0
    assert capfdbinary.readouterr().out.split()[0] == bits
    asked = ["generate", "--model", str(out), "--prompt", "line", "--temperature", "0",
             "--max-new-tokens", "40"]  # fmt: skip
    assert main(asked) == 0
    drafted = capfdbinary.readouterr()
    *_, (_, counts) = speculate(params, config, encode("line")[None].astype(int), 40)
    assert f"{counts.accepted} of {counts.drafts} drafts kept" in drafted.err.decode()
    assert main([*asked, "--no-speculative"]) == 0
    assert capfdbinary.readouterr().out == drafted.out


def test_every_kind_of_size_can_be_set(tmp_path: Path, text: Path) -> None:  # noqa: F811
    changes = {
        **{"kv_lora_rank": 6, "q_lora_rank": None, "qk_nope_head_dim": 5},
        **{"qk_rope_head_dim": 4, "v_head_dim": 7, "n_routed_experts": 12},
        **{"num_experts_per_tok": 4, "n_group": 3, "topk_group": 1},
        **{"n_shared_experts": 2, "moe_intermediate_size": 9},
        **{"first_k_dense_replace": 0, "routed_scaling_factor": 1.5},
        **{"num_nextn_predict_layers": 2},
    }
    words = [w for k, v in changes.items() for w in ("--set", f"{k}={v}")]
    recipe = ["--set", "balance_weight=0.5", "--set", "mtp_weight=0.25"]
    trained(tmp_path / "run", text, *words, *recipe, steps=2)
    config = checkpoints.load(tmp_path / "run")[0]
    assert {name: getattr(config, name) for name in changes} == changes
    header, first, _ = (tmp_path / "run" / run_folder.LOG).read_text().splitlines()
    row = dict(zip(header.split(","), map(float, first.split(",")), strict=True))
    expected = row["main_nats"] + 0.125 * (row["mtp_1_nats"] + row["mtp_2_nats"])
    assert row["loss_nats"] == pytest.approx(expected + 0.5 * row["balance"], rel=1e-6)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("kv_lora_rank=0", "kv_lora_rank = 0: must be at least 1"),
        ("kv_lora_rank=None", "q_lora_rank = 14: must be None, because kv_lora_rank"),
        ("q_lora_rank=1.5", "q_lora_rank = 1.5: must be a whole number"),
        ("qk_nope_head_dim=0", "qk_nope_head_dim = 0: must be at least 1 with MLA"),
        ("qk_rope_head_dim=5", "qk_rope_head_dim = 5: must be even"),
        ("num_key_value_heads=2", "num_key_value_heads = 2: must be num_attention"),
        ("n_routed_experts=None", "must be 0, because n_routed_experts is None"),
        ("n_routed_experts=9", "n_group = 4: must be a divisor of n_routed_experts, 9"),
        ("n_group=8", "n_group = 8: must be at most 4: a group's score is the sum"),
        ("topk_group=5", "topk_group = 5: must be at most n_group, 4"),
        ("num_experts_per_tok=5", "num_experts_per_tok = 5: must be at most 4, the"),
        ("moe_intermediate_size=None", "moe_intermediate_size = None: must be set"),
        ("first_k_dense_replace=3", "first_k_dense_replace = 3: must be at most"),
        (
            "routed_scaling_factor=0",
            "routed_scaling_factor = 0: must be finite and",
        ),
        ("scoring_func=softmax", "scoring_func = 'softmax': must be 'sigmoid'"),
        ("rope_scaling=40", "rope_scaling = 40: must be a Yarn"),
        ("num_nextn_predict_layers=24", "leaves MTP module 24 nothing to predict"),
        ("bias_update_speed=-1", "bias_update_speed = -1: must be finite and at least"),
        ("balance_weight=high", "balance_weight = 'high': must be a number"),
        ("mtp_weight=None", "mtp_weight = None: must be a number"),
        ("n_experts=3", "--set n_experts: neither Config nor TrainConfig has it"),
    ],
)
def test_impossible_values_are_explained_by_name(
    assignment: str,
    message: str,
    tmp_path: Path,
    text: Path,  # noqa: F811
    capsys,
) -> None:
    out = tmp_path / "run"
    given = ["--text", str(text), "--out", str(out), "--set", assignment]
    assert main([*TRAIN, *given]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not out.exists()


def test_the_mini_model_trains(tmp_path: Path, text: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    done = minidsv3("train", "--backend", "numpy", "--preset", "mini",
                    "--steps", "2", "--batch-size", "2",
                    "--text", text, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{parameters.count(MINI):,} parameters" in done.stdout
    assert "2/2" in done.stderr and "balance" in done.stderr
    assert checkpoints.load(out)[0] == MINI
    assert (out / checkpoints.WEIGHTS).stat().st_size > 4 * parameters.count(MINI)


def test_a_preset_with_a_short_context_needs_no_other_option(
    tmp_path: Path,
    text: Path,  # noqa: F811
) -> None:
    """128 bytes a sequence are too long for it; what is asked for is not changed."""
    out = str(tmp_path / "run")
    given = ["train", "--preset", "tiny", "--text", str(text), "--out", out]
    assert main([*given, "--sequence-length", "65", "--steps", "1"]) == 2
    assert main([*given, "--steps", "1", "--batch-size", "1"]) == 0
    assert run_folder.identity(tmp_path / "run")[0] == TINY.max_position_embeddings


def test_a_run_whose_layers_are_all_dense_keeps_its_log(
    tmp_path: Path,
    text: Path,  # noqa: F811
) -> None:
    """Experts are asked for, and none stands anywhere: no column waits for them."""
    out = tmp_path / "run"
    dense = ["--set", "first_k_dense_replace=2", "--mtp", "0"]
    trained(out, text, *dense, steps=3)
    assert "balance" not in (out / run_folder.LOG).read_text()
    trained(out, text, *dense, "--resume", steps=3)
    assert len((out / run_folder.LOG).read_text().splitlines()) == 4
