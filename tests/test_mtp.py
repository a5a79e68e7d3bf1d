"""Multi-token prediction: the module, the chain, the losses, and what it must not do.

The judges share no line with the library: torch's operations and autograd, finite
differences, a naive loop over positions, and Hugging Face transformers' own MTP layer.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import parameters
from minidsv3.config import TINY, Config, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.mtp import numpy_ref as mtp
from minidsv3.training import numpy_ref as training
from tests.oracles import (
    AUTOGRAD,
    DIFFERENCES,
    central_differences,
    check_pair,
    relative_error,
)
from tests.test_model import (
    SMALL,
    fresh,
    ids,
    torch_block,
    torch_trunk,
    under,
)

MTP = {D: dataclasses.replace(SMALL, num_nextn_predict_layers=D) for D in (0, 1, 2, 3)}
RECIPE = TrainConfig(mtp_weight=0.7)  # no weight that hides: 1 would forgive λ² for λ
MODULE_KEYS = [
    *("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "shared_head.norm.weight",
]


# --- the module and the model in torch ----------------------------------------------


def norm(x: torch.Tensor, gain: torch.Tensor, config: Config) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, config.rms_norm_eps)


def torch_module(
    w: dict,
    config: Config,
    h: torch.Tensor,
    e: torch.Tensor,
    block: Callable = torch_block,
) -> torch.Tensor:
    """Facts C.1, in the order of the released weights: two halves of eh_proj."""
    D = config.hidden_size
    of_e, of_h = w["eh_proj.weight"][:, :D], w["eh_proj.weight"][:, D:]
    e, h = norm(e, w["enorm.weight"], config), norm(h, w["hnorm.weight"], config)
    x = e @ of_e.T + h @ of_h.T
    return norm(block(w, config, x), w["shared_head.norm.weight"], config)


def torch_losses(
    p: dict, config: Config, tokens: np.ndarray, block: Callable = torch_block
) -> list[torch.Tensor]:
    """Main and further losses, by a double loop over sequences and positions.

    Positions are counted from 1, as the report counts them.
    """
    B, T = tokens.shape[0], tokens.shape[1] - 1
    losses = []
    h = torch_trunk(p, config, torch.tensor(tokens[:, :-1]), block)
    for k in range(config.num_nextn_predict_layers + 1):
        if k > 0:
            w = under(p, config.num_hidden_layers + k - 1)
            rows = [
                [p["model.embed_tokens.weight"][tokens[b, i + k - 1]]
                 for i in range(1, T - k + 1)]
                for b in range(B)
            ]  # fmt: skip
            e = torch.stack([torch.stack(row) for row in rows])
            h = torch_module(w, config, h[:, : T - k], e, block)
        total = torch.zeros((), dtype=torch.float64)
        for b in range(B):
            for i in range(1, T - k + 1):
                z = p["lm_head.weight"] @ h[b, i - 1]
                target = tokens[b, i + k]  # t_{i+k+1}: ids are stored from 0
                total = total - torch.log_softmax(z, 0)[target]
        losses.append(total / (B * (T - k)))
    return losses


def as_tensors(params: dict) -> dict:
    return {k: torch.tensor(a, requires_grad=True) for k, a in params.items()}


SHORT_AND_LONG = [(1, 1, 2), (1, 3, 5), (2, 1, 3), (2, 2, 6), (3, 2, 4)]  # D, B, T


@pytest.mark.parametrize(("D", "B", "T"), SHORT_AND_LONG)
def test_losses_and_every_gradient_agree_with_autograd(D: int, B: int, T: int) -> None:
    config = MTP[D]
    params, tokens = fresh(config), ids(B, T + 1)
    losses, grads, stats = model.loss_and_grads(params, config, tokens, RECIPE)
    p = as_tensors(params)
    main, *further = torch_losses(p, config, tokens)
    total = main + RECIPE.mtp_weight / D * sum(further)
    total.backward()
    assert list(losses) == ["main", *(f"mtp_{k + 1}" for k in range(D)), "total"]
    expected = [main, *further, total]
    for (name, ours), theirs in zip(losses.items(), expected, strict=True):
        assert ours == pytest.approx(theirs.item(), rel=1e-12), name
    assert sorted(grads) == sorted(params) and stats == {}
    for name, g in grads.items():
        assert relative_error(g, p[name].grad.numpy()) <= AUTOGRAD, name


@pytest.mark.parametrize("D", [1, 2])
def test_every_gradient_agrees_with_differences(D: int) -> None:
    config = MTP[D]
    params, tokens = fresh(config), ids(2, D + 3)
    _, grads, _ = model.loss_and_grads(params, config, tokens, RECIPE)

    def loss() -> float:
        logits, saved = model.forward(params, config, tokens[:, :-1])
        z = logits - logits.max(-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        main = -np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()
        h = model.hidden_states(saved)
        further, _ = model.mtp_losses(params, config, tokens, h)
        return float(main + RECIPE.mtp_weight * np.mean(further))

    for name, array in params.items():
        numeric = central_differences(loss, array, 1e-6)
        error = np.linalg.norm(grads[name] - numeric)
        # the quotient's own rounding: 1e-16 / 1e-6 an entry
        floor = 1e-9 * array.size**0.5
        assert error <= DIFFERENCES * np.linalg.norm(numeric) + floor, name


def module_of(config: Config, seed: int = 0) -> dict:
    prefix = f"model.layers.{config.num_hidden_layers}."
    return parameters.cut(fresh(config, seed), prefix)


def plain_block(config: Config = SMALL) -> mtp.Block:
    return model._mtp_block(config, np.dtype(np.float64))


@pytest.mark.parametrize("T", [1, 4])
def test_the_module_alone(T: int) -> None:
    """Forward, dh, de and every weight, against autograd and differences."""
    config, names = MTP[1], MODULE_KEYS
    params = module_of(config)
    rng = np.random.default_rng(1)
    h, e = rng.normal(size=(2, 2, T, config.hidden_size))

    def forward(h: np.ndarray, e: np.ndarray, *weights: np.ndarray) -> tuple:
        table = dict(zip(names, weights, strict=True))
        return mtp.mtp_forward(table, h, e, plain_block(), config.rms_norm_eps)

    def backward(dh_k: np.ndarray, saved: tuple) -> tuple:
        dh, de, grads = mtp.mtp_backward(dh_k, saved)
        assert sorted(grads) == sorted(names)
        return (dh, de, *(grads[name] for name in names))

    def oracle(h: torch.Tensor, e: torch.Tensor, *weights: torch.Tensor):
        return torch_module(dict(zip(names, weights, strict=True)), config, h, e)

    check_pair(forward, backward, [h, e, *(params[n] for n in names)], oracle)


def test_the_shapes_of_the_chain_must_agree() -> None:
    h, e = np.ones((2, 3, 6)), np.ones((2, 4, 6))
    with pytest.raises(ValueError, match=r"\(2, 3, 6\) and embeddings \(2, 4, 6\)"):
        mtp.mtp_forward(module_of(MTP[1]), h, e, plain_block(), 1e-6)


# --- transformers -------------------------------------------------------------------


def as_released(params: dict, config: Config) -> dict[str, torch.Tensor]:
    """The names of DeepSeek's file: one key an expert, embedding and head repeated."""
    table = {}
    for name, array in params.items():
        if ".experts." not in name:
            table[name] = torch.tensor(array)
            continue
        stem, kind = name.split(".experts.")
        for i, expert in enumerate(array):
            table[f"{stem}.experts.{i}.{kind}"] = torch.tensor(expert)
    L = config.num_hidden_layers
    for layer in range(L, L + config.num_nextn_predict_layers):
        module = f"model.layers.{layer}."
        copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
        for copy, first in copies.items():
            table[f"{module}{copy}.weight"] = table[f"{first}.weight"].clone()
    return table


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """TINY with two modules, in our names, and in transformers by way of a file."""
    from safetensors.torch import save_file
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    config = dataclasses.replace(TINY, num_nextn_predict_layers=2)
    params = {k: p.astype(np.float32) for k, p in fresh(config).items()}
    config.to_json(tmp_path)
    tensors = as_released(params, config)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    # its list of MTP layers is written for 61 layers (facts C.5)
    pattern = [r"model\.layers\.[23]\..*"]
    monkeypatch.setattr(
        DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern
    )
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    main = DeepseekV3ForCausalLM.from_pretrained(tmp_path, **eager).eval()
    return config, params, main, MtpModel.from_pretrained(main).eval()


