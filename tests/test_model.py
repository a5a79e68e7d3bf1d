"""The assembled model against torch, transformers' Llama, naive facts and files."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import checkpoints, parameters, safetensors_files
from minidsv3.config import MINI, PLAIN, TINY, V3, Config, TrainConfig, Yarn
from minidsv3.model import numpy_ref as model
from tests.oracles import AUTOGRAD, central_differences, relative_error

SMALL = dataclasses.replace(
    PLAIN,
    vocab_size=11,
    hidden_size=6,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_rope_head_dim=4,
    v_head_dim=3,
    max_position_embeddings=16,
)
RECIPE = TrainConfig()
STRETCH = Yarn(
    factor=8,
    original_max_position_embeddings=8,
    beta_fast=2,
    beta_slow=0.5,
    mscale=0.7,
    mscale_all_dim=0.7,
)


def fresh(config: Config = SMALL, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters large enough that every path matters, gains away from 1."""
    params = parameters.initialise(config, seed, 0.4, np.float64)
    rng = np.random.default_rng(seed)
    return {
        k: p * rng.uniform(0.5, 1.5, p.shape) if k.endswith("norm.weight") else p
        for k, p in params.items()
    }


def ids(B: int = 2, T: int = 5, seed: int = 0, config: Config = SMALL) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


# --- forward and backward against torch ---------------------------------------------


