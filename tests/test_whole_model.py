"""The whole model, MLA, experts and MTP together: is it DeepSeek-V3, to the last logit?

Transformers' DeepSeek-V3 is the judge, and weights reach it, and come back, through
files alone. Gradients are held against autograd of a model in torch that shares no line
with the library, and against transformers' own. `test_whole_run` trains such a model.
"""

import dataclasses
import json
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, parameters
from minidsv3.config import MINI, TINY, V3, Config, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.training import numpy_ref as training
from tests import test_mla
from tests.oracles import central_differences, relative_error
from tests.test_mla import STRETCH, agree, as_float32, peer_config, read_in_pieces
from tests.test_model import ids
from tests.test_moe_model import check_model, fresh, is_bias
from tests.test_mtp import depth_states
from tests.test_speculation import CONFIG as SHORT_WORDS
from tests.test_speculation import a_language, check_greedy
from tests.test_training import same

YARN = {"rope_scaling": STRETCH, "rope_theta": 100.0, "qk_rope_head_dim": 8}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
CHANGES = {  # of TINY
    "TINY": {},
    "no latent of the queries": {"q_lora_rank": None},
    "YaRN": YARN,
    "YaRN, no latent of the queries": {**YARN, "q_lora_rank": None},
    "one group": ONE_GROUP,
    "two shared experts": {"n_shared_experts": 2},
    "every layer dense": {"first_k_dense_replace": 2},
    "no layer dense": {"first_k_dense_replace": 0},
    "an eps that is felt": {"rms_norm_eps": 0.05},
    "odd sizes": {
        **{"vocab_size": 131, "hidden_size": 33, "intermediate_size": 37},
        **{"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3},
        **{"v_head_dim": 7, "qk_rope_head_dim": 10, "qk_nope_head_dim": 5},
        **{"kv_lora_rank": 11, "q_lora_rank": 13, "n_routed_experts": 15},
        **{"n_shared_experts": 3, "num_experts_per_tok": 5, "n_group": 3},
        **{"moe_intermediate_size": 11, "routed_scaling_factor": 1.7},
    },
    "V3's routing": {
        **{"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8},
        **{"topk_group": 4, "moe_intermediate_size": 4},
    },
}
MODELS = {name: dataclasses.replace(TINY, **change) for name, change in CHANGES.items()}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
FEW = ("TINY", "YaRN, no latent of the queries", "odd sizes")
a_few_models = pytest.mark.parametrize("config", [MODELS[n] for n in FEW], ids=FEW)
RECIPE = TrainConfig(mtp_weight=0.7, balance_weight=3.0)
TRANSFORMERS = 2e-5  # relative, float32: two orders of the same sums


def trunk(config: Config) -> Config:
    """The model without its module, which transformers keeps in another class."""
    return dataclasses.replace(config, num_nextn_predict_layers=0)


# --- close calls ----------------------------------------------------------------------


def gap(scores: np.ndarray, k: int) -> float:
    """How far the k-th best of a row is ahead of the next, at the closest."""
    ranked = np.sort(scores, axis=-1)[:, ::-1]
    return (ranked[:, k - 1] - ranked[:, k]).min() if k < scores.shape[1] else math.inf


def closest_call(params: dict, config: Config, tokens: np.ndarray) -> float:
    """The least gap in any router of the trunk: among groups, and among experts."""
    exact = {name: array.astype(np.float64) for name, array in params.items()}
    _, saved = model.forward(exact, config, tokens)
    biases = [exact[name] for name in exact if is_bias(name)]
    gaps = [math.inf]
    for routing, bias in zip(model.routings(saved), biases, strict=False):
        choice = routing.affinities + bias
        groups = choice.reshape(len(choice), config.n_group, -1)
        best = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        gaps.append(gap(best, config.topk_group))
        last_open = np.sort(best, axis=-1)[:, -config.topk_group, None]
        closed = np.where(best < last_open, -np.inf, 0.0)
        gaps.append(gap((groups + closed[..., None]).reshape(choice.shape),
                        config.num_experts_per_tok))  # fmt: skip
    return min(gaps)


def clear_cut(params: dict, config: Config, T: int = 12) -> np.ndarray:
    """Tokens that no router finds it hard to place: rounding must not decide."""
    texts = (ids(2, T, seed, config) for seed in range(100))
    return next(t for t in texts if closest_call(params, config, t) > 1e-5)


# --- transformers, through files ------------------------------------------------------


def from_file(folder: Path, **options):
    """Transformers' model of a folder; every weight but the modules' must be used."""
    from transformers import DeepseekV3ForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    peer, report = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        **(eager | options),
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    module = f"model.layers.{peer.config.num_hidden_layers}."
    assert all(name.startswith(module) for name in report["unexpected_keys"])
    return peer.eval()


def from_dice(config: Config):
    """Transformers' model with its own parameters, all of them far from trivial."""
    from transformers import DeepseekV3ForCausalLM

    words = peer_config(config)
    words._experts_implementation = "eager"
    peer = DeepseekV3ForCausalLM(words)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for array in peer.parameters():
            is_gain = array.ndim == 1
            array.normal_(float(is_gain), 0.3, generator=dice)
        for name, array in peer.named_buffers():
            if is_bias(name):
                array.normal_(0, 0.2, generator=dice)
    return peer.eval()


@torch.no_grad()
def check_same_logits(params: dict, config: Config, peer, dtype=torch.float32) -> None:
    tokens = clear_cut(params, config)
    theirs = peer(torch.tensor(tokens)).logits
    assert theirs.dtype == dtype
    agree(model.forward(params, config, tokens)[0], theirs)


def check_ours_are_theirs(folder: Path, config: Config) -> None:
    params = as_float32(fresh(config))
    checkpoints.save(folder, config, params)
    check_same_logits(params, config, from_file(folder))


@each_model
def test_a_file_of_ours_has_the_same_logits_there(tmp_path, config: Config) -> None:
    check_ours_are_theirs(tmp_path, config)


def check_theirs_are_ours(folder: Path, config: Config, **options) -> None:
    peer = from_dice(trunk(config))
    peer.save_pretrained(folder, **options)
    read, params = checkpoints.load(folder)
    assert read == trunk(config)
    check_same_logits(params, read, peer)


@each_model
def test_a_file_of_theirs_has_the_same_logits_here(tmp_path, config: Config) -> None:
    check_theirs_are_ours(tmp_path, config)


def test_many_files_of_theirs_are_one_model_here(tmp_path) -> None:
    check_theirs_are_ours(tmp_path, MODELS["V3's routing"], max_shard_size="50KB")
    index = json.loads((tmp_path / checkpoints.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 5
    assert not (tmp_path / checkpoints.WEIGHTS).exists()


def biases_of(params: dict) -> dict:
    return {name: array for name, array in params.items() if is_bias(name)}


def check_half_files(folder: Path, config: Config = TINY) -> None:
    """Rounded once, in whichever direction; the biases not at all."""
    params = as_float32(fresh(config))
    checkpoints.save(folder / "ours", config, params, dtype="bfloat16")
    _, rounded = checkpoints.load(folder / "ours")
    assert same(biases_of(rounded), biases_of(params))
    assert not np.array_equal(rounded["lm_head.weight"], params["lm_head.weight"])
    peer = from_file(folder / "ours", dtype=torch.float32)
    check_same_logits(rounded, config, peer)

    from_file(folder / "ours", dtype=torch.bfloat16).save_pretrained(folder / "theirs")
    with pytest.warns(checkpoints.CheckpointNotice, match="no MTP weights"):
        read, again = checkpoints.load(folder / "theirs")
    assert read == trunk(config)
    assert same(again, {name: rounded[name] for name in again})


def test_bfloat16_files_go_both_ways(tmp_path) -> None:
    check_half_files(tmp_path)


def check_drafts_are_theirs(folder: Path, config: Config, patch) -> None:
    """Logits of the module, of trunk, module and head as transformers has them."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    L = config.num_hidden_layers
    # its list of modules is written for 61 layers
    names = [rf"model\.layers\.{L}\..*"]
    patch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", names)
    params = as_float32(fresh(config))
    checkpoints.save(folder, config, params)
    peer = from_file(folder)
    theirs = MtpModel.from_pretrained(peer).eval()
    tokens = clear_cut(params, config)
    _, saved = model.forward(params, config, tokens)
    h, new_cache = model.hidden_states(saved), model.new_mtp_cache(config, 11)
    ours = model.mtp_step(params, config, h[:, :-1], tokens[:, 1:], new_cache)
    with torch.no_grad():
        t = torch.tensor(tokens)
        h = peer(t, output_hidden_states=True).hidden_states[-1]
        positions, kept = torch.arange(1, 12)[None], MtpCache(config=theirs.config)
        state = theirs.forward_layer(0, h[:, :-1], positions, kept, input_ids=t[:, 1:])
        agree(ours, theirs.shared_head(state))


@pytest.mark.parametrize("name", [*FEW, "V3's routing", "every layer dense"])
def test_the_modules_drafts_are_theirs(tmp_path, monkeypatch, name: str) -> None:
    check_drafts_are_theirs(tmp_path, MODELS[name], monkeypatch)


# --- gradients ------------------------------------------------------------------------

check_gradients = partial(check_model, around=test_mla.torch_block)


@each_model
def test_losses_and_every_gradient_agree_with_autograd(config: Config) -> None:
    """In float64: main loss, the module's, and the balance loss of both."""
    check_gradients(config, 2, 5)


def test_two_modules_agree_with_autograd() -> None:
    check_gradients(dataclasses.replace(TINY, num_nextn_predict_layers=2), 2, 6)


def their_gradients(peer) -> dict[str, np.ndarray]:
    """By our names: they join the two projections into an expert's hidden layer."""
    grads = {}
    for name, array in peer.named_parameters():
        grad = array.grad.numpy()
        if name.endswith("gate_up_proj"):
            stem, parts = name.removesuffix("gate_up_proj"), np.split(grad, 2, axis=1)
            grads |= {f"{stem}{k}_proj.weight": part for k, part in
                      zip(("gate", "up"), parts, strict=True)}  # fmt: skip
        else:
            grads[name if name.endswith("weight") else f"{name}.weight"] = grad
    return grads


@a_few_models
def test_every_gradient_of_the_trunk_is_transformers(tmp_path, config: Config) -> None:
    """In float32, which it computes routers and norms in whatever it is given."""
    config = trunk(config)
    params = as_float32(fresh(config))
    checkpoints.save(tmp_path, config, params)
    peer, tokens = from_file(tmp_path), clear_cut(params, config)
    silent = dataclasses.replace(RECIPE, balance_weight=0.0)
    losses, grads, _ = model.loss_and_grads(params, config, tokens, silent)
    t = torch.tensor(tokens)
    logits = peer(t[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten())
    loss.backward()
    assert losses["total"] == pytest.approx(loss.item(), rel=1e-6)
    theirs = their_gradients(peer)
    assert sorted(grads) == sorted(theirs)
    for name, grad in grads.items():
        assert relative_error(grad, theirs[name]) <= TRANSFORMERS, name


@a_few_models
def test_gradients_agree_with_differences(config: Config) -> None:
    """Of three entries of every parameter, chosen by lot."""
    params, tokens = fresh(config), ids(2, 7, config=config)
    _, grads, _ = model.loss_and_grads(params, config, tokens, RECIPE)
    rng = np.random.default_rng(0)
    for name, grad in grads.items():
        places = rng.choice(grad.size, 3, replace=False)
        spots, array = np.zeros(3), params[name].copy()

        def total(name=name, array=array, places=places, spots=spots) -> float:
            moved = array.copy()
            moved.flat[places] += spots
            now = params | {name: moved}
            return model.loss_and_grads(now, config, tokens, RECIPE)[0]["total"]

        numeric = central_differences(total, spots, 1e-6)
        error = np.linalg.norm(grad.flat[places] - numeric)
        # the quotient's own rounding: 1e-15 / 1e-6 an entry
        assert error <= 1e-6 * np.linalg.norm(numeric) + 5e-9, name


# --- what depends on what -------------------------------------------------------------


def check_causality(config: Config) -> None:
    """Token j reaches main logits from position j on, depth k from j - k on."""
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    T, params, tokens = 9, fresh(config), ids(2, 9, config=config)

    def outputs(tokens: np.ndarray) -> list[np.ndarray]:
        logits, _ = model.forward(params, config, tokens)
        return [logits, *depth_states(params, config, tokens)]

    before = outputs(tokens)
    assert [out.shape[1] for out in before] == [T, T - 1, T - 2]
    for j in range(T):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        for k, (one, other) in enumerate(zip(before, outputs(changed), strict=True)):
            moved = np.abs(other - one).max(axis=-1)
            reached = np.arange(T - k) + k >= j
            assert (moved[0, ~reached] <= 1e-12).all(), (j, k)
            assert (moved[0, reached] > 1e-9).all(), (j, k)
            assert (moved[1] <= 1e-12).all(), "another sequence has moved"


@a_few_models
def test_no_output_sees_the_future(config: Config) -> None:
    check_causality(config)


SPLITS = ([8], [1] * 8, [5, 3], [1, 7], [3, 1, 2, 2])


def check_cached(config: Config) -> None:
    """Whatever the pieces, trunk and module; and after a draft that was taken back."""
    params, tokens = fresh(config), ids(2, 8, config=config)
    full, saved = model.forward(params, config, tokens)
    h, pairs = model.hidden_states(saved)[:, :-1], tokens[:, 1:]
    whole = model.mtp_step(params, config, h, pairs, model.new_mtp_cache(config, 7))
    for chunks in SPLITS:
        pieces = read_in_pieces(params, config, tokens, chunks)
        np.testing.assert_allclose(pieces, full, rtol=0, atol=1e-12, err_msg=chunks)
        kept, ends = model.new_mtp_cache(config, 7), np.cumsum(chunks)[:-1]
        for h_now, now in zip(np.split(h, ends, 1), np.split(pairs, ends, 1),
                              strict=True):  # fmt: skip
            if now.size:
                start = kept.length
                drafts = model.mtp_step(params, config, h_now, now, kept)
                expected = whole[:, start : kept.length]
                np.testing.assert_allclose(drafts, expected, rtol=0, atol=1e-12)
    caches = model.new_caches(config, 8)
    model.forward(params, config, np.append(tokens[:, :5], 1 + 0 * tokens[:, :2], 1),
                  caches)  # fmt: skip
    for kept in caches:
        kept.crop(5)
    after, _ = model.forward(params, config, tokens[:, 5:], caches)
    np.testing.assert_allclose(after, full[:, 5:], rtol=0, atol=1e-12)


@each_model
def test_cached_logits_are_uncached_logits(config: Config) -> None:
    check_cached(config)


# --- drafting -------------------------------------------------------------------------

SPOKEN = dataclasses.replace(
    TINY, vocab_size=SHORT_WORDS.vocab_size, max_position_embeddings=32
)


@cache
def trained() -> dict[str, np.ndarray]:
    """A few seconds of training: its drafts are often right, and often wrong."""
    recipe = TrainConfig(
        steps=150, batch_size=8, sequence_length=24, learning_rate=1e-2, warmup_steps=9
    )
    state = training.new_state(parameters.initialise(SPOKEN, 0, 0.1, np.float64))
    for _ in training.train(state, SPOKEN, recipe, a_language(20_000)):
        pass
    return state.params


def check_drafting(B: int = 1, how_many: int = 60) -> None:
    params = trained()
    assert all(bias.any() for bias in biases_of(params).values())
    drafts, accepted = check_greedy(params, B, how_many, config=SPOKEN)
    assert drafts > 200 and 0.3 < accepted / drafts < 0.95


@pytest.mark.parametrize(("B", "how_many"), [(1, 60), (3, 20)])
def test_drafts_leave_the_greedy_text(B: int, how_many: int) -> None:
    check_drafting(B, how_many)


# --- sizes ----------------------------------------------------------------------------


def test_mini_is_v3_in_small() -> None:
    """All of V3's routing; everything else is narrower."""
    routing = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
               "n_shared_experts", "routed_scaling_factor", "num_nextn_predict_layers",
               "scoring_func", "topk_method", "norm_topk_prob")  # fmt: skip
    for name in routing:
        assert getattr(MINI, name) == getattr(V3, name), name
    assert MINI.uses_mla and MINI.q_lora_rank and MINI.first_k_dense_replace > 0
    assert any(MINI.is_moe_layer(n) for n in range(MINI.num_hidden_layers))
    assert parameters.count(MINI) <= 15_500_000


def bytes_in_fp8(config: Config) -> int:
    """The released form: matrices in 8 bits, float32 scales of blocks of 128 × 128.

    Embedding, head, norms and routers keep 32 bits. An expert is a tensor of its own,
    and each tensor has an entry in the file's header.
    """
    kept_whole = ("embed_tokens", "lm_head", "norm", ".gate.")
    total = 0
    for name, shape in parameters.shapes(config).items():
        tensors, shape = (shape[0], shape[1:]) if ".experts." in name else (1, shape)
        if any(part in name for part in kept_whole):
            total += tensors * (4 * math.prod(shape) + 150)
            continue
        blocks = math.prod(math.ceil(n / 128) for n in shape)
        total += tensors * (math.prod(shape) + 4 * blocks + 2 * 150)
    return total


def test_mini_fits_16_megabytes_in_fp8() -> None:
    copies = len(checkpoints.COPIES) * 4 * MINI.vocab_size * MINI.hidden_size
    assert bytes_in_fp8(MINI) + copies <= 16_000_000


def test_v3_counts_to_the_last_parameter() -> None:
    """Main model, module, checkpoint with the module's copies (facts D.1)."""
    main = parameters.count(trunk(V3))
    assert main == 671_026_419_200
    copies = 2 * V3.vocab_size * V3.hidden_size
    assert parameters.count(V3) + copies == 684_489_845_504
    idle = V3.n_routed_experts - V3.num_experts_per_tok
    sparse = V3.num_hidden_layers - V3.first_k_dense_replace
    unread = 3 * V3.hidden_size * V3.moe_intermediate_size * idle * sparse
    assert main - unread - V3.vocab_size * V3.hidden_size == 36_625_618_432


def test_a_model_whose_layers_are_all_dense_has_no_balance_loss() -> None:
    """Experts may be asked for and stand in no layer: no loss, no load, no column."""
    config = trunk(MODELS["every layer dense"])
    losses, grads, stats = model.loss_and_grads(
        fresh(config), config, ids(2, 6, config=config), RECIPE
    )
    assert list(losses) == model.loss_names(config) == ["main", "total"]
    assert stats == {} and sorted(grads) == sorted(parameters.shapes(config))
