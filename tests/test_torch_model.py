"""The whole model in PyTorch: losses, gradients, caches, names, files, the compiler.

Judged by the checkers of the NumPy model, by that model, and by transformers.
"""

import copy
import dataclasses
import io
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, parameters
from minidsv3.config import MINI, PLAIN, TINY, V3, Config, TrainConfig
from minidsv3.mla import torch_port as mla
from minidsv3.model import numpy_ref
from minidsv3.model import torch_port as model_port
from minidsv3.model.torch_port import Block, DeepSeekV3, arrays, tensors
from minidsv3.moe import torch_port as moe
from minidsv3.mtp import torch_port as mtp
from minidsv3.primitives import attention_torch_port, torch_port
from minidsv3.primitives.cache import RaggedCache
from tests import test_mla, test_model
from tests.oracles import AUTOGRAD, relative_error
from tests.shapes import checked_shapes
from tests.test_checkpoint_lazy import BIG
from tests.test_model import ids
from tests.test_moe_model import MODELS as SPARSE_MODELS
from tests.test_moe_model import check_model, fresh, is_bias
from tests.test_mtp import MTP
from tests.test_primitives import compositions, normal
from tests.test_training import same
from tests.test_whole_model import (
    MODELS,
    RECIPE,
    SPLITS,
    a_few_models,
    agree,
    as_float32,
    clear_cut,
    each_model,
    from_file,
)
from tests.torch_ports import loss_and_grads, port, rotation_of

PORTS = (torch_port, attention_torch_port, mla, moe, mtp, model_port)
SAME = 1e-12  # float64: the same sums in another order
FLOAT32 = 2e-5  # relative: a few hundred roundings of 6e-8 in a row
DENSE = {
    "MHA": dataclasses.replace(test_model.SMALL, num_key_value_heads=4),
    "GQA": test_model.SMALL,
    "MQA": dataclasses.replace(test_model.SMALL, num_key_value_heads=1),
    "YaRN": dataclasses.replace(
        test_model.SMALL, rope_scaling=test_model.STRETCH, rope_theta=100.0
    ),
    "MLA": test_mla.BASE,
    **{f"{D} modules": MTP[D] for D in (1, 2, 3)},
}
CROSSING = MODELS["odd sizes"]  # of TINY's kind; its two forms cost the same early


# --- losses and gradients -------------------------------------------------------------