@torch.no_grad()
def test_the_chain_is_transformers_chain(peers) -> None:
    """Through the keys of the file: norms, order, projection, last norm, both depths.

    Its blocks are MLA with experts, which we have not built: so its own decoder layers
    are the block on both sides, told apart by the length of what they are given. It
    counts positions from i + 1, we from i.
    """
    from transformers.cache_utils import MtpCache

    config, params, main, theirs = peers
    T, tokens = 7, torch.tensor(ids(1, 7, config=config))
    h = main(tokens, output_hidden_states=True).hidden_states[-1]
    states, state, cache = [], h, MtpCache(config=theirs.config)
    for k in (1, 2):
        positions = torch.arange(k, T)[None]
        state = theirs.forward_layer(
            k - 1, state[:, :-1], positions, cache, input_ids=tokens[:, k:]
        )
        states.append(state.numpy())

    def block_forward(_: dict, x: np.ndarray) -> tuple[np.ndarray, None]:
        n = x.shape[1]
        layer = theirs.layers[T - n - 1].mtp_block
        x = torch.tensor(x)
        future = torch.full((n, n), float("-inf")).triu(1)[None, None]
        turn = theirs.rotary_emb(x, position_ids=torch.arange(n)[None])
        y = layer(x, attention_mask=future, position_embeddings=turn)
        return y.numpy(), None

    e = params["model.embed_tokens.weight"][tokens]
    modules = [parameters.cut(params, f"model.layers.{layer}.") for layer in (2, 3)]
    block = mtp.Block(block_forward, None)
    ours, _ = mtp.chain_forward(modules, h.numpy(), e, block, config.rms_norm_eps)
    for one, other in zip(ours, states, strict=True):
        assert one.dtype == np.float32
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
    logits = theirs.shared_head(torch.tensor(ours[0]))
    expected = theirs.shared_head(torch.tensor(states[0]))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- what depends on what -----------------------------------------------------------