def rotary(config: Config) -> tuple[torch.Tensor, float]:
    """Angles and softmax scale; YaRN as a loop over the pairs (facts A.4)."""
    d, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    theta = [base ** (-2 * j / d) for j in range(d // 2)]
    if yarn is None:
        return torch.tensor(theta, dtype=torch.float64), d**-0.5

    def corr(n: float) -> float:
        context = yarn.original_max_position_embeddings
        return d * math.log(context / (2 * math.pi * n)) / (2 * math.log(base))

    low = max(math.floor(corr(yarn.beta_fast)), 0)
    high = min(math.ceil(corr(yarn.beta_slow)), d - 1)
    for j in range(d // 2):
        ramp = min(max((j - low) / (high - low), 0), 1)
        theta[j] *= 1 - ramp + ramp / yarn.factor
    m = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return torch.tensor(theta, dtype=torch.float64), m * m * d**-0.5


def torch_swiglu(w: dict, config: Config, u: torch.Tensor) -> torch.Tensor:
    gate, up = u @ w["mlp.gate_proj.weight"].T, u @ w["mlp.up_proj.weight"].T
    return (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def torch_block(
    w: dict, config: Config, x: torch.Tensor, feed: Callable = torch_swiglu
) -> torch.Tensor:
    """One block in torch's own operations; RoPE as a matrix per pair."""
    B, T, _ = x.shape
    eps = config.rms_norm_eps
    theta, scale = rotary(config)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * theta
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    turn = turn.unflatten(-1, (2, 2)).to(x.dtype)

    def heads(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.view(B, T, n, -1).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(
            "tjrc,bhtjc->bhtjr", turn, x.unflatten(-1, (-1, 2))
        ).flatten(-2)

    u = F.rms_norm(x, x.shape[-1:], w["input_layernorm.weight"], eps)
    q = rotate(heads(u @ w["self_attn.q_proj.weight"].T, config.num_attention_heads))
    n_kv = config.num_key_value_heads
    k = rotate(heads(u @ w["self_attn.k_proj.weight"].T, n_kv))
    v = heads(u @ w["self_attn.v_proj.weight"].T, n_kv)
    o = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=scale
    )
    x = x + o.transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
    u = F.rms_norm(x, x.shape[-1:], w["post_attention_layernorm.weight"], eps)
    return x + feed(w, config, u)


def under(p: dict, layer: int) -> dict:
    """The parameters of a block, by their names inside it."""
    prefix = f"model.layers.{layer}."
    return {k.removeprefix(prefix): a for k, a in p.items() if k.startswith(prefix)}


def torch_trunk(
    p: dict, config: Config, tokens: torch.Tensor, block: Callable = torch_block
) -> torch.Tensor:
    """Hidden states after the final norm."""
    x = F.embedding(tokens, p["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        x = block(under(p, layer), config, x)
    return F.rms_norm(x, x.shape[-1:], p["model.norm.weight"], config.rms_norm_eps)


def torch_model(p: dict, config: Config, tokens: torch.Tensor) -> torch.Tensor:
    """The plain transformer in torch's own operations."""
    return torch_trunk(p, config, tokens) @ p["lm_head.weight"].T


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 6), (3, 4)])
def test_loss_and_every_gradient_agree_with_autograd(B: int, T: int) -> None:
    params, tokens = fresh(), ids(B, T + 1)
    losses, grads, _ = model.loss_and_grads(params, SMALL, tokens, RECIPE)
    p = {k: torch.tensor(a, requires_grad=True) for k, a in params.items()}
    t = torch.tensor(tokens)
    logits = torch_model(p, SMALL, t[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten())
    loss.backward()
    assert losses["main"] == pytest.approx(loss.item(), rel=1e-13)
    assert losses["total"] == losses["main"]
    assert sorted(grads) == sorted(params)
    for name, g in grads.items():
        assert relative_error(g, p[name].grad.numpy()) <= AUTOGRAD, name


def test_every_gradient_agrees_with_differences() -> None:
    params, tokens = fresh(), ids(2, 4)
    _, grads, _ = model.loss_and_grads(params, SMALL, tokens, RECIPE)
    logits_of = model.forward

    def loss() -> float:
        z, _ = logits_of(params, SMALL, tokens[:, :-1])
        z = z - z.max(-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return -float(np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean())

    for name, array in params.items():
        numeric = central_differences(loss, array, 1e-6)
        error = np.linalg.norm(grads[name] - numeric)
        # the quotient's own rounding: 1e-16 / 1e-6 an entry
        assert error <= 1e-6 * np.linalg.norm(numeric) + 1e-9 * array.size**0.5, name


def interleaved_to_half_split(W: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2j, 2j+1) of each head to (j, j + d/2), the order Llama in HF expects."""
    d = W.shape[0] // heads
    order = np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    return W.reshape(heads, d, -1)[:, order].reshape(W.shape)


def test_logits_agree_with_transformers_llama() -> None:
    """A plain transformer is a Llama, but for the order of the rotated pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dataclasses.replace(SMALL, hidden_size=8, v_head_dim=4)
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.qk_rope_head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
        )
    ).eval()
    params = {k: p.astype(np.float32) for k, p in fresh(config).items()}
    theirs = dict(params)
    for name in params:
        for kind, heads in (("q_proj", 4), ("k_proj", 2)):
            if kind in name:
                theirs[name] = interleaved_to_half_split(params[name], heads)
    state = {k: torch.tensor(a) for k, a in theirs.items()}
    peer.load_state_dict(state, strict=True)
    tokens = ids(2, 9, config=config)
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    ours, _ = model.forward(params, config, tokens)
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_no_position_sees_the_future() -> None:
    params, tokens = fresh(), ids(1, 8)
    before, _ = model.forward(params, SMALL, tokens)
    for j in range(8):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % SMALL.vocab_size
        after, _ = model.forward(params, SMALL, changed)
        np.testing.assert_allclose(after[:, :j], before[:, :j], rtol=0, atol=1e-12)
        assert (np.abs(after - before)[:, j:].max(axis=-1) > 1e-9).all()


def test_sequences_of_a_batch_do_not_mix() -> None:
    params, tokens = fresh(), ids(3, 6)
    together, _ = model.forward(params, SMALL, tokens)
    alone = [model.forward(params, SMALL, row[None])[0] for row in tokens]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 8, [3, 5], [5, 1, 2], [8]])
def test_cached_logits_are_uncached_logits(chunks: list) -> None:
    params, tokens = fresh(), ids(2, 8)
    full, _ = model.forward(params, SMALL, tokens)
    caches, parts, start = model.new_caches(SMALL, 8), [], 0
    for n in chunks:
        logits, _ = model.forward(params, SMALL, tokens[:, start : start + n], caches)
        parts.append(logits)
        start += n
    np.testing.assert_allclose(np.concatenate(parts, 1), full, rtol=0, atol=1e-12)


def test_float32_stays_float32() -> None:
    params = {k: p.astype(np.float32) for k, p in fresh().items()}
    logits, _ = model.forward(params, SMALL, ids())
    _, grads, _ = model.loss_and_grads(params, SMALL, ids(), RECIPE)
    assert logits.dtype == np.float32
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}


