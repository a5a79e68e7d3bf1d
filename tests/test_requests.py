"""What one may ask of `generate` and `stream`, what is refused, and when."""

import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch

from minidsv3 import parameters
from minidsv3.config import TINY
from minidsv3.generation import decoder_for, decoding, generate, stream
from minidsv3.generation.compiled import CompiledDecoder
from minidsv3.generation.numpy_decoder import NumpyDecoder
from minidsv3.generation.torch_port import ModuleDecoder
from tests.test_decoding import (
    KINDS,
    PLAIN,
    decoders,
    drafting,
    each_decoder,
    uncached,
)
from tests.torch_ports import port

LONGEST = TINY.max_position_embeddings


# --- the end of the context -----------------------------------------------------------


def check_full_context(kind: str) -> None:
    """The last position is used; a draft that would stand behind it harms nobody.

    There is one where of two full texts one ends later.
    """
    params = drafting()
    decoder = decoders(params, TINY)[kind]
    text = list(range(100, 100 + LONGEST))
    for n in (1, 2, 3, 4, 9, 14):
        full = text[: LONGEST + 1 - n]
        given = [full, full[::-1], full[:5], full[3:], full[::2] + full[1::2]]
        for batch in ([full], given):
            texts = uncached(params, TINY, batch, n)
            for speculative in (True, False):
                new = generate(decoder, batch, n, speculative=speculative)
                np.testing.assert_array_equal(new, texts)


@each_decoder
def test_exactly_full(kind: str) -> None:
    check_full_context(kind)


def test_a_prompt_of_the_whole_context_and_one_token() -> None:
    text = [i % 257 for i in range(LONGEST)]
    assert generate((drafting(), TINY), [text, [1]], 1).shape == (2, 1)


# --- what is refused ------------------------------------------------------------------


class Idle:
    """A decoder that nobody should ask for anything."""

    config = TINY

    def session(self, *_) -> None:
        raise AssertionError("it began to compute")

    culprit = session


BAD = [
    ({"ids": []}, "must have shape .*got a list of 0"),
    ({"ids": [[]]}, "prompt 0 is empty"),
    ({"ids": [[1, 2], []]}, "prompt 1 is empty"),
    ({"ids": np.zeros((2, 0), int)}, "prompt 0 is empty"),
    ({"ids": np.zeros((0, 2), int)}, r"must have shape .*got shape \(0, 2\)"),
    ({"ids": [1, 2, 3]}, "must have shape .*got a list of 3 × int"),
    ({"ids": np.arange(3)}, r"must have shape .*got shape \(3,\)"),
    ({"ids": torch.arange(3)}, r"must have shape .*got shape \(3,\)"),
    ({"ids": np.zeros((1, 2, 3), int)}, r"must have shape .*got shape \(1, 2, 3\)"),
    ({"ids": 5}, r"must have shape .*got shape \(\)"),
    ({"ids": [np.zeros((1, 2), int)]}, "must have shape .*got a list of 1"),
    ({"ids": [[1.0, 2.0]]}, "prompt 0 holds float64, ids are integers"),
    ({"ids": [[1], [True]]}, "prompt 1 holds bool, ids are integers"),
    ({"ids": torch.ones(1, 3)}, "prompt 0 holds float32"),
    ({"ids": [[1], [2, 257]]}, "prompt 1: token id 257 is outside .* 0…256"),
    ({"ids": [[-1]]}, "prompt 0: token id -1"),
    (
        {"ids": [[1] * (LONGEST + 1)]},
        f"{LONGEST + 1} tokens.* is {LONGEST}: give",
    ),
    ({"ids": [[1], [1] * 59], "max_new_tokens": 7}, "of 59 tokens and 7 .* at most 6"),
    ({"max_new_tokens": LONGEST}, f"3 tokens and {LONGEST} new ones do not fit"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0, must be at least 1"),
    ({"max_new_tokens": -3}, "max_new_tokens is -3"),
    ({"chunk": 0}, "chunk is 0, must be at least 1"),
    ({"temperature": -0.1}, r"temperature is -0.1, must be 0 \(greedy\) or more"),
    ({"temperature": np.nan}, "temperature is nan"),
    ({"temperature": np.inf}, "temperature is inf"),
    ({"top_p": 0}, "top_p is 0, must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_p": np.nan}, "top_p is nan"),
    ({"seed": [1, 2]}, "2 seeds for 1 texts: give one a text"),
    ({"ids": [[1], [2]], "seed": [1]}, "1 seeds for 2 texts"),
    ({"seed": -1}, "seed is -1: give whole numbers"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"stop": [300]}, "stop holds the id 300, outside the vocabulary"),
    ({"stop": [None]}, "stop holds None"),
    ({"stop": [True]}, "stop holds True"),
    ({"stop": None}, "stop is None: give a list"),
    ({"max_new_tokens": 3.0}, "max_new_tokens is 3.0, must be at least 1, a whole"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"chunk": 2.5}, "chunk is 2.5"),
    ({"ids": [[[1], [2, 3]], [1]]}, "nested unevenly"),
]