def check_as_numpy(config: Config, B: int = 2, T: int = 6) -> None:
    """Every loss, gradient and load, in float64."""
    params, tokens = fresh(config), ids(B, T + 1, config=config)
    ours = loss_and_grads(params, config, tokens, RECIPE)
    expected = numpy_ref.loss_and_grads(params, config, tokens, RECIPE)
    assert list(ours[0]) == list(expected[0])
    assert ours[0] == pytest.approx(expected[0], rel=SAME)
    assert ours[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert relative_error(ours[1][name], grad) <= AUTOGRAD, name
    assert ours[2].keys() == expected[2].keys()
    assert same(ours[2].get("load", {}), expected[2].get("load", {}))


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_dense_models_are_numpys(config: Config) -> None:
    check_as_numpy(config)


@pytest.mark.parametrize("config", [TINY, *SPARSE_MODELS[:1]], ids=["TINY", "SMALL"])
@pytest.mark.parametrize("D", [0, 1, 2, 3])
def test_models_with_experts_are_numpys(config: Config | tuple, D: int) -> None:
    config = config[0] if isinstance(config, tuple) else config
    check_as_numpy(dataclasses.replace(config, num_nextn_predict_layers=D))


def check_by_autograd(config: Config = TINY, B: int = 2, T: int = 5) -> None:
    around = test_mla.torch_block if config.uses_mla else test_model.torch_block
    check_model(config, B, T, around, loss_and_grads)


@pytest.mark.parametrize(("config", "B", "T"), SPARSE_MODELS)
def test_losses_and_every_gradient_by_autograd(config: Config, B: int, T: int) -> None:
    check_by_autograd(config, B, T)


@each_model
def test_whole_models_by_autograd(config: Config) -> None:
    check_by_autograd(config)


def check_two_modules() -> None:
    check_by_autograd(dataclasses.replace(TINY, num_nextn_predict_layers=2), 2, 6)


def test_two_modules_by_autograd() -> None:
    check_two_modules()


def test_float32_is_float64_rounded() -> None:
    """Gradients too, where no router has a close call."""
    params = as_float32(fresh(TINY))
    tokens = clear_cut(params, TINY)
    losses, grads, _ = loss_and_grads(params, TINY, tokens, RECIPE)
    exact = {name: array.astype(np.float64) for name, array in params.items()}
    expected, exact_grads, _ = loss_and_grads(exact, TINY, tokens, RECIPE)
    assert losses == pytest.approx(expected, rel=FLOAT32)
    for name, grad in grads.items():
        assert grad.dtype == np.float32
        assert relative_error(grad, exact_grads[name]) <= FLOAT32, name


@torch.no_grad()
def check_forward(config: Config = TINY) -> None:
    params, tokens = fresh(config), ids(2, 9, config=config)
    logits = port(params, config)(torch.tensor(tokens))
    expected, _ = numpy_ref.forward(params, config, tokens)
    assert relative_error(logits.numpy(), expected) <= SAME


@each_model
def test_logits_are_numpys(config: Config) -> None:
    check_forward(config)


def test_the_ports_say_true_shapes() -> None:
    with checked_shapes(*PORTS) as report:
        for config in (TINY, test_mla.BASE, test_model.SMALL):
            model = port(fresh(config), config)
            tokens = torch.tensor(ids(3, 9, config=config))
            model.loss(tokens).losses["total"].backward()
            caches = model.new_caches(9)
            for piece in tokens.split([4, 3, 2], dim=1):
                with torch.no_grad():
                    model(piece, caches)
            ragged = [RaggedCache(9) for _ in caches]
            with torch.no_grad():
                model(tokens[:, :4], ragged)
                for cache in ragged:
                    cache.settle(np.array([2, 4, 1]))
                model(tokens[:, :2], ragged)
        moe.top_anywhere(torch.rand(3, 5), 2)
    assert not report.unexercised and len(report.exercised) > 50


# --- what depends on what -------------------------------------------------------------


@torch.no_grad()
def outputs(model: DeepSeekV3, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits, and the state of each depth, of a text whose tokens are all read."""
    seen = []
    L = model.config.num_hidden_layers
    hooks = [module.register_forward_hook(lambda *a: seen.append(a[-1][0]))
             for module in model.model.layers[L:]]  # fmt: skip
    model.loss(torch.tensor(np.append(tokens, tokens[:, :1], axis=1)))
    for hook in hooks:
        hook.remove()
    return [model(torch.tensor(tokens)).numpy(), *(state.numpy() for state in seen)]


def check_causality(config: Config = TINY) -> None:
    """Token j reaches logits from position j on, depth k from j - k on."""
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    T, tokens, model = 9, ids(2, 9, config=config), port(fresh(config), config)
    before = outputs(model, tokens)
    assert [out.shape[1] for out in before] == [T, T - 1, T - 2]
    for j in range(T):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        for k, (one, other) in enumerate(
            zip(before, outputs(model, changed), strict=True)
        ):
            moved = np.abs(other - one).max(axis=-1)
            reached = np.arange(T - k) + k >= j
            assert (moved[0, ~reached] <= SAME).all(), (j, k)
            assert (moved[0, reached] > 1e-9).all(), (j, k)
            assert (moved[1] <= SAME).all(), "another sequence has moved"


@a_few_models
def test_no_output_sees_the_future(config: Config) -> None:
    check_causality(config)


def test_plain_attention_does_not_see_the_future() -> None:
    check_causality(test_model.SMALL)


# --- caches ---------------------------------------------------------------------------


@torch.no_grad()
def check_cached(config: Config = TINY, splits=SPLITS) -> None:
    """Whatever the pieces: naive for the first, then what multiplies less."""
    T = sum(splits[0])
    model, tokens = port(fresh(config), config), torch.tensor(ids(2, T, config=config))
    full = model(tokens)
    for chunks in splits:
        caches = model.new_caches(T)
        parts = [model(piece, caches) for piece in tokens.split(chunks, dim=1)]
        error = (torch.cat(parts, dim=1) - full).abs().max()
        assert error <= SAME * full.abs().max(), chunks
    for cache in caches:
        cache.crop(T - 2)
    after = model(tokens[:, T - 2 :], caches)
    assert (after - full[:, T - 2 :]).abs().max() <= SAME * full.abs().max()


@each_model
def test_cached_logits_are_uncached_logits(config: Config) -> None:
    check_cached(config)


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_every_split_of_a_short_text(config: Config) -> None:
    check_cached(config, compositions(5))


@torch.no_grad()
def check_the_choice_of_form() -> None:
    """Naive for a prompt; for what continues it absorbed, unless it is long."""
    pieces = [3, 1, 14, 13, 1]  # the forms cross at 13.2
    tokens = torch.tensor(ids(1, sum(pieces), config=CROSSING))
    model = port(fresh(CROSSING), CROSSING)
    forms, attention = [], model.model.layers[1].self_attn

    def noting(name: str) -> Callable:
        form = getattr(attention, name)
        return lambda *given: (forms.append(name), form(*given))[1]

    for name in ("attend_naive", "attend_absorbed"):
        setattr(attention, name, noting(name))
    model(tokens)
    caches = model.new_caches(sum(pieces))
    for piece in tokens.split(pieces, dim=1):
        model(piece, caches)
    naive, absorbed = ("attend_naive",), ("attend_absorbed",)
    assert forms == [*2 * naive, *absorbed, *naive, *2 * absorbed]


def test_the_block_chooses_the_form() -> None:
    check_the_choice_of_form()


def test_chunks_on_both_sides_of_the_crossover() -> None:
    """13.2 tokens, and never."""
    splits = ([14, 13, 14], [20, 21], [13, 1, 27], [1, 40], [39, 2])
    check_cached(CROSSING, splits)
    check_cached(dataclasses.replace(CROSSING, v_head_dim=17), splits)


@torch.no_grad()
def check_silent_drafts(config: Config = TINY) -> None:
    """Without answer: the same cache, bit for bit, and the same draft afterwards."""
    model, tokens = port(fresh(config), config), torch.tensor(ids(2, 9, config=config))
    h, _ = model.hidden_states(tokens[:, :-1])
    loud, quiet = RaggedCache(9), RaggedCache(9)
    for start, end, lengths in ((0, 3, None), (3, 4, None), (4, 6, (2, 4))):
        if lengths:
            for cache in (loud, quiet):
                cache.settle(np.array(lengths))
        pairs = h[:, start:end], tokens[:, start + 1 : end + 1]
        assert model.draft_states(*pairs, loud).shape == pairs[0].shape
        assert model.draft_states(*pairs, quiet, answer=False) is None
        assert len(quiet.arrays) == len(loud.arrays)
        for ours, expected in zip(quiet.arrays, loud.arrays, strict=True):
            assert torch.equal(ours, expected)
    pair = h[:, 6:7], tokens[:, 7:8]
    answers = [model.draft_states(*pair, cache) for cache in (loud, quiet)]
    assert torch.equal(*answers)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.draft_states(pair[0], pair[1] - 999, quiet, answer=False)
    with pytest.raises(ValueError, match="must have one shape"):
        model.draft_states(h[:, 5:7], pair[1], quiet, answer=False)


@pytest.mark.parametrize("config", [TINY, CROSSING, DENSE["1 modules"]])
def test_pairs_that_are_only_remembered(config: Config) -> None:
    check_silent_drafts(config)


@torch.no_grad()
def check_bad_caches() -> None:
    model, tokens = port(fresh(TINY), TINY), torch.tensor(ids(2, 6, config=TINY))
    caches = model.new_caches(5)
    model(tokens[:, :4], caches)
    for given, message in (
        (tokens[:, 4:], "4 positions are kept and 2 more arrive"),
        (tokens[:1, 4:5], "a cache is for one model and one batch"),
    ):
        with pytest.raises(ValueError, match=message):
            model(given, caches)
    half = copy.deepcopy(model).float()
    with pytest.raises(ValueError, match="a cache is for one model and one batch"):
        half(tokens[:, 4:5], caches)
    assert [cache.length for cache in caches] == [4, 4]
    expected = model(tokens[:, :5])[:, 4:]
    assert (model(tokens[:, 4:5], caches) - expected).abs().max() <= 1e-11
    with pytest.raises(ValueError, match="1 caches for 2 layers"):
        model(tokens[:, :1], caches[:1])
    with pytest.raises(ValueError, match="0 caches for 2 layers"):
        model(tokens[:, :1], [])
    caches[1].crop(3)
    with pytest.raises(ValueError, match="hold 5, 3 positions"):
        model(tokens[:, :1], caches)


def test_full_and_strange_caches_are_refused() -> None:
    check_bad_caches()


# --- the border -----------------------------------------------------------------------

BAD_IDS = [
    ([[0, 0, 0, -100]], "token id -100 is outside"),  # what cross_entropy passes over
    ([[0, 257, 0, 0]], "token id 257 is outside the vocabulary 0…256"),
    ([[0, 0, 0, 257]], "token id 257 is outside the vocabulary"),
    ([[0, -1, 0, 0]], "token id -1 is outside"),
    ([0, 1, 2, 3], r"shape \(4,\)"),
    ([[0.5] * 4], "must be integers"),
    ([[0] * 66], "65 positions asked for, but max_position_embeddings is 64"),
    ([[0]], "two columns"),
    ([[0, 0]], "1 positions to read, but 1 modules"),
]


def test_short_integers_are_ids_too() -> None:
    model, tokens = port(fresh(TINY), TINY), torch.tensor(ids(2, 6, config=TINY))
    assert model.loss(tokens.int()).losses == model.loss(tokens).losses


def check_bad_ids() -> None:
    model = port(fresh(TINY), TINY)
    for tokens, message in BAD_IDS:
        with pytest.raises(ValueError, match=message):
            model.loss(torch.tensor(tokens))


def test_bad_ids_are_refused() -> None:
    check_bad_ids()


def check_default_device() -> None:
    """It is a wish for new tensors, not for those that a model computes with."""
    model, tokens = port(fresh(TINY), TINY), torch.tensor(ids(1, 6, config=TINY))
    expected = model(tokens)
    with torch.device("meta"):
        try:
            found = model(tokens)
        except (RuntimeError, NotImplementedError) as error:
            raise AssertionError("computed elsewhere") from error
    assert torch.equal(found, expected)


def test_a_default_device_is_no_hindrance() -> None:
    check_default_device()


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, TINY, MINI, V3],
                         ids=["PLAIN", "TINY", "MINI", "V3"])  # fmt: skip
def test_the_state_dict_has_the_names_of_the_file(config: Config) -> None:
    """No more: no embedding twice, no buffer of angles. V3 takes no memory."""
    with torch.device("meta"):
        state = DeepSeekV3(config).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert found == parameters.shapes(config)
    assert all(tensor.is_meta for tensor in state.values())
    if config is V3:  # facts D.1: without copies 671.0 and 11.6 billion
        numbers = sum(map(math.prod, found.values()))
        assert numbers == 671_026_419_200 + 11_610_068_224
        assert numbers + 2 * V3.vocab_size * V3.hidden_size == 684_489_845_504


@pytest.mark.parametrize("config", [PLAIN, TINY], ids=["PLAIN", "TINY"])
def test_a_fresh_model_is_the_numpy_models(config: Config) -> None:
    for given in ((), (3,), (3, 0.5)):
        expected = parameters.initialise(config, *(*given, *(0, 0.02)[len(given) :]))
        model = DeepSeekV3(config, *given)
        assert same(arrays(model), expected)
        assert all(w.requires_grad for w in model.parameters())
        assert not any(b.requires_grad for b in model.buffers())


def test_tensors_and_arrays_are_one_memory() -> None:
    params = as_float32(fresh(TINY))
    params["lm_head.weight"] = params["lm_head.weight"].astype(ml_dtypes.bfloat16)
    table = tensors(params)
    assert table["lm_head.weight"].dtype == torch.bfloat16
    for name, tensor in table.items():
        assert tensor.data_ptr() == params[name].ctypes.data, name
    model = DeepSeekV3(TINY)
    model.load_state_dict(table, assign=True)
    for name, array in arrays(model).items():
        assert array.dtype == params[name].dtype
        assert np.shares_memory(array, params[name]), name


def check_copies() -> None:
    """Each with its own weights; in a module of depth k, block and parts stay one."""
    params, tokens = fresh(TINY), torch.tensor(ids(2, 8, config=TINY))
    model = port(params, TINY)
    expected = model.loss(tokens).losses
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.device("meta"):
        read = DeepSeekV3(TINY)
    read.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    for other in (copy.deepcopy(model), read):
        assert other.loss(tokens).losses == expected
        with torch.no_grad():
            for weight in other.parameters():
                weight *= 1.1
        changed = port(arrays(other), TINY).loss(tokens).losses
        assert other.loss(tokens).losses == changed != expected
        assert model.loss(tokens).losses == expected


def test_copies_and_pickles_are_models() -> None:
    check_copies()


def check_conversions() -> None:
    """Weights follow, the routers' biases are float32 at least, MTP's block too."""
    params, tokens = as_float32(fresh(TINY)), torch.tensor(ids(2, 8, config=TINY))
    exact = port(params, TINY).double()
    assert {t.dtype for t in exact.state_dict().values()} == {torch.float64}
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    losses, _, _ = numpy_ref.loss_and_grads(wide, TINY, tokens.numpy(), TrainConfig())
    found = {k: v.item() for k, v in exact.loss(tokens).losses.items()}
    assert found == pytest.approx(losses, rel=SAME)
    half = port(params, TINY).bfloat16()
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if is_bias(name) else torch.bfloat16)
    assert half.loss(tokens).losses["total"].isfinite()
    nowhere = port(params, TINY).to("meta")
    assert all(t.is_meta for t in nowhere.state_dict().values())
    nowhere.to_empty(device="cpu").load_state_dict(tensors(params))
    assert same(arrays(nowhere), params)


def test_conversions() -> None:
    check_conversions()


# --- files ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", checkpoints.SAVED_AS)
def test_files_are_those_of_numpy(tmp_path: Path, dtype: str) -> None:
    """Written alike to the byte, and read alike in every precision."""
    params = as_float32(fresh(TINY))
    port(params, TINY).save_pretrained(tmp_path / "torch", dtype)
    checkpoints.save(tmp_path / "numpy", TINY, params, dtype)
    for file in (tmp_path / "numpy").iterdir():
        assert file.read_bytes() == (tmp_path / "torch" / file.name).read_bytes()
    for precision in (torch.float32, torch.float64, torch.bfloat16, None):
        model = DeepSeekV3.from_pretrained(tmp_path / "torch", precision)
        types = {None: None, torch.float32: np.float32, torch.float64: np.float64}
        wanted = types.get(precision, ml_dtypes.bfloat16)
        _, expected = checkpoints.load(tmp_path / "numpy", wanted)
        assert model.config == TINY and same(arrays(model), expected)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (precision or tensor.dtype) or is_bias(name)
            assert tensor.dtype in (torch.float32, torch.float64) or not is_bias(name)
        assert all(w.requires_grad for w in model.parameters())


def test_a_model_that_was_read_can_be_trained_and_saved_again(tmp_path) -> None:
    """The tensors are its own: the file is not written through them."""
    params = as_float32(fresh(TINY))
    checkpoints.save(tmp_path, TINY, params)
    before = (tmp_path / checkpoints.WEIGHTS).read_bytes()
    model = DeepSeekV3.from_pretrained(tmp_path)
    model.loss(torch.tensor(ids(2, 8, config=TINY))).losses["total"].backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert (tmp_path / checkpoints.WEIGHTS).read_bytes() == before
    model.save_pretrained(tmp_path)
    assert same(checkpoints.load(tmp_path)[1], arrays(model))
    assert not same(arrays(model), params)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_without_a_wish_the_model_has_the_precision_of_the_file(
    tmp_path, dtype: str | None
) -> None:
    port(as_float32(fresh(TINY)), TINY).save_pretrained(tmp_path, dtype)
    model = DeepSeekV3.from_pretrained(tmp_path, None)
    expected = torch.bfloat16 if dtype else torch.float32
    assert {w.dtype for w in model.parameters()} == {expected}
    with pytest.raises(ValueError, match="dtype is torch.float16, must be one of"):
        DeepSeekV3.from_pretrained(tmp_path, torch.float16)


@a_few_models
@torch.no_grad()
def test_transformers_opens_what_is_saved(tmp_path, config: Config) -> None:
    params = as_float32(fresh(config))
    model = port(params, config)
    model.save_pretrained(tmp_path)
    tokens = torch.tensor(clear_cut(params, config))
    agree(model(tokens).numpy(), from_file(tmp_path)(tokens).logits)


def check_memory(folder: Path) -> None:
    """One tensor at a time: the model, the largest of its tensors, and little else.

    torch takes NumPy's memory as it is, so that NumPy's books show all of it.
    """
    largest = max(map(math.prod, parameters.shapes(BIG).values())) * 4
    total = parameters.count(BIG) * 4
    assert total > 200e6
    for dtype in (torch.float32, torch.bfloat16):
        tracemalloc.start()
        model = DeepSeekV3.from_pretrained(folder, dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        share = dtype.itemsize / 4
        assert share * total <= peak <= share * (total + largest) + 4e6, (peak, total)
        del model


def test_reading_takes_the_models_own_size(tmp_path) -> None:
    checkpoints.save(tmp_path, BIG, parameters.initialise(BIG, 0, 0.1))
    check_memory(tmp_path)


# --- autocast and the compiler --------------------------------------------------------


def check_half_products(config: Config = TINY) -> None:
    """bfloat16 products: the loss a percent off, gradients whole and in float32.

    8 bits a factor are 0.4 %, and errors of a sum partly cancel.
    """
    params, tokens = as_float32(fresh(config)), torch.tensor(ids(4, 16, config=config))
    model, seen = port(params, config), []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda *a: seen.append(a[-1]))
    exact = {k: v.item() for k, v in model.loss(tokens).losses.items()}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(tokens).losses
        assert model(tokens).dtype == torch.bfloat16
    for routing in seen:
        assert routing.affinities.dtype == routing.gates.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(exact, rel=1e-2) and found["main"] != exact["main"]
    losses["total"].backward()
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [TINY, test_model.SMALL], ids=["TINY", "plain"])
def test_products_in_bfloat16(config: Config) -> None:
    check_half_products(config)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def check_compiled(config: Config, backend: str) -> None:
    """Without a break in its graph, and with the same numbers and gradients."""
    block, D = Block(config, sparse=False), config.hidden_size
    for weight in block.parameters():
        torch.nn.init.normal_(weight, float(weight.ndim == 1), 0.3)
    turn, results = rotation_of(config, np.arange(6)).float(), []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        block.zero_grad()
        x = torch.tensor(normal(2, 6, D), dtype=torch.float32, requires_grad=True)
        y, routing = function(x, turn)
        y.square().sum().backward()
        assert routing is None
        grads = [x.grad, *(w.grad for w in block.parameters())]
        results.append([y.detach(), *(grad.clone() for grad in grads)])
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours.numpy(), expected.numpy()) <= FLOAT32


BLOCKS = {"MHA": DENSE["MHA"], "GQA": DENSE["GQA"], "MLA": test_mla.BASE}


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_the_compiler_takes_a_dense_block_whole(config: Config) -> None:
    check_compiled(config, "aot_eager")


@needs_compiler
@pytest.mark.slow
def test_a_compiled_dense_block_is_the_block() -> None:
    check_compiled(test_mla.BASE, "inductor")


def test_a_compiled_model_is_the_model() -> None:
    """Experts, whose shapes follow from the data, run as they are."""
    params = as_float32(fresh(TINY))
    tokens = torch.tensor(clear_cut(params, TINY))
    model, other = port(params, TINY), port(params, TINY)
    for n in range(TINY.num_hidden_layers):
        layer = other.model.layers[n]
        other.model.layers[n] = torch.compile(layer, backend="aot_eager")
    expected, losses = (one.loss(tokens).losses for one in (model, other))
    for name, loss in expected.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=FLOAT32)
    expected["total"].backward()
    losses["total"].backward()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert relative_error(ours.grad.numpy(), theirs.grad.numpy()) <= FLOAT32