def test_an_untrained_model_knows_nothing() -> None:
    params = parameters.initialise(PLAIN, 0, 0.02)
    tokens = ids(4, 65, config=PLAIN)
    losses, _, _ = model.loss_and_grads(params, PLAIN, tokens, RECIPE)
    assert losses["main"] == pytest.approx(math.log(257), abs=0.05)


# --- the border ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 11]], "token id 11 is outside the vocabulary 0…10"),
        ([[-1, 0]], "token id -1 is outside"),
        ([0, 1], r"shape \(batch, time\).*\(2,\)"),
        ([[]], "neither axis empty"),
        ([[0.5]], "must be integers.*float64"),
        ([[0] * 17], "17 positions asked for, but max_position_embeddings is 16"),
    ],
)
def test_bad_ids_are_refused(tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.forward(fresh(), SMALL, np.array(tokens))


def test_one_token_is_no_training_sequence() -> None:
    with pytest.raises(ValueError, match="two columns"):
        model.loss_and_grads(fresh(), SMALL, ids(2, 1), RECIPE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_parameter_that_is_not_finite_is_named(bad: float) -> None:
    params = fresh()
    params["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match="layers.1.mlp.up_proj"),
    ):
        model.forward(params, SMALL, ids())


def test_overflow_with_finite_parameters_is_told_apart() -> None:
    params = {k: p.astype(np.float32) for k, p in fresh().items()}
    params["lm_head.weight"][:] = 3e38
    with (
        np.errstate(all="ignore"),
        pytest.raises(FloatingPointError, match="activations overflowed"),
    ):
        model.forward(params, SMALL, ids())


def test_parameters_of_another_model_are_refused() -> None:
    params = fresh()
    del params["model.norm.weight"]
    params["model.Norm.weight"] = np.ones(6)
    with pytest.raises(
        parameters.ParameterError, match="missing model.norm.weight, not"
    ):
        model.forward(params, SMALL, ids())
    params = fresh()
    params["lm_head.weight"] = params["lm_head.weight"].T
    with pytest.raises(
        parameters.ParameterError, match=r"\(6, 11\).*asks for \(11, 6\)"
    ):
        model.forward(params, SMALL, ids())


# --- parameters ---------------------------------------------------------------------


def test_v3_has_671_billion_parameters() -> None:
    """Facts D.1, to the last one, and nothing is allocated."""
    main = dataclasses.replace(V3, num_nextn_predict_layers=0)
    assert parameters.count(main) == 671_026_419_200
    assert parameters.count(V3) - parameters.count(main) == 11_610_068_224


def test_v3_counts_by_component() -> None:
    sizes = {k: math.prod(s) for k, s in parameters.shapes(V3).items()}

    def total(part: str) -> int:
        return sum(n for k, n in sizes.items() if part in k and ".61." not in k)

    assert total(".mlp.experts.") == 653_908_770_816
    assert total(".shared_experts.") == 2_554_331_136
    assert total(".mlp.gate.") == 106_445_312
    assert total(".self_attn.") == 11_413_547_008
    assert total("layers.0.mlp.") == 396_361_728
    assert total("embed_tokens") == total("lm_head") == 926_679_040


def test_keys_and_shapes_are_transformers_own() -> None:
    """TINY's main model on the meta device: their keys, with the experts stacked."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    names = [f.name for f in dataclasses.fields(config) if f.name != "rope_scaling"]
    with torch.device("meta"):
        peer = DeepseekV3ForCausalLM(
            DeepseekV3Config(**{n: getattr(config, n) for n in names})
        )
    theirs = {k: tuple(p.shape) for k, p in peer.state_dict().items()}
    ours = {}
    for name, shape in parameters.shapes(config).items():
        # in memory transformers joins gate and up, and drops ".weight"
        if ".experts." in name:
            continue
        ours[name] = shape
    assert ours == {k: s for k, s in theirs.items() if ".experts." not in k}
    assert sum(math.prod(s) for s in theirs.values()) == parameters.count(config)


def test_mini_is_small_enough_to_ship() -> None:
    assert parameters.count(MINI) <= 15_500_000


def test_plain_size() -> None:
    params = parameters.initialise(PLAIN, 0, 0.02)
    assert parameters.count(PLAIN) == sum(p.size for p in params.values())
    assert parameters.count(PLAIN) == 2 * 257 * 128 + 128 + 4 * (
        4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    )


def test_initialisation_is_what_it_says() -> None:
    params = parameters.initialise(PLAIN, 7, 0.02)
    for name, p in params.items():
        assert p.dtype == np.float32
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        else:
            assert p.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(p.mean()) < 4 * 0.02 / p.size**0.5, name


def test_models_that_share_a_part_share_its_dice() -> None:
    deeper = dataclasses.replace(SMALL, num_hidden_layers=3)
    a, b = parameters.initialise(SMALL, 1, 0.1), parameters.initialise(deeper, 1, 0.1)
    assert all((b[k] == a[k]).all() for k in a)
    other = parameters.initialise(SMALL, 2, 0.1)
    assert not (other["lm_head.weight"] == a["lm_head.weight"]).any()
    layers = [a[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not (layers[0] == layers[1]).any()


# --- files --------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_model(tmp_path) -> None:
    params = parameters.initialise(SMALL, 0, 0.1)
    checkpoints.save(tmp_path / "deep" / "run", SMALL, params)
    config, again = checkpoints.load(tmp_path / "deep" / "run")
    assert config == SMALL
    assert sorted(again) == sorted(params)
    assert all((again[k] == params[k]).all() for k in params)
    assert not list(tmp_path.rglob("*.part"))


def test_a_transposed_view_is_saved_as_it_reads(tmp_path) -> None:
    params = parameters.initialise(SMALL, 0, 0.1)
    params["lm_head.weight"] = np.asfortranarray(params["lm_head.weight"])
    checkpoints.save(tmp_path, SMALL, params)
    _, again = checkpoints.load(tmp_path)
    np.testing.assert_array_equal(again["lm_head.weight"], params["lm_head.weight"])


def test_parameters_with_nan_are_not_saved(tmp_path) -> None:
    params = parameters.initialise(SMALL, 0, 0.1)
    checkpoints.save(tmp_path, SMALL, params)
    before = (tmp_path / checkpoints.WEIGHTS).read_bytes()
    params["lm_head.weight"][0, 0] = np.nan
    with pytest.raises(parameters.ParameterError, match="lm_head.weight holds NaN"):
        checkpoints.save(tmp_path, SMALL, params)
    assert (tmp_path / checkpoints.WEIGHTS).read_bytes() == before


def test_broken_files_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(checkpoints.CheckpointError, match="no model.safetensors"):
        checkpoints.load(tmp_path)
    params = parameters.initialise(SMALL, 0, 0.1)
    checkpoints.save(tmp_path, SMALL, params)
    path = tmp_path / checkpoints.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(checkpoints.CheckpointError, match="cut short"):
        checkpoints.load(tmp_path)


# --- every field of the config matters ----------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 0.5},
        {"rope_theta": 50.0},
        {"rope_scaling": STRETCH},
        {  # the base decides which pairs YaRN blends
            "qk_rope_head_dim": 12,
            "rope_theta": 20.0,
            "max_position_embeddings": 512,
            "rope_scaling": dataclasses.replace(
                STRETCH, original_max_position_embeddings=64, beta_fast=4, beta_slow=1
            ),
        },
    ],
)
def test_the_config_reaches_the_logits(change: dict) -> None:
    """Against the torch model, which reads the same field by its own arithmetic."""
    config = dataclasses.replace(SMALL, **change)
    params, tokens = fresh(config), ids(2, 6)
    ours, _ = model.forward(params, config, tokens)
    p = {k: torch.tensor(a) for k, a in params.items()}
    theirs = torch_model(p, config, torch.tensor(tokens)).numpy()
    assert relative_error(ours, theirs) <= 1e-12
    plain = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "rope_scaling": None}
    without, _ = model.forward(params, dataclasses.replace(config, **plain), tokens)
    assert relative_error(without, theirs) > 1e-3


def test_a_model_can_be_loaded_in_float64(tmp_path) -> None:
    checkpoints.save(tmp_path, SMALL, parameters.initialise(SMALL, 0, 0.1))
    _, params = checkpoints.load(tmp_path, np.float64)
    assert {p.dtype for p in params.values()} == {np.dtype(np.float64)}


def test_files_and_config_must_belong_together(tmp_path) -> None:
    wider = dataclasses.replace(SMALL, intermediate_size=9)
    with pytest.raises(parameters.ParameterError, match=r"asks for \(9, 6\)"):
        checkpoints.save(tmp_path, wider, parameters.initialise(SMALL, 0, 0.1))
    assert not list(tmp_path.iterdir())
    checkpoints.save(tmp_path, SMALL, parameters.initialise(SMALL, 0, 0.1))
    wider.to_json(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"asks for \(9, 6\)"):
        checkpoints.load(tmp_path)


def test_each_expert_has_a_name_of_its_own_in_the_file(tmp_path) -> None:
    """Stacked in memory, apart in the file, as released; there and back unchanged."""
    params = parameters.initialise(TINY, 0, 0.1)
    checkpoints.save(tmp_path, TINY, params)
    tensors, _ = checkpoints.read_tensors(tmp_path / checkpoints.WEIGHTS)
    stacked = params["model.layers.1.mlp.experts.up_proj.weight"]
    for i in range(TINY.n_routed_experts):
        one = tensors[f"model.layers.1.mlp.experts.{i}.up_proj.weight"]
        np.testing.assert_array_equal(one, stacked[i])
    assert not [name for name in tensors if ".experts.up_proj" in name]
    config, loaded = checkpoints.load(tmp_path)
    assert config == TINY and loaded.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("break_it", ["leave out", "transpose"])
def test_a_broken_expert_is_named(tmp_path, break_it: str) -> None:
    checkpoints.save(tmp_path, TINY, parameters.initialise(TINY, 0, 0.1))
    path = tmp_path / checkpoints.WEIGHTS
    tensors, metadata = checkpoints.read_tensors(path)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    one = tensors.pop(name)
    if break_it == "transpose":
        tensors[name] = one.T
    checkpoints.write_tensors(path, tensors, metadata)
    with pytest.raises(checkpoints.CheckpointError, match=re.escape(name)):
        checkpoints.load(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    """The writer fails half-way; what was there is still there, whole."""
    checkpoints.save(tmp_path, SMALL, parameters.initialise(SMALL, 0, 0.1))
    before = (tmp_path / checkpoints.WEIGHTS).read_bytes()

    def half(tensors: dict, path, metadata: dict) -> None:
        path.write_bytes(before[:100])
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors_files, "save_file", half)
    with pytest.raises(OSError, match="disk is full"):
        checkpoints.save(tmp_path, SMALL, parameters.initialise(SMALL, 1, 0.1))
    assert (tmp_path / checkpoints.WEIGHTS).read_bytes() == before
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.part"))


def test_a_file_is_synced_before_it_takes_its_place(tmp_path, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("sync"))
    replace_file = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *a: (done.append("replace"), replace_file(*a))
    )
    checkpoints.save(tmp_path, SMALL, parameters.initialise(SMALL, 0, 0.1))
    assert done == ["sync", "replace"] * 2


def test_bfloat16_files_can_be_read(tmp_path) -> None:
    params = parameters.initialise(SMALL, 0, 0.1)
    halves = {k: p.astype(ml_dtypes.bfloat16) for k, p in params.items()}
    SMALL.to_json(tmp_path)
    checkpoints.write_tensors(tmp_path / checkpoints.WEIGHTS, halves, {})
    _, again = checkpoints.load(tmp_path)
    for name, p in params.items():
        assert again[name].dtype == np.float32
        np.testing.assert_allclose(again[name], p, rtol=2**-8)
    # and where nobody else has imported ml_dtypes
    code = "import sys; from minidsv3.checkpoints import load; load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_each_layer_needs_a_cache() -> None:
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        model.forward(fresh(), SMALL, ids(), model.new_caches(SMALL, 8)[:1])


# --- files of models with MTP -------------------------------------------------------

MTP = dataclasses.replace(SMALL, num_nextn_predict_layers=2)
COPIES = {
    f"model.layers.{layer}.{copy}": first
    for layer in (2, 3)
    for copy, first in checkpoints.COPIES.items()
}


def test_the_modules_copies_stand_in_the_file_and_not_in_memory(tmp_path) -> None:
    """Facts C.1: the released file repeats embedding and head in the module."""
    params = parameters.initialise(MTP, 0, 0.1)
    checkpoints.save(tmp_path, MTP, params)
    tensors, _ = checkpoints.read_tensors(tmp_path / checkpoints.WEIGHTS)
    assert sorted(tensors) == sorted([*params, *COPIES])
    assert "model.layers.2.shared_head.head.weight" in tensors
    for copy, first in COPIES.items():
        np.testing.assert_array_equal(tensors[copy], params[first])
    config, again = checkpoints.load(tmp_path)
    assert config == MTP and sorted(again) == sorted(params)
    assert all((again[k] == params[k]).all() for k in params)


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_differs_is_refused(tmp_path, copy: str) -> None:
    checkpoints.save(tmp_path, MTP, parameters.initialise(MTP, 0, 0.1))
    tensors, _ = checkpoints.read_tensors(tmp_path / checkpoints.WEIGHTS)
    tensors[copy][0, 0] += 1
    checkpoints.write_tensors(tmp_path / checkpoints.WEIGHTS, tensors, {})
    with pytest.raises(checkpoints.CheckpointError, match=f"{copy} differs from"):
        checkpoints.load(tmp_path)


def test_a_file_without_mtp_weights_is_the_main_model(tmp_path) -> None:
    params = parameters.initialise(MTP, 0, 0.1)
    MTP.to_json(tmp_path)
    main = parameters.initialise(SMALL, 0, 0.1)
    checkpoints.write_tensors(tmp_path / checkpoints.WEIGHTS, main, {})
    with pytest.warns(checkpoints.CheckpointNotice, match="no MTP weights.*is 2"):
        config, again = checkpoints.load(tmp_path)
    assert config == SMALL
    assert all((again[k] == params[k]).all() for k in again)


@pytest.mark.parametrize(
    "absent",
    [
        "model.layers.3.",
        "model.layers.2.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.2.enorm.weight",
        "lm_head.weight",
    ],
)
def test_a_file_with_some_mtp_weights_is_refused(tmp_path, absent: str) -> None:
    checkpoints.save(tmp_path, MTP, parameters.initialise(MTP, 0, 0.1))
    tensors, _ = checkpoints.read_tensors(tmp_path / checkpoints.WEIGHTS)
    kept = {k: a for k, a in tensors.items() if not k.startswith(absent)}
    assert len(kept) < len(tensors)
    checkpoints.write_tensors(tmp_path / checkpoints.WEIGHTS, kept, {})
    with pytest.raises(checkpoints.CheckpointError, match=absent):
        checkpoints.load(tmp_path)
