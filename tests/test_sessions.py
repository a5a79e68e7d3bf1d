"""The decoders' sessions against the uncached NumPy model, text by text.

One script for all of them: prompts of different lengths, then rounds of drafting,
reading one to three tokens, forgetting some, letting a text go. `test_compiled` has
the single loops.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from minidsv3 import checkpoints
from minidsv3.config import PLAIN, TINY, Config
from minidsv3.generation import (
    compiled,
    cpu_kernels,
    decoder_for,
    decoding,
    generate,
    numpy_decoder,
    prefill,
    rules,
)
from minidsv3.generation import torch_port as torch_decoder
from minidsv3.generation.compiled import CompiledDecoder, NumpyReader
from minidsv3.generation.numpy_decoder import NumpyDecoder
from minidsv3.generation.prompts import side_by_side
from minidsv3.generation.torch_port import ModuleDecoder, TorchReader
from minidsv3.model.numpy_ref import forward, hidden_states, mtp_step, new_mtp_cache
from minidsv3.model.torch_port import arrays
from minidsv3.parameters import ParameterError
from minidsv3.primitives import cache as cache_module
from minidsv3.primitives.cache import Cache, RaggedCache
from minidsv3.shipped import MINI_FOLDER
from tests import test_mla
from tests.oracles import relative_error
from tests.planting import plant_loops
from tests.shapes import checked_shapes, unannotated
from tests.test_moe_model import fresh
from tests.test_torch_model import CROSSING, DENSE
from tests.test_whole_model import MODELS, as_float32, closest_call
from tests.torch_ports import port

SAME = 1e-12  # relative, float64: the same sums in another order, absorbed or not
FLOAT32 = 2e-6  # relative: a dozen roundings of 6e-8 on the way
HALF = 0.04  # relative: a dozen roundings of 0.4 %, which partly cancel
HUGE = 1e30  # what stands behind the end of a text must not be felt


# --- decoders -------------------------------------------------------------------------


def of_modules(params: dict, config: Config) -> ModuleDecoder:
    return ModuleDecoder(port(params, config))


def read_by_torch(params: dict, config: Config) -> CompiledDecoder:
    model = port(params, config)
    return CompiledDecoder(arrays(model), config, TorchReader(model))


DECODERS = {
    "compiled": CompiledDecoder,
    "compiled, read by torch": read_by_torch,
    "modules": of_modules,
    "numpy": NumpyDecoder,
}
each_decoder = pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)


# --- the uncached model ---------------------------------------------------------------


def uncached(params: dict, config: Config, text: Sequence[int]) -> np.ndarray:
    """Logits (T, V) of a whole text."""
    return forward(params, config, np.array([text]))[0][0]


def drafted(params: dict, config: Config, text: Sequence[int]) -> np.ndarray:
    """Module 1's logits (V,) after all pairs of a text, whose last token is new."""
    _, saved = forward(params, config, np.array([text[:-1]]))
    cache = new_mtp_cache(config, len(text))
    pairs = (hidden_states(saved), np.array([text[1:]]))
    return mtp_step(params, config, *pairs, cache)[0, -1]


def agree(ours: np.ndarray, expected: Sequence, tolerance: float, *where) -> None:
    assert relative_error(ours, np.array(expected)) <= tolerance, where


# --- the script -----------------------------------------------------------------------


@torch.inference_mode()
def spoil(session, counts: np.ndarray) -> None:
    """Large numbers wherever a cache holds nothing that counts."""
    if isinstance(session, numpy_decoder._Session):
        return  # it crops caches of its own for each text
    if isinstance(session, compiled._Session):
        trunk, module = session.kept, [session.module_kept]
    else:
        trunk = [array for cache in session.caches for array in cache.arrays]
        module = session.module_cache.arrays if session.module_cache else []
    for b, length in enumerate(session.lengths):
        for array in trunk:
            array[b, length:] = HUGE
        for array in module:
            if array is not None:
                array[b, length - counts[b] :] = HUGE