def depth_states(params: dict, config: Config, tokens: np.ndarray) -> list[np.ndarray]:
    """h^1 … h^D of a text whose tokens are all read."""
    _, saved = model.forward(params, config, tokens)
    e = params["model.embed_tokens.weight"][tokens]
    modules = [
        parameters.cut(params, f"model.layers.{config.num_hidden_layers + k}.")
        for k in range(config.num_nextn_predict_layers)
    ]
    h, eps = model.hidden_states(saved), config.rms_norm_eps
    return mtp.chain_forward(modules, h, e, plain_block(config), eps)[0]


def test_no_depth_sees_the_token_it_predicts() -> None:
    """Token j reaches depth k at positions i with i + k ≥ j, and there only."""
    config, T = MTP[3], 8
    params, tokens = fresh(config), ids(1, T)
    before = depth_states(params, config, tokens)
    assert [h.shape[1] for h in before] == [7, 6, 5]
    for j in range(T):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        after = depth_states(params, config, changed)
        for k in (1, 2, 3):
            moved = np.abs(after[k - 1] - before[k - 1])[0].max(axis=-1)
            reached = np.arange(T - k) + k >= j
            assert (moved[~reached] <= 1e-12).all(), (j, k)
            assert (moved[reached] > 1e-9).all(), (j, k)


def test_depth_k_predicts_the_token_after_those_it_sees() -> None:
    """At positions 1 … T - k it is t_{i+k+1}: two on from i at depth 1."""
    text = np.arange(1, 10)[None]  # t_i = i, T = 8
    for k in range(4):
        i = np.arange(1, 8 - k + 1)
        np.testing.assert_array_equal(mtp.targets(text, k)[0], i + k + 1)


def test_dropping_the_modules_leaves_the_main_model() -> None:
    """Bit for bit: p. 11, the modules can be discarded."""
    params, tokens = fresh(MTP[2]), ids(3, 7)
    with_modules, _ = model.forward(params, MTP[2], tokens)
    main = {k: a for k, a in params.items() if k in parameters.shapes(SMALL)}
    assert len(main) < len(params)
    alone, _ = model.forward(main, SMALL, tokens)
    np.testing.assert_array_equal(alone, with_modules)


def test_without_weight_the_modules_teach_nothing() -> None:
    """λ = 0: the main model's gradients, bit for bit, and the modules' are zero."""
    params, tokens = fresh(MTP[2]), ids(2, 7)
    recipe = dataclasses.replace(RECIPE, mtp_weight=0.0)
    losses, grads, _ = model.loss_and_grads(params, MTP[2], tokens, recipe)
    main = {k: a for k, a in params.items() if k in parameters.shapes(SMALL)}
    alone, expected, _ = model.loss_and_grads(main, SMALL, tokens, recipe)
    assert losses["main"] == losses["total"] == alone["main"]
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected.get(name, 0.0), err_msg=name)


def test_float32_stays_float32() -> None:
    params = {k: p.astype(np.float32) for k, p in fresh(MTP[2]).items()}
    _, grads, _ = model.loss_and_grads(params, MTP[2], ids(), RECIPE)
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}


def test_the_weight_falls_after_ten_of_every_14_8_steps() -> None:
    """Report, p. 23: 0.3 for the first 10T tokens, 0.1 for the other 4.8T."""
    recipe = TrainConfig(steps=148)
    weights = [mtp.mtp_weight(step, recipe) for step in range(1, 149)]
    assert weights == [0.3] * 100 + [0.1] * 48
    assert mtp.mtp_weight(1, TrainConfig(steps=1, warmup_steps=0)) == 0.3


