"""A model with experts: its losses, its balance in training, its files, its errors."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, parameters
from minidsv3.__main__ import main
from minidsv3.config import TINY, Config, TrainConfig
from minidsv3.corpus import batch
from minidsv3.generation.numpy_ref import generate
from minidsv3.model import numpy_ref as model
from minidsv3.training import numpy_ref as training
from minidsv3.training import run_folder
from tests import test_model
from tests.oracles import AUTOGRAD, DIFFERENCES, relative_error
from tests.test_cli import SETTINGS, TRAIN, minidsv3, text  # noqa: F401, a fixture
from tests.test_model import ids
from tests.test_mtp import as_tensors, torch_losses
from tests.test_training import TEXT, same
from tests.torch_moe import block_with_experts

# Plain attention, the first layer dense, the second and the modules with experts.
SMALL = dataclasses.replace(
    test_model.SMALL,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
)
SPARSE = dataclasses.replace(SMALL, first_k_dense_replace=0, n_shared_experts=0)
RECIPE = TrainConfig(mtp_weight=0.7, balance_weight=3.0)


def with_modules(D: int, config: Config = SMALL) -> Config:
    return dataclasses.replace(config, num_nextn_predict_layers=D)


def is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def fresh(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """As in `test_model`, and biases that matter."""
    params = test_model.fresh(config, seed)
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 0.2, p.shape) if is_bias(k) else p for k, p in
            params.items()}  # fmt: skip


# --- losses and gradients -----------------------------------------------------------

MODELS = [
    (SMALL, 2, 5),
    (SMALL, 1, 1),
    (SPARSE, 3, 4),
    (with_modules(1), 2, 4),
    (with_modules(2), 2, 5),
    (with_modules(2, SPARSE), 1, 3),
]


def check_model(
    config: Config,
    B: int,
    T: int,
    around: Callable = test_model.torch_block,
    loss_and_grads: Callable | None = None,
) -> None:
    params, tokens = fresh(config), ids(B, T + 1, config=config)
    ours = loss_and_grads or model.loss_and_grads  # which a mistake may have changed
    losses, grads, stats = ours(params, config, tokens, RECIPE)
    p, balances = as_tensors(params), []
    block = block_with_experts(balances, around)
    main_loss, *further = torch_losses(p, config, tokens, block)
    D = config.num_nextn_predict_layers
    total = main_loss + RECIPE.mtp_weight / max(D, 1) * sum(further)
    total = total + RECIPE.balance_weight * sum(balances)
    total.backward()
    expected = [main_loss, *further, sum(balances), total]
    names = ["main", *(f"mtp_{k + 1}" for k in range(D)), "balance", "total"]
    assert list(losses) == names
    for (name, ours), theirs in zip(losses.items(), expected, strict=True):
        assert ours == pytest.approx(theirs.item(), rel=1e-12), name
    assert sorted(grads) == sorted(name for name in params if not is_bias(name))
    for name, g in grads.items():
        assert relative_error(g, p[name].grad.numpy()) <= AUTOGRAD, name
    assert list(stats) == ["load"]
    check_load(stats["load"], config, B, T)


def check_load(load: dict, config: Config, B: int, T: int) -> None:
    """Every layer of experts under its bias's name: N·K choices, none dropped."""
    L, first = config.num_hidden_layers, config.first_k_dense_replace
    layers = range(first, L + config.num_nextn_predict_layers)
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    assert list(load) == [name.format(n) for n in layers]
    assert set(load) == set(filter(is_bias, parameters.shapes(config)))
    for n in layers:
        counts, depth = load[name.format(n)], max(n - L + 1, 0)
        assert counts.shape == (config.n_routed_experts,)
        assert counts.sum() == B * (T - depth) * config.num_experts_per_tok


@pytest.mark.parametrize(("config", "B", "T"), MODELS)
def test_losses_and_every_gradient_agree_with_autograd(
    config: Config, B: int, T: int
) -> None:
    check_model(config, B, T)