class Script:
    """Texts, and the session that reads them."""

    def __init__(
        self,
        make: Callable,
        params: dict,
        config: Config,
        lengths: Sequence[int] = (5, 1, 3),
        chunk: int = 3,
        seed: int = 0,
        tolerance: float = SAME,
        decoder=None,
    ) -> None:
        self.config, self.tolerance = config, tolerance
        self.exact = {k: a.astype(np.float64) for k, a in params.items()}
        self.rng = np.random.default_rng(seed)
        self.drafts = config.num_nextn_predict_layers > 0
        self.texts = [self.tokens(n).tolist() for n in lengths]
        decoder = decoder or make(params, config)
        room = min(config.max_position_embeddings, max(lengths) + 24)
        self.session = decoder.session(len(lengths), room, self.drafts, chunk)
        logits = self.session.prefill(side_by_side(self.texts, 0), np.array(lengths))
        agree(logits, [self.uncached(t)[-1] for t in self.texts], tolerance, "prefill")
        self.counts = np.ones(len(lengths), int)  # tokens of the last step that count
        self.T = 1  # tokens of the last step
        self.new: np.ndarray | None = None  # what follows each text, once drafted from

    def tokens(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, self.config.vocab_size, shape)

    def uncached(self, text: list[int]) -> np.ndarray:
        return uncached(self.exact, self.config, text)

    def draft(self, wide: bool = True) -> None:
        """Each text's pairs since the last draft, and tokens of no meaning behind them.

        If not wide, no more than the text with most pairs needs.
        """
        self.new = self.tokens(len(self.texts))
        read = [[*text, new] for text, new in zip(self.texts, self.new, strict=True)]
        ids = self.tokens(len(read), self.T if wide else max(self.counts))
        for b, count in enumerate(self.counts):
            ids[b, :count] = read[b][-count:]
        logits = self.session.draft(ids, self.counts)
        expected = [drafted(self.exact, self.config, text) for text in read]
        agree(logits, expected, self.tolerance, "draft", self.texts)

    def step(self, T: int, counts: Sequence[int] | None = None) -> None:
        """Read T tokens, and keep some of them, one at least."""
        ids = self.tokens(len(self.texts), T)
        if self.new is not None:
            ids[:, 0] = self.new
        logits = self.session.step(ids)
        read = [text + now.tolist() for text, now in zip(self.texts, ids, strict=True)]
        expected = [self.uncached(text)[-T:] for text in read]
        agree(logits, expected, self.tolerance, "step", self.texts)
        if counts is None:
            counts = self.rng.integers(1, T + 1, len(self.texts))
        self.counts, self.T = np.array(counts), T
        self.session.keep(self.counts)
        self.texts = [
            text[: len(text) - T + count]
            for text, count in zip(read, counts, strict=True)
        ]

    def select(self, texts: Sequence[int]) -> None:
        self.session.select(np.array(texts))
        self.counts = self.counts[list(texts)]
        self.texts = [self.texts[b] for b in texts]

    def play(self, steps: Sequence[int] = (2, 1, 3, 2), left=((1, (0, 2)),)) -> None:
        """A round for each number of tokens; after round n these texts are left."""
        for n, T in enumerate(steps):
            spoil(self.session, self.counts)
            if self.drafts:
                self.draft(wide=self.rng.random() < 0.5)
            self.step(T)
            for at, texts in left:
                if at == n:
                    self.select(texts)


def check_session(
    make: Callable = CompiledDecoder, config: Config = TINY, **more
) -> None:
    Script(make, fresh(config), config, **more).play()


@each_decoder
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_sessions_of_whole_models(make: Callable, config: Config) -> None:
    check_session(make, config)
    check_session(make, dataclasses.replace(config, num_nextn_predict_layers=0))


@pytest.mark.parametrize("make", [of_modules, NumpyDecoder], ids=["modules", "numpy"])
@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_sessions_of_models_without_mla_or_experts(make, config: Config) -> None:
    check_session(make, config)


def test_sessions_of_dense_models_with_mla() -> None:
    for config in (test_mla.BASE, test_mla.YARN):
        check_session(CompiledDecoder, config)


def test_two_modules_draft_with_the_first() -> None:
    config = dataclasses.replace(TINY, num_nextn_predict_layers=2)
    for make in DECODERS.values():
        check_session(make, config)


@contextmanager
def short(scores: float) -> Iterator[list[int]]:
    """Another border for the compiled decoder's loops; rows of their calls."""
    calls: list[int] = []
    right = cpu_kernels.attention

    def noting(x: np.ndarray, *more: object) -> None:
        calls.append(len(x))
        right(x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiled._Session.step.__globals__, "SHORT", scores)
        patch.setattr(cpu_kernels, "attention", noting)
        yield calls


