"""Optimiser, schedule, clipping, the loop and the run folder."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import parameters
from minidsv3.checkpoints import CheckpointError
from minidsv3.config import PLAIN, TrainConfig
from minidsv3.corpus import batch
from minidsv3.model.numpy_ref import forward, loss_and_grads
from minidsv3.parameters import ParameterError
from minidsv3.training import numpy_ref as training
from minidsv3.training import run_folder
from tests.test_model import torch_model

SMALL = dataclasses.replace(
    PLAIN,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
RECIPE = TrainConfig(
    steps=12, batch_size=2, sequence_length=16, warmup_steps=3, learning_rate=3e-3
)
TEXT = np.frombuffer(b"def add(a, b):\n    return a + b\n" * 40, np.uint8).astype(
    np.uint16
)


def fresh_state() -> training.TrainState:
    return training.new_state(parameters.initialise(SMALL, 0, 0.05))


def run(state: training.TrainState, recipe: TrainConfig = RECIPE) -> list:
    return list(training.train(state, SMALL, recipe, TEXT))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- the rules ----------------------------------------------------------------------


def test_adamw_agrees_with_torch() -> None:
    """Ten steps on one decayed and one free parameter, schedule and all."""
    rng = np.random.default_rng(0)
    start = {"lm_head.weight": rng.normal(size=(3, 4)), "norm.weight": np.ones(4)}
    state = training.new_state({k: p.copy() for k, p in start.items()})
    recipe = dataclasses.replace(RECIPE, weight_decay=0.3)
    tensors = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in start.items()}
    peer = torch.optim.AdamW(
        [
            {"params": [tensors["lm_head.weight"]], "weight_decay": 0.3},
            {"params": [tensors["norm.weight"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(1, 11):
        grads = {k: rng.normal(size=p.shape) for k, p in start.items()}
        rate = training.adamw_step(
            state, {k: g.copy() for k, g in grads.items()}, recipe
        )
        assert rate == training.learning_rate(step, recipe)
        for group in peer.param_groups:
            group["lr"] = rate
        for k, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[k])
        peer.step()
    for k, tensor in tensors.items():
        np.testing.assert_allclose(
            state.params[k], tensor.detach().numpy(), rtol=1e-12, atol=1e-14
        )


def test_weight_decay_leaves_out_norms_biases_and_the_embedding() -> None:
    free = {n for n in parameters.shapes(PLAIN) if not training.decays(n)}
    assert free == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in range(4)
        for n in ("input", "post_attention")
    }
    assert not training.decays("model.layers.3.mlp.gate.e_score_correction_bias")
    assert training.decays("lm_head.weight")


def test_schedule() -> None:
    c = TrainConfig(
        steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1
    )
    rates = [training.learning_rate(s, c) for s in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * s for s in range(1, 11)])
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55)  # half-way down: the mean of both ends
    assert rates[-1] == pytest.approx(0.1, abs=1e-15)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    no_warmup = dataclasses.replace(c, warmup_steps=0, steps=1)
    assert training.learning_rate(1, no_warmup) == pytest.approx(0.1)


def test_clipping_keeps_the_direction() -> None:
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert training.clip_gradients(grads, 10.0) == 5.0
    assert grads["a"][0] == 3.0  # a short gradient stays as it is
    assert training.clip_gradients(grads, 1.0) == 5.0
    np.testing.assert_allclose(grads["a"], [0.6, 0.0])
    np.testing.assert_allclose(grads["b"], [[0.8]])


# --- the loop -----------------------------------------------------------------------


def test_training_learns_and_reports() -> None:
    records = run(fresh_state(), dataclasses.replace(RECIPE, steps=60))
    assert [r.step for r in records] == list(range(1, 61))
    assert records[0].losses["main"] == pytest.approx(math.log(257), abs=0.2)
    assert records[-1].losses["main"] < records[0].losses["main"] - 2
    assert all(r.grad_norm > 0 and r.seconds > 0 for r in records)
    assert records[2].learning_rate == RECIPE.learning_rate


def test_training_agrees_with_torch_step_by_step() -> None:
    """Five steps against torch's model, autograd, clipping and AdamW, in float64."""
    recipe = dataclasses.replace(RECIPE, steps=5, clip_norm=0.3, seed=3, adam_eps=1e-3)
    params = parameters.initialise(SMALL, 0, 0.3, np.float64)
    tensors = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
    groups = [
        {
            "params": [t for k, t in tensors.items() if training.decays(k) == decays],
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    peer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3)
    state = training.new_state(params)
    for record in training.train(state, SMALL, recipe, TEXT):
        ids = torch.tensor(batch(TEXT, 2, 16, 3, record.step - 1))
        logits = torch_model(tensors, SMALL, ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        peer.zero_grad()
        loss.backward()
        norm = torch.stack([t.grad.norm() for t in tensors.values()]).norm()
        for t in tensors.values():
            t.grad *= 0.3 / norm
        assert record.losses["main"] == pytest.approx(loss.item(), rel=1e-9)
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-9) and norm > 0.3
        for group in peer.param_groups:
            group["lr"] = record.learning_rate
        peer.step()
    for k, tensor in tensors.items():
        np.testing.assert_allclose(
            state.params[k], tensor.detach(), rtol=1e-8, atol=1e-10
        )


def test_the_same_seed_gives_the_same_bits() -> None:
    a, b = fresh_state(), fresh_state()
    run(a)
    run(b)
    assert same(a.params, b.params)
    other = fresh_state()
    run(other, dataclasses.replace(RECIPE, seed=1))
    assert not same(a.params, other.params)


def test_bits_per_byte_against_a_plain_sum() -> None:
    """Every token after the first counts once, whatever the window and the batch."""
    params = parameters.initialise(SMALL, 0, 0.3)
    tokens = np.concatenate([TEXT[:20], [256], TEXT[:17]]).astype(np.uint16)
    for length, batch_size in [(7, 2), (37, 1), (5, 16), (1, 3)]:
        bits = 0.0
        for start in range(0, len(tokens) - 1, length):
            window = tokens[start : start + length + 1].astype(int)
            logits, _ = forward(params, SMALL, window[None, :-1])
            p = torch.softmax(torch.tensor(logits[0]).double(), -1).numpy()
            bits -= np.log2([p[i, t] for i, t in enumerate(window[1:])]).sum()
        expected = bits / 36  # 37 targets, one of them the boundary
        ours = training.evaluate(params, SMALL, tokens, length, batch_size)
        assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "length", "batch_size"),
    [([65], 8, 1), ([65, 256], 8, 1), ([65, 66], 0, 1), ([65, 66], 8, 0)],
)
def test_evaluate_refuses(tokens: list, length: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        training.evaluate({}, SMALL, np.array(tokens), length, batch_size)


def test_a_gradient_beyond_float32_squares_is_clipped() -> None:
    grads = {"a": np.array([3e25, 4e25], np.float32)}
    assert training.clip_gradients(grads, 1.0) == pytest.approx(5e25)
    np.testing.assert_allclose(grads["a"], [0.6, 0.8], rtol=1e-6)


def test_a_gradient_that_is_not_finite_stops_before_the_update(monkeypatch) -> None:
    def overflowing(*arguments) -> tuple:
        losses, grads, stats = loss_and_grads(*arguments)
        grads["model.norm.weight"][3] = np.inf
        return losses, grads, stats

    monkeypatch.setattr(training, "loss_and_grads", overflowing)
    state = fresh_state()
    before = {k: p.copy() for k, p in state.params.items()}
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match="step 1: the gradient of model.norm"),
    ):
        run(state)
    assert same(before, state.params) and state.step == 0