def test_all_mechanisms_together_along_random_directions() -> None:
    """TINY: MLA, experts and a module; the slope of the total is the gradient's."""
    params, tokens = fresh(TINY), ids(2, 9, config=TINY)
    _, grads, _ = model.loss_and_grads(params, TINY, tokens, RECIPE)

    def total(step: float, direction: dict) -> float:
        moved = {k: p + step * direction.get(k, 0) for k, p in params.items()}
        return model.loss_and_grads(moved, TINY, tokens, RECIPE)[0]["total"]

    rng = np.random.default_rng(0)
    for name in grads:
        direction = {name: rng.normal(size=params[name].shape)}
        slope = (total(1e-6, direction) - total(-1e-6, direction)) / 2e-6
        ours = np.sum(grads[name] * direction[name])
        assert ours == pytest.approx(slope, rel=DIFFERENCES, abs=1e-7), name


def test_without_weight_the_balance_loss_teaches_nothing() -> None:
    params, tokens = fresh(with_modules(1)), ids(2, 6)
    silent = dataclasses.replace(RECIPE, balance_weight=0.0)
    losses, grads, _ = model.loss_and_grads(params, with_modules(1), tokens, silent)
    assert losses["balance"] > 0
    assert losses["total"] == losses["main"] + 0.7 * losses["mtp_1"]
    _, loud, _ = model.loss_and_grads(params, with_modules(1), tokens, RECIPE)
    router = "model.layers.2.mlp.gate.weight"
    assert relative_error(loud[router], grads[router]) > 1e-3


# --- what depends on what -----------------------------------------------------------


def test_no_position_sees_the_future() -> None:
    """Nor does a later token take an earlier one's place with an expert."""
    params, tokens = fresh(TINY), ids(1, 12, config=TINY)
    before, _ = model.forward(params, TINY, tokens)
    for j in range(12):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % TINY.vocab_size
        after, _ = model.forward(params, TINY, changed)
        moved = np.abs(after - before)[0].max(axis=-1)
        assert (moved[:j] <= 1e-12).all() and (moved[j:] > 1e-9).all()


def test_sequences_of_a_batch_do_not_mix() -> None:
    params, tokens = fresh(TINY), ids(3, 6, config=TINY)
    together, _ = model.forward(params, TINY, tokens)
    alone = [model.forward(params, TINY, row[None])[0] for row in tokens]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, TINY])
def test_cached_logits_are_uncached_logits(config: Config) -> None:
    params, tokens = fresh(config), ids(2, 8, config=config)
    full, _ = model.forward(params, config, tokens)
    caches = model.new_caches(config, 8)
    parts = [
        model.forward(params, config, part, caches)[0]
        for part in np.split(tokens, [3, 4, 5], axis=1)
    ]
    np.testing.assert_allclose(np.concatenate(parts, 1), full, rtol=0, atol=1e-12)


def test_float32_stays_float32() -> None:
    params = {k: p.astype(np.float32) for k, p in fresh(TINY).items()}
    tokens = ids(2, 9, config=TINY)
    logits, _ = model.forward(params, TINY, tokens)
    _, grads, _ = model.loss_and_grads(params, TINY, tokens, RECIPE)
    dtypes = {a.dtype for a in (logits, *grads.values())}
    assert dtypes == {np.dtype(np.float32)}


# --- the biases in training and out of it -------------------------------------------

SHORT = TrainConfig(
    steps=8,
    batch_size=2,
    sequence_length=16,
    warmup_steps=2,
    learning_rate=3e-3,
    weight_decay=0.5,
    bias_update_speed=1e-2,
)


def state_of(config: Config = TINY, dtype: type = np.float32) -> training.TrainState:
    params = fresh(config)
    return training.new_state({k: p.astype(dtype) for k, p in params.items()})


def copied(params: dict) -> dict:
    return {k: p.copy() for k, p in params.items()}


def test_a_model_that_is_used_keeps_its_biases() -> None:
    """Bit for bit, with everything else: forward, evaluate, generate, both ways."""
    params = state_of().params
    before = copied(params)
    prompt = ids(1, 5, config=TINY)
    model.forward(params, TINY, prompt)
    training.evaluate(params, TINY, TEXT, 16)
    plain = generate(params, TINY, prompt, 20)
    drafted = generate(params, TINY, prompt, 20, speculative=True)
    np.testing.assert_array_equal(plain, drafted)
    model.loss_and_grads(params, TINY, prompt, RECIPE)  # nor do gradients move any
    assert same(before, params)