def test_training_uses_the_weight_of_its_step() -> None:
    recipe = TrainConfig(steps=6, warmup_steps=0, batch_size=2, sequence_length=8)
    text = np.random.default_rng(0).integers(0, SMALL.vocab_size, 400)
    state = training.new_state(fresh(MTP[1]))
    for record in training.train(state, MTP[1], recipe, text):
        losses = record.losses
        weight = (losses["total"] - losses["main"]) / losses["mtp_1"]
        assert weight == pytest.approx(0.3 if record.step <= 5 else 0.1)


# --- drafting: one cached step of module 1 ------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 4], [5, 1, 1], [7]])
def test_cached_drafts_are_uncached_drafts(chunks: list) -> None:
    config = MTP[2]  # module 1 drafts, however many there are
    params, tokens = fresh(config), ids(2, 8)
    _, saved = model.forward(params, config, tokens)
    h = model.hidden_states(saved)[:, :-1]
    full = depth_states(params, config, tokens)[0] @ params["lm_head.weight"].T
    cache, parts, start = model.new_mtp_cache(config, 7), [], 0
    for n in chunks:
        now = slice(start, start + n)
        pairs = h[:, now], tokens[:, 1:][:, now]
        parts.append(model.mtp_step(params, config, *pairs, cache))
        start += n
    assert cache.length == 7
    np.testing.assert_allclose(np.concatenate(parts, 1), full, rtol=0, atol=1e-12)


# --- the border ---------------------------------------------------------------------


@pytest.mark.parametrize(("D", "T"), [(1, 1), (2, 2), (3, 2)])
def test_texts_too_short_for_the_deepest_module(D: int, T: int) -> None:
    message = f"{T} positions to read, but {D} modules .* need {D + 1}"
    with pytest.raises(ValueError, match=message):
        model.loss_and_grads(fresh(MTP[D]), MTP[D], ids(2, T + 1), RECIPE)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 11, 0, 0]], "token id 11 is outside the vocabulary"),
        ([[0, 0, 0, 11]], "target id 11 is outside the vocabulary"),
        ([[0, -1, 0, 0]], "token id -1"),
        ([0, 1, 2, 3], r"shape \(batch, time\)"),
        ([[0.5] * 4], "must be integers"),
        ([[0] * 18], "17 positions asked for"),
    ],
)
def test_bad_ids_are_refused(tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.loss_and_grads(fresh(MTP[1]), MTP[1], np.array(tokens), RECIPE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["eh_proj.weight", "mlp.up_proj.weight"])
def test_a_module_that_is_not_finite_is_named(bad: float, name: str) -> None:
    params, tokens = fresh(MTP[2]), ids(1, 6)
    params[f"model.layers.2.{name}"][0, 0] = bad
    logits, saved = model.forward(params, MTP[2], tokens)  # the main model is whole
    h, cache = model.hidden_states(saved), model.new_mtp_cache(MTP[2], 5)
    with np.errstate(invalid="ignore", over="ignore"):
        with pytest.raises(FloatingPointError, match=f"layers.2.{name} holds NaN"):
            model.loss_and_grads(params, MTP[2], tokens, RECIPE)
        with pytest.raises(FloatingPointError, match=f"layers.2.{name} holds NaN"):
            model.mtp_step(params, MTP[2], h[:, :-1], tokens[:, 1:], cache)


def test_parameters_without_a_module_are_refused() -> None:
    with pytest.raises(parameters.ParameterError, match="missing model.layers.2.enorm"):
        model.loss_and_grads(fresh(SMALL), MTP[1], ids(), RECIPE)
    params = fresh(MTP[1])
    params["model.layers.2.eh_proj.weight"] = np.ones((6, 6))
    with pytest.raises(parameters.ParameterError, match=r"eh_proj.*asks for \(6, 12\)"):
        model.loss_and_grads(params, MTP[1], ids(), RECIPE)


def test_bad_drafting_steps() -> None:
    params, h = fresh(MTP[1]), np.ones((1, 3, 6))
    cache = model.new_mtp_cache(MTP[1], 16)
    with pytest.raises(ValueError, match="token id 11"):
        model.mtp_step(params, MTP[1], h, np.array([[0, 11, 0]]), cache)
    with pytest.raises(ValueError, match="must have one shape"):
        model.mtp_step(params, MTP[1], h, np.array([[0, 1]]), cache)
    with pytest.raises(ValueError, match="17 positions asked for"):
        model.mtp_step(params, MTP[1], np.ones((1, 17, 6)), ids(1, 17), cache)
    for refused in (
        lambda: model.new_mtp_cache(SMALL, 4),
        lambda: model.mtp_step(fresh(), SMALL, h, ids(1, 3), cache),
    ):
        with pytest.raises(ValueError, match="no MTP module to draft with"):
            refused()