def check_long(config: Config = TINY) -> None:
    """Attention by the library from the first step on, and from the middle on."""
    for scores in (0, 24 * config.num_attention_heads):
        with short(scores) as calls:
            check_session(CompiledDecoder, config)
        assert bool(calls) == bool(scores)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_sessions_with_a_long_past(config: Config) -> None:
    check_long(config)


def check_border() -> None:
    """As many scores as SHORT: loops. One more: the library. No logit tells which."""
    params, L = fresh(TINY), TINY.num_hidden_layers
    for lengths, T in (((5,), 1), ((5, 3), 1), ((2, 5, 1), 3)):
        B = len(lengths)
        scores = B * T * TINY.num_attention_heads * (max(lengths) + T)
        answers = []
        for border in (scores, scores - 1):
            script = Script(CompiledDecoder, params, TINY, lengths)
            with short(border) as calls:
                answers.append(script.session.step(np.arange(B * T).reshape(B, T)))
            assert calls == ([B * T] * L if border == scores else [])
        agree(*answers, SAME)


def test_loops_and_library_meet() -> None:
    check_border()


def check_crossing(make: Callable = read_by_torch, chunks=(12, 13, 14, 20)) -> None:
    """Prompts in chunks shorter and longer than where the forms cost the same: 13.2."""
    for chunk in chunks:
        script = Script(make, fresh(CROSSING), CROSSING, (41, 27, 14), chunk)
        script.draft()
        script.step(2)
        script.draft()


@pytest.mark.parametrize("make", [read_by_torch, of_modules])
def test_prompts_in_chunks_about_the_crossover(make: Callable) -> None:
    check_crossing(make)


def check_chunks(make: Callable = CompiledDecoder, chunks=range(1, 8)) -> None:
    """Prompts that end in the middle of a chunk, at its end, and at its start."""
    for chunk in chunks:
        script = Script(make, fresh(TINY), TINY, (6, 1, 4), chunk)
        script.draft()
        script.step(1)


@each_decoder
def test_prompts_in_chunks_of_every_size(make: Callable) -> None:
    check_chunks(make)


def check_one_token(make: Callable = CompiledDecoder) -> None:
    """The module's cache is empty, and then it holds what counts, and zeros."""
    script = Script(make, fresh(TINY), TINY, (1, 1))
    for _ in range(2):
        script.draft()
        script.step(2, (1, 2))
    script.draft()


@each_decoder
def test_prompts_of_one_token(make: Callable) -> None:
    check_one_token(make)


@each_decoder
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (4, 4), (2, 7), (7, 1, 1, 3)])
def test_lengths_of_prompts(make: Callable, lengths: tuple) -> None:
    Script(make, fresh(TINY), TINY, lengths).play((1, 2, 2), ())


@each_decoder
@pytest.mark.parametrize("seed", range(4))
def test_many_rounds(make: Callable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 4)
    script = Script(make, fresh(TINY), TINY, lengths, int(rng.integers(1, 9)), seed)
    leaving = ((2, (3, 0, 1)), (4, (1, 2)), (5, (0,)))  # in any order
    script.play(rng.integers(1, 4, 7), leaving)


def check_early_end(make: Callable = CompiledDecoder) -> None:
    """A text whose first token ends it: it leaves before anything was drafted."""
    for lengths in ((3, 1, 5), (1, 1, 1)):
        script = Script(make, fresh(TINY), TINY, lengths)
        script.select((2, 1))
        script.play((2, 2), ())


@each_decoder
def test_texts_that_end_with_their_first_token(make: Callable) -> None:
    check_early_end(make)


def check_rejected(make: Callable = CompiledDecoder) -> None:
    """One of two kept, again and again; then all that were read."""
    script = Script(make, fresh(TINY), TINY)
    some = ((1, 1, 1), (1, 2, 1), (2, 2, 2), (1, 1, 1), (1, 1, 2), (1, 1, 1))
    for n, counts in enumerate(some):
        script.draft(wide=n % 2 == 0)
        script.step(2, counts)
        spoil(script.session, script.counts)


@each_decoder
def test_rejected_tokens_leave_no_trace(make: Callable) -> None:
    check_rejected(make)