def test_training_moves_the_biases_by_their_speed() -> None:
    """±γ or nothing, against the load of the step's own batch; the module's too."""
    state = state_of(dtype=np.float64)
    biases = sorted(filter(is_bias, state.params))
    assert [n.split(".")[2] for n in biases] == ["1", "2"], "the module's is layer 2's"
    before = copied(state.params)
    moved = dict.fromkeys(biases, 0)
    for record in training.train(state, TINY, SHORT, TEXT):
        tokens = batch(TEXT, 2, 16, SHORT.seed, record.step - 1)
        _, grads, stats = model.loss_and_grads(before, TINY, tokens, SHORT)
        assert not set(biases) & set(grads)
        assert same(record.stats["load"], stats["load"])
        for name in biases:
            counts = stats["load"][name]
            share = counts.sum() / len(counts)
            expected = [1e-2 * ((c < share) - int(c > share)) for c in counts]
            step = state.params[name] - before[name]
            np.testing.assert_allclose(step, expected, rtol=0, atol=1e-12)
            moved[name] += np.count_nonzero(step)
            assert not state.m[name].any() and not state.v[name].any()
        before = copied(state.params)
    assert min(moved.values()) > 0


def test_at_speed_zero_the_biases_stay() -> None:
    """As in the report's last 500B tokens: neither rule nor optimiser nor decay."""
    state = state_of()
    before = copied(state.params)
    still = dataclasses.replace(SHORT, bias_update_speed=0.0)
    for _ in training.train(state, TINY, still, TEXT):
        pass
    for name, p in state.params.items():
        assert np.array_equal(p, before[name]) == is_bias(name), name


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path) -> None:
    whole, broken = state_of(), state_of()
    for record in training.train(whole, TINY, SHORT, TEXT):
        last = record
    for record in training.train(broken, TINY, SHORT, TEXT):
        run_folder.append_log(tmp_path, record)
        if record.step == 3:
            run_folder.save(tmp_path, broken, TINY, SHORT, "text")
        if record.step == 5:
            break
    resumed = run_folder.resume(tmp_path, TINY, SHORT, "text")
    for record in training.train(resumed, TINY, SHORT, TEXT):
        run_folder.append_log(tmp_path, record)
    assert same(resumed.params, whole.params)
    assert same(resumed.m, whole.m) and same(resumed.v, whole.v)
    assert record.losses == last.losses
    header, *rows = (tmp_path / run_folder.LOG).read_text().splitlines()
    assert header.endswith("main_nats,mtp_1_nats,balance,max_vio") and len(rows) == 8


# --- the command line, and transformers ---------------------------------------------

EXPERTS = {
    "num_hidden_layers": 2,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "kv_lora_rank": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "bias_update_speed": 0.05,
}