def check_refused(given: dict, message: str) -> None:
    """At the call, before anything is computed, not when the first step is asked."""
    asked = {"ids": [[1, 2, 3]], "max_new_tokens": 4} | given
    with pytest.raises(ValueError, match=message):
        stream(Idle(), **asked)
    with pytest.raises(ValueError, match=message):
        generate(Idle(), **asked)


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_requests_are_refused_at_the_call(given: dict, message: str) -> None:
    check_refused(given, message)


def test_the_largest_request_is_not_refused() -> None:
    stream(Idle(), [[1, 2, 3]], LONGEST - 2)  # it did not compute either
    stream(Idle(), [[0, 256]], 1, chunk=1, top_p=1e-9, temperature=1e9, seed=0)


# --- a model without a module ---------------------------------------------------------


def check_warning() -> None:
    """One warning, of the caller's line; the text is the plain one."""
    config = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    params = parameters.initialise(config, 0, 0.4, np.float64)
    for decoder in decoders(params, config).values():
        for ask in (generate, lambda *given: list(stream(*given))):
            with pytest.warns(UserWarning, match="no MTP module to draft with") as seen:
                steps = ask(decoder, [[1, 2], [3]], 5)
            assert [warning.filename for warning in seen] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = generate(decoder, [[1, 2], [3]], 5, speculative=False)
        texts = [sum((step.tokens[b] for step in steps), []) for b in range(2)]
        np.testing.assert_array_equal(plain, texts)
        assert steps[-1].statistics.drafts == 0


def test_a_model_without_a_module_decodes_plainly_and_says_so() -> None:
    check_warning()


# --- parameters that are not finite ---------------------------------------------------

BROKEN = [
    "model.norm.weight",
    "model.layers.0.self_attn.kv_b_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.2.hnorm.weight",
    "model.layers.2.mlp.gate.weight",
    "model.layers.2.self_attn.o_proj.weight",
    "lm_head.weight",
]


@each_decoder
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_has_a_name(kind: str, name: str) -> None:
    check_culprit(kind, name)


def check_culprit(kind: str, name: str) -> None:
    for value in (np.nan, np.inf):
        if value == np.inf and name.endswith("mlp.gate.weight"):
            continue  # the sigmoid of infinity is 1: some decoders take it
        params = {k: a.copy() for k, a in drafting().items()}
        params[name].flat[0] = value
        for sampling in ({}, {"temperature": 1.0}):
            with (
                np.errstate(all="ignore"),
                pytest.raises(FloatingPointError, match=f"{name} holds NaN"),
            ):
                generate(decoders(params, TINY)[kind], [[1, 2, 3], [4]], 6, **sampling)


def test_a_module_that_is_not_finite_is_not_asked_in_vain() -> None:
    """Without speculation it is not read, and the first token is the trunk's."""
    params = {k: a.copy() for k, a in drafting().items()}
    params["model.layers.2.hnorm.weight"][0] = np.nan
    for decoder in decoders(params, TINY).values():
        new = generate(decoder, [[1], [4]], 6, speculative=False)
        whole = generate((drafting(), TINY), [[1], [4]], 6)
        np.testing.assert_array_equal(new, whole)
        steps = stream(decoder, [[1], [4]], 6)  # nothing to read before the first token
        assert [tokens[0] for tokens in next(steps).tokens] == whole[:, 0].tolist()


# --- what is taken, what is given back ------------------------------------------------


def test_ids_of_any_kind() -> None:
    model = (drafting(), TINY)
    whole = generate(model, [[1, 2, 3], [4, 5, 6]], 6)
    assert type(whole) is np.ndarray and whole.dtype == np.int64
    numbers = [[1, 2, 3], [4, 5, 6]]
    for ids in (
        np.array(numbers),
        np.array(numbers, np.uint16),
        np.array(numbers, np.int32),
        torch.tensor(numbers),
        torch.tensor(numbers, dtype=torch.int32),
        [torch.tensor(text) for text in numbers],
        [np.array(text, np.uint8) for text in numbers],
        tuple(map(tuple, numbers)),
        [[np.int64(i) for i in text] for text in numbers],
        np.array(numbers).T.copy().T,
    ):
        np.testing.assert_array_equal(generate(model, ids, 6), whole)