def check_float32(make: Callable = CompiledDecoder) -> None:
    """The shipped model, where no router has a close call."""
    config, params = checkpoints.load(MINI_FOLDER, np.float32)
    decoder, played = make(params, config), 0
    for seed in range(40):
        script = Script(make, params, config, (9, 1), 4, seed, np.inf, decoder)
        texts = script.texts
        if min(closest_call(params, config, np.array([t])) for t in texts) < 1e-4:
            continue
        script = Script(make, params, config, (9, 1), 4, seed, FLOAT32, decoder)
        try_closely(script, params)
        played += 1
        if played == 3:
            return
    raise AssertionError("no text without a close call")


def try_closely(script: Script, params: dict) -> None:
    """A draft and a step of two; tokens that some router finds hard are left out."""
    script.draft()
    before = [list(text) for text in script.texts]
    for _ in range(50):
        ids = script.tokens(len(before), 2)
        ids[:, 0] = script.new
        read = [[*text, *now] for text, now in zip(before, ids.tolist(), strict=True)]
        calls = [closest_call(params, script.config, np.array([t])) for t in read]
        if min(calls) > 1e-5:
            break
    else:
        raise AssertionError("every text has a close call")
    logits = script.session.step(ids)
    assert logits.dtype == np.float32
    agree(logits, [script.uncached(text)[-2:] for text in read], FLOAT32)


@pytest.mark.parametrize("make", [CompiledDecoder, read_by_torch, of_modules])
def test_the_shipped_model_in_float32(make: Callable) -> None:
    check_float32(make)


@torch.no_grad()
def check_half() -> None:
    """bfloat16: the trunk's numbers but for 8 bits a product; logits leave whole."""
    config = test_mla.BASE  # no router: none of its calls is close
    half = port(as_float32(fresh(config)), config).bfloat16()
    rounded = {k: a.astype(np.float32) for k, a in arrays(half).items()}
    decoder = ModuleDecoder(half)
    script = Script(None, rounded, config, tolerance=HALF, decoder=decoder)
    script.play()
    assert script.session.step(np.array([[1], [2]])).dtype == np.float32


def test_modules_in_bfloat16() -> None:
    check_half()


# --- which decoder, and what it refuses -----------------------------------------------


def check_choice() -> None:
    """The fastest that applies, with a reader of the same kind."""
    params, plain = fresh(TINY), fresh(PLAIN)
    for dtype in (np.float32, np.float64):
        same = {k: a.astype(dtype) for k, a in params.items()}
        for model, reader in (
            ((same, TINY), NumpyReader),
            (port(same, TINY), TorchReader),
        ):
            decoder = decoder_for(model)
            assert type(decoder) is CompiledDecoder and decoder.dtype == dtype
            assert type(decoder.reader) is reader
            assert decoder_for(decoder) is decoder
    half = port(as_float32(params), TINY).bfloat16()
    for model in (half, port(plain, PLAIN), port(params, TINY).to("meta")):
        decoder = decoder_for(model)
        assert type(decoder) is ModuleDecoder and decoder.reader.model is model
    halves = {k: a.astype(ml_dtypes.bfloat16) for k, a in params.items()}
    mixed = params | {"lm_head.weight": params["lm_head.weight"].astype(np.float32)}
    slanted = {k: np.asfortranarray(a) for k, a in params.items()}
    for pair in ((plain, PLAIN), (halves, TINY), (mixed, TINY), (slanted, TINY)):
        decoder = decoder_for(pair)
        assert type(decoder) is NumpyDecoder and decoder.params is pair[0]


def test_the_fastest_decoder_that_applies() -> None:
    check_choice()


def check_without_numba(monkeypatch) -> None:
    """Then nothing asks for it, and the text is the same."""
    params = fresh(TINY)
    expected = generate((params, TINY), [[1, 2, 3]], 4)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "find_spec", lambda name: None)
        assert type(decoder_for((params, TINY))) is NumpyDecoder
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        for module in ("compiled", "cpu_kernels"):
            patch.delitem(sys.modules, f"minidsv3.generation.{module}", False)
        assert type(decoder_for((params, TINY))) is NumpyDecoder
        model = port(params, TINY)
        assert type(decoder_for(model)) is ModuleDecoder
        for one in (model, (params, TINY)):
            assert np.array_equal(generate(one, [[1, 2, 3]], 4), expected)
        assert "minidsv3.generation.compiled" not in sys.modules


def test_without_numba_the_model_decodes_itself(monkeypatch) -> None:
    check_without_numba(monkeypatch)