@torch.no_grad()
def test_from_the_command_line_to_transformers(
    tmp_path: Path,
    text: Path,  # noqa: F811
    capfdbinary,
) -> None:
    """Trained, logged, continued in text; and DeepSeek's own names in the file."""
    from transformers import DeepseekV3ForCausalLM

    out = tmp_path / "run"
    sizes = [word for k, v in EXPERTS.items() for word in ("--set", f"{k}={v}")]
    given = [*TRAIN, *sizes, "--mtp", "1", "--text", str(text), "--out", str(out)]
    assert main([*given, "--steps", "6"]) == 0
    assert b"balance" in capfdbinary.readouterr().err
    assert main(["generate", "--model", str(out), "--prompt", "line"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"line")

    config, params = checkpoints.load(out)
    assert config.uses_moe and config.uses_mla and config.num_nextn_predict_layers == 1
    steps = params["model.layers.1.mlp.gate.e_score_correction_bias"] / 0.05
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert 1 <= np.abs(steps).max() < 6.5

    names = set(checkpoints.read_tensors(out / checkpoints.WEIGHTS)[0])
    for n in (1, 2):
        kinds = [f"{k}_proj.weight" for k in ("gate", "up", "down")]
        one_each = {
            f"model.layers.{n}.mlp.experts.{i}.{k}" for i in range(8) for k in kinds
        }
        found = {x for x in names if x.startswith(f"model.layers.{n}.mlp.experts.")}
        assert found == one_each
    peer, report = DeepseekV3ForCausalLM.from_pretrained(
        out, experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(x.startswith("model.layers.2.") for x in report["unexpected_keys"])
    tokens = ids(2, 12, config=config)
    expected = peer.eval()(torch.tensor(tokens)).logits.numpy()
    ours, _ = model.forward(params, config, tokens)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_impossible_experts_are_explained(tmp_path: Path) -> None:
    given = ["train", "--backend", "numpy", *SETTINGS, "--out", tmp_path / "run"]
    for name, value in EXPERTS.items():
        value = 8 if name == "n_group" else value
        given += ["--set", f"{name}={value}"]
    done = minidsv3(*given)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "n_group" in done.stderr and "the sum of its best two" in done.stderr


# --- the border ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    "name",
    [
        "gate.weight",
        "gate.e_score_correction_bias",
        "experts.up_proj.weight",
        "experts.down_proj.weight",
        "shared_experts.gate_proj.weight",
    ],
)
def test_the_parameter_that_is_not_finite_is_named(
    name: str, layer: int, bad: float
) -> None:
    """Though it may be a later router that meets it; layer 2 is the MTP module's."""
    config = with_modules(1)
    params, tokens = fresh(config), ids(2, 9)
    name = f"model.layers.{layer}.mlp.{name}"
    array = params[name]
    array[(slice(None),) + (0,) * (array.ndim - 1)] = bad
    match = f"not finite: {re.escape(name)} holds NaN or infinity"
    with np.errstate(invalid="ignore", over="ignore"):
        with pytest.raises(FloatingPointError, match=match):
            model.loss_and_grads(params, config, tokens, RECIPE)
        if layer == 1:
            with pytest.raises(FloatingPointError, match=match):
                model.forward(params, config, tokens)
            return
        logits, saved = model.forward(params, config, tokens)
        h, cache = model.hidden_states(saved), model.new_mtp_cache(config, 9)
        with pytest.raises(FloatingPointError, match=match):
            model.mtp_step(params, config, h, tokens, cache)


def test_a_nan_that_a_router_meets_first_is_traced_to_its_parameter() -> None:
    params = fresh(SMALL)
    params["model.embed_tokens.weight"][3] = np.nan
    match = "inputs of a router are not finite: model.embed_tokens.weight holds NaN"
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match=match):
        model.forward(params, SMALL, np.full((1, 2), 3))


def test_overflow_with_finite_parameters_is_told_apart() -> None:
    params = {k: p.astype(np.float32) for k, p in fresh(SMALL).items()}
    params["model.layers.1.mlp.gate.weight"][:] = 3e38
    match = "scores of a router are not finite though every parameter is: activations"
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=match):
        model.forward(params, SMALL, ids())


def test_parameters_of_another_model_are_refused() -> None:
    name = "model.layers.1.mlp.experts.down_proj.weight"
    params = fresh(SMALL)
    params[name] = params[name][:-1]
    with pytest.raises(
        parameters.ParameterError, match=rf"{name} has shape \(5, 6, 5\)"
    ):
        model.forward(params, SMALL, ids())
    params = fresh(SMALL)
    for absent in [k for k in params if ".experts." in k]:
        del params[absent]
    with pytest.raises(parameters.ParameterError, match="missing .*experts.gate_proj"):
        model.forward(params, SMALL, ids())
    dense = fresh(test_model.SMALL)
    with pytest.raises(
        parameters.ParameterError, match="missing .*not expected .*mlp."
    ):
        model.forward(dense, SMALL, ids())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 11]], "token id 11 is outside the vocabulary 0…10"),
        ([[-1, 0]], "token id -1 is outside"),
        ([[0] * 17], "17 positions asked for, but max_position_embeddings is 16"),
    ],
)
def test_bad_ids_are_refused(tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.forward(fresh(SMALL), SMALL, np.array(tokens))