# --- the run folder -----------------------------------------------------------------


def test_a_resumed_run_is_the_unbroken_run(tmp_path) -> None:
    whole = fresh_state()
    run(whole)
    broken = fresh_state()
    for record in training.train(broken, SMALL, RECIPE, TEXT):
        run_folder.append_log(tmp_path, record)
        if record.step == 5:
            run_folder.save(tmp_path, broken, SMALL, RECIPE, "text")
        if record.step == 7:  # two steps are lost, as by a kill
            break
    resumed = run_folder.resume(tmp_path, SMALL, RECIPE, "text")
    assert resumed.step == 5
    for record in training.train(resumed, SMALL, RECIPE, TEXT):
        run_folder.append_log(tmp_path, record)
    assert same(resumed.params, whole.params)
    assert same(resumed.m, whole.m) and same(resumed.v, whole.v)
    with open(tmp_path / run_folder.LOG, newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 13))


def test_a_log_row_cut_short_is_dropped(tmp_path) -> None:
    state = fresh_state()
    for record in training.train(state, SMALL, RECIPE, TEXT):
        run_folder.append_log(tmp_path, record)
    run_folder.save(tmp_path, state, SMALL, RECIPE, "text")
    log = tmp_path / run_folder.LOG
    log.write_bytes(log.read_bytes().replace(b"loss_nats", b"lo") + b"13,0.5\n\xff;3")
    run_folder.resume(tmp_path, SMALL, RECIPE, "text")
    rows = log.read_text().splitlines()
    assert len(rows) == 13 and rows[0] == ",".join(run_folder.COLUMNS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": dataclasses.replace(RECIPE, seed=4)},
            "another recipe: seed: 0 -> 4",
        ),
        (
            {"config": dataclasses.replace(SMALL, hidden_size=32)},
            "another config: hidden_size: 16 -> 32",
        ),
        ({"corpus": "other"}, "another text: text -> other"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change: dict, message: str) -> None:
    run_folder.save(tmp_path, fresh_state(), SMALL, RECIPE, "text")
    given = {"config": SMALL, "recipe": RECIPE, "corpus": "text"} | change
    with pytest.raises(CheckpointError, match=message):
        run_folder.resume(tmp_path, given["config"], given["recipe"], given["corpus"])


def test_a_state_with_nan_does_not_replace_a_good_one(tmp_path) -> None:
    state = fresh_state()
    run_folder.save(tmp_path, state, SMALL, RECIPE, "text")
    before = (tmp_path / run_folder.STATE).read_bytes()
    state.v["lm_head.weight"][0, 0] = np.inf
    with pytest.raises(ParameterError, match="v/lm_head.weight holds NaN"):
        run_folder.save(tmp_path, state, SMALL, RECIPE, "text")
    assert (tmp_path / run_folder.STATE).read_bytes() == before


def test_the_log_says_what_the_step_reported(tmp_path) -> None:
    [first, *_] = run(fresh_state())
    run_folder.append_log(tmp_path, first)
    with open(tmp_path / run_folder.LOG, newline="") as file:
        [row] = csv.DictReader(file)
    assert float(row["loss_nats"]) == first.losses["total"]
    assert float(row["learning_rate"]) == first.learning_rate
    assert float(row["grad_norm"]) == first.grad_norm


def test_nothing_to_resume(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        run_folder.resume(tmp_path, SMALL, RECIPE, "text")