def check_refusals() -> None:
    """Plain attention, several precisions, others, and arrays of another model."""
    with pytest.raises(ValueError, match="is for MLA; kv_lora_rank is None here"):
        CompiledDecoder(fresh(PLAIN), PLAIN)
    params = fresh(TINY)
    mixed = params | {"lm_head.weight": params["lm_head.weight"].astype(np.float32)}
    with pytest.raises(ValueError, match="these are float32, float64"):
        CompiledDecoder(mixed, TINY)
    half = {k: a.astype(np.float16) for k, a in params.items()}
    with pytest.raises(ValueError, match="float32 or float64; these are float16"):
        CompiledDecoder(half, TINY)
    narrow = params | {"lm_head.weight": params["lm_head.weight"][:, :-1].copy()}
    with pytest.raises(ParameterError, match=r"lm_head.weight has shape \(257, 31\)"):
        CompiledDecoder(narrow, TINY)  # a kernel would read beyond its end
    key = "model.layers.0.self_attn.kv_b_proj.weight"
    slanted = params | {key: np.asfortranarray(params[key])}
    with pytest.raises(ValueError, match=f"C order; {key} is not"):
        CompiledDecoder(slanted, TINY)


def test_what_the_compiled_decoder_refuses() -> None:
    check_refusals()


@each_decoder
def test_whose_parameter_is_not_finite(make: Callable) -> None:
    params = fresh(TINY)
    assert make(params, TINY).culprit() is None
    params["model.norm.weight"][3] = np.nan
    assert make(params, TINY).culprit() == "model.norm.weight"


def test_a_router_that_is_not_finite_is_an_error() -> None:
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        for bad in (np.nan, np.inf):
            params = fresh(TINY)
            key = f"model.layers.1.mlp.{name}"
            decoder = CompiledDecoder(params, TINY)
            session = decoder.session(1, 9, False, 9)
            session.prefill(np.array([[1, 2]]), np.array([2]))
            params[key][3] = bad
            assert np.isnan(session.step(np.array([[5]]))).all()
            assert decoder.culprit() == key


def check_training_in_between(make: Callable = CompiledDecoder) -> None:
    """A decoder made once decodes with the weights of the moment."""
    params = fresh(TINY)
    decoder = make(params, TINY)
    for _ in range(2):
        script = Script(None, params, TINY, decoder=decoder)
        script.play((2, 1))
        for array in params.values():
            array *= 1.03


@pytest.mark.parametrize("make", [CompiledDecoder, NumpyDecoder])
def test_training_in_between_is_seen(make: Callable) -> None:
    check_training_in_between(make)