def test_a_tensor_for_a_torch_model_an_array_else() -> None:
    module = port(drafting(), TINY)
    whole = generate((drafting(), TINY), [[1, 2], [3]], 6)
    for ids in ([[1, 2], [3]], [torch.tensor([1, 2]), torch.tensor([3])]):
        new = generate(module, ids, 6)
        assert type(new) is torch.Tensor and new.dtype == torch.int64
        np.testing.assert_array_equal(new.numpy(), whole)
    for kind in KINDS:
        new = generate(decoders(drafting(), TINY)[kind], [[1, 2], [3]], 6)
        assert type(new) is np.ndarray
    steps = list(stream(module, [[1, 2], [3]], 6))
    assert {type(t) for step in steps for text in step.tokens for t in text} == {int}


def test_the_decoder_of_a_model(monkeypatch) -> None:
    params, narrow = drafting(), {k: a.astype("f4") for k, a in drafting().items()}
    mixed = narrow | {"lm_head.weight": params["lm_head.weight"]}
    module = port(params, TINY)
    wanted = [
        ((params, TINY), CompiledDecoder),
        ((narrow, TINY), CompiledDecoder),
        ((mixed, TINY), NumpyDecoder),
        ((drafting(PLAIN), PLAIN), NumpyDecoder),
        (module, CompiledDecoder),
        (port(narrow, TINY).bfloat16(), ModuleDecoder),
        (port(drafting(PLAIN), PLAIN), ModuleDecoder),
    ]
    for model, kind in wanted:
        assert type(decoder_for(model)) is kind
    ours = NumpyDecoder(params, TINY)
    assert decoder_for(ours) is ours
    monkeypatch.setattr(decoding, "find_spec", {}.get)  # numba is missing
    assert type(decoder_for((params, TINY))) is NumpyDecoder
    assert type(decoder_for(module)) is ModuleDecoder


def test_a_model_that_learns_is_not_read_from_a_copy() -> None:
    """A decoder made before a step of training decodes with what is there after it."""
    module = port(drafting(), TINY)
    for decoder in (decoder_for(module), ModuleDecoder(module)):
        before = generate(decoder, [[1, 2, 3]], 12)
        with torch.no_grad():
            module.lm_head.weight *= -1
        after = generate(decoder, [[1, 2, 3]], 12)
        assert (before != after).any()
        np.testing.assert_array_equal(after, generate(module, [[1, 2, 3]], 12))


def test_bfloat16_decodes() -> None:
    module = port({k: a.astype("f4") for k, a in drafting().items()}, TINY).bfloat16()
    new = generate(module, [[1, 2, 3], [4]], 8)
    assert new.shape == (2, 8) and bool((new >= 0).all())


def test_a_model_that_does_more_than_its_weights_is_asked_itself() -> None:
    """The loops read weights: a hook, or a class of its own, they would pass over."""
    module = port(drafting(), TINY)
    hook = module.lm_head.register_forward_hook(
        lambda layer, read, logits: logits.index_fill(-1, torch.arange(250), -torch.inf)
    )
    assert type(decoder_for(module)) is ModuleDecoder
    with pytest.raises(FloatingPointError):  # and what it says is not finite
        generate(module, [[1, 2, 3]], 4)
    hook.remove()
    assert type(decoder_for(module)) is CompiledDecoder

    class Own(type(module)):
        pass

    module.__class__ = Own
    assert type(decoder_for(module)) is ModuleDecoder
    module.register_buffer("more", torch.zeros(1))
    assert generate(module, [[1, 2, 3]], 4).shape == (1, 4)


def test_autocast_changes_nothing() -> None:
    module = port({k: a.astype("f4") for k, a in drafting().items()}, TINY)
    for decoder in (decoder_for(module), ModuleDecoder(module)):
        plain = generate(decoder, [[1, 2, 3], [4]], 8)
        with torch.autocast("cpu", torch.bfloat16):
            under = generate(decoder, [[1, 2, 3], [4]], 8)
        np.testing.assert_array_equal(under, plain)


def test_numba_that_cannot_be_imported(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "minidsv3.generation.compiled", None)
    with pytest.warns(UserWarning, match="without numba, which fails"):
        assert type(decoder_for((drafting(), TINY))) is NumpyDecoder


@pytest.mark.parametrize("model", [None, [1, 2], (TINY, drafting()), (1, 2, 3)])
def test_what_is_no_model(model) -> None:
    with pytest.raises(
        ValueError, match=r"give a DeepSeekV3, a pair \(params, config\)"
    ):
        decoder_for(model)


def test_a_row_that_no_text_uses_may_be_broken() -> None:
    """Shorter prompts are filled up; what with must not matter."""
    params = {name: array.copy() for name, array in drafting().items()}
    params["model.embed_tokens.weight"][0] = np.nan
    for kind in KINDS:
        decoder = decoders(params, TINY)[kind]
        try:
            new = generate(decoder, [[1, 2, 3], [4]], 1)
        except FloatingPointError as error:
            pytest.fail(f"{kind}: {error}")
        assert new.shape == (2, 1)