@pytest.mark.parametrize("make", [decoder_for, ModuleDecoder])
def test_a_training_step_of_torch_is_seen(make: Callable) -> None:
    model = port(fresh(TINY), TINY)
    decoder = make(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        Script(None, arrays(model), TINY, decoder=decoder).play((2, 1))
        model.loss(torch.tensor([[1, 2, 3, 4, 5]])).losses["total"].backward()
        optimiser.step()


# --- the cache ------------------------------------------------------------------------


def columns(kind: Callable, rng: np.random.Generator, B: int, T: int) -> tuple:
    """Two arrays of T new positions, as attention gives them."""
    new = rng.normal(size=(B, T, 3)), rng.normal(size=(B, T, 2, 2))
    return tuple(kind(array) for array in new)


def check_ragged(kind: Callable = np.array, seed: int = 0) -> None:
    """Against a list for each row, through many rounds."""
    rng = np.random.default_rng(seed)
    B, cache = 3, RaggedCache(40)
    first = columns(kind, rng, B, 4)
    assert cache.positions(4).tolist() == [0, 1, 2, 3] and cache.visible(4) is None
    for kept, new in zip(cache.extend(*first), first, strict=True):
        assert np.array_equal(kept, new)
    assert cache.positions(2).tolist() == [4, 5] and cache.visible(2) is None
    lengths = np.array([2, 4, 1])
    rows = [[[*new[b, :n]] for new in first] for b, n in enumerate(lengths)]
    for turn in range(6):
        cache.settle(lengths)
        T = int(rng.integers(1, 4))
        new = columns(kind, rng, len(rows), T)
        positions, visible = cache.positions(T), cache.visible(T)
        assert positions.tolist() == [[*range(n, n + T)] for n in lengths]
        kept = cache.extend(*new)
        S = max(lengths) + T
        assert visible.shape == (len(rows), T, S)
        for b, t, s in np.ndindex(visible.shape):
            assert visible[b, t, s] == (s <= lengths[b] + t)
        counts = rng.integers(0, T + 1, len(rows))
        for b, row in enumerate(rows):
            for column, array, now in zip(row, kept, new, strict=True):
                column += [*now[b]]
                assert array.shape[:2] == (len(rows), S)
                assert np.array_equal(array[b, : len(column)], np.array(column))
                del column[lengths[b] + counts[b] :]
        lengths = lengths + counts
        assert cache.positions(T).tolist() == positions.tolist(), "no end has moved"
        if turn in (2, 4):
            chosen = rng.permutation(len(rows))[:-1]
            cache.settle(lengths)
            cache.select(chosen)
            lengths, rows = lengths[chosen], [rows[b] for b in chosen]
            assert cache.positions(1)[:, 0].tolist() == lengths.tolist()
            assert [len(array) for array in cache.arrays] == [len(rows)] * 2


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("seed", range(5))
def test_texts_of_different_lengths_in_one_cache(kind: Callable, seed: int) -> None:
    check_ragged(kind, seed)


def check_empty() -> None:
    """Settled before anything came: the module's cache after prompts of one token."""
    for kind in (np.array, torch.tensor):
        cache = RaggedCache(5)
        assert cache.arrays == ()
        cache.settle(np.array([0, 0]))
        new = columns(kind, np.random.default_rng(0), 2, 2)
        assert cache.visible(2).tolist() == [[[1, 0], [1, 1]]] * 2
        for kept, now in zip(cache.extend(*new), new, strict=True):
            assert np.array_equal(kept, now)
        assert not any(np.asarray(array[:, 2:]).any() for array in cache.arrays)


def test_a_cache_that_is_settled_while_empty() -> None:
    check_empty()


def check_full() -> None:
    """Nothing is written beyond the end, nor into the last place instead."""
    cache = RaggedCache(4)
    cache.extend(np.zeros((2, 3, 1)))
    cache.settle(np.array([1, 3]))
    cache.extend(np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="3 positions are kept and 2 more arrive"):
        cache.extend(np.ones((2, 2, 1)))
    for other in (np.ones((1, 1, 1)), np.ones((2, 1, 1), np.float32)):
        with pytest.raises(ValueError, match="a cache is for one model and one batch"):
            cache.extend(other)
    assert cache.arrays[0][:, :, 0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_what_a_settled_cache_refuses() -> None:
    check_full()


def check_plain_cache() -> None:
    for cache in (Cache(9), RaggedCache(9)):
        cache.extend(np.ones((2, 3, 4)))
        assert cache.positions(2).tolist() == [3, 4] and cache.visible(2) is None
        assert [array.shape for array in cache.arrays] == [(2, 9, 4)]
        assert not cache.arrays[0][:, 3:].any(), "zeros: 0 × NaN would be NaN"
        cache.crop(1)
        assert cache.positions(1).tolist() == [1]
        assert cache.nbytes == 2 * 1 * 4 * 8


def test_a_plain_cache_says_where_tokens_stand() -> None:
    check_plain_cache()


# --- shapes ---------------------------------------------------------------------------


def check_shapes(monkeypatch) -> None:
    """The loops too, as plain Python."""
    spoken = (compiled, cpu_kernels, torch_decoder, prefill, numpy_decoder, decoding,
              rules, cache_module)  # fmt: skip
    with monkeypatch.context() as patch, checked_shapes(*spoken) as report:
        plant_loops(patch, cpu_kernels)
        for config in (TINY, test_mla.YARN):
            for make in DECODERS.values():
                check_session(make, config)
        generate((fresh(TINY), TINY), [[1, 2, 3], [4]], 6)
        with short(0):
            check_session(CompiledDecoder, TINY)
    missed = {(s.file, s.first) for s in report.unexercised}
    assert not missed and len(report.exercised) > 20


def test_decoders_say_true_shapes(monkeypatch) -> None:
    check_shapes(monkeypatch)


@pytest.mark.parametrize("module", [compiled, cpu_kernels])
def test_every_reshape_says_its_shape(module) -> None:
    assert not unannotated(Path(module.__file__).read_text(encoding="utf-8"))
