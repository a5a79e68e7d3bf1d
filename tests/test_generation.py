"""Sampling and cached decoding, against uncached loops and the exact law."""

import dataclasses

import numpy as np
import pytest

from minidsv3 import parameters
from minidsv3.config import PLAIN
from minidsv3.generation.numpy_ref import generate, next_token_law, stream
from minidsv3.model.numpy_ref import forward
from minidsv3.primitives.numpy_ref import draw

SMALL = dataclasses.replace(
    PLAIN,
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=24,
)
PARAMS = parameters.initialise(SMALL, 0, 0.5, np.float64)


def prompts(B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, (B, T))


def test_greedy_is_argmax_of_the_uncached_model() -> None:
    for seed in range(20):
        ids = prompts(2, 1 + seed % 5, seed)
        new = generate(PARAMS, SMALL, ids, 12)
        text = ids
        for _ in range(12):
            logits, _ = forward(PARAMS, SMALL, text)
            text = np.concatenate([text, logits[:, -1:].argmax(-1)], axis=1)
        np.testing.assert_array_equal(new, text[:, ids.shape[1] :])


def test_streaming_gives_the_same_tokens() -> None:
    ids = prompts(3, 4)
    arguments = {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    steps = list(stream(PARAMS, SMALL, ids, **arguments))
    whole = generate(PARAMS, SMALL, ids, **arguments)
    np.testing.assert_array_equal(np.stack(steps, 1), whole)


def test_seeds_reproduce() -> None:
    ids = prompts(2, 3)

    def text(seed: int) -> np.ndarray:
        return generate(PARAMS, SMALL, ids, 15, temperature=1.0, seed=seed)

    np.testing.assert_array_equal(text(1), text(1))
    assert (text(1) != text(2)).any()


def test_two_sampled_tokens_follow_the_joint_law() -> None:
    """χ² of 20,000 pairs against p(x) p(y | x), with temperature and top-p."""
    n, ids = 20_000, prompts(1, 3)
    temperature, top_p = 0.7, 0.9
    new = generate(PARAMS, SMALL, np.repeat(ids, n, 0), 2, temperature, top_p, seed=0)

    def law(text: np.ndarray) -> np.ndarray:
        logits, _ = forward(PARAMS, SMALL, text)
        w = np.exp(logits[0, -1] / temperature)
        w /= w.sum()
        kept, total = np.zeros_like(w), 0.0
        for i in sorted(range(len(w)), key=lambda i: -w[i]):
            if total < top_p:
                kept[i], total = w[i], total + w[i]
        return kept / kept.sum()

    first = law(ids)
    joint = np.array(
        [p * law(np.append(ids, [[x]], axis=1)) if p else 0 * first
         for x, p in enumerate(first)]
    )  # fmt: skip
    counts = np.zeros_like(joint)
    np.add.at(counts, (new[:, 0], new[:, 1]), 1)
    assert counts[joint == 0].sum() == 0
    cells = joint * n >= 5
    expected = (joint * n)[cells]
    chi2 = ((counts[cells] - expected) ** 2 / expected).sum()
    dof = cells.sum() - 1
    assert abs(chi2 - dof) < 4 * (2 * dof) ** 0.5


def test_law_of_the_next_token() -> None:
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    np.testing.assert_allclose(next_token_law(logits, 1.0), np.exp(logits))
    np.testing.assert_array_equal(next_token_law(logits, 0.0), [[1, 0, 0, 0]])
    np.testing.assert_allclose(
        next_token_law(logits, 1.0, 0.79), [[0.625, 0.375, 0, 0]]
    )
    np.testing.assert_allclose(
        next_token_law(logits, 1.0, 0.81), np.array([[0.5, 0.3, 0.15, 0]]) / 0.95
    )
    np.testing.assert_array_equal(next_token_law(logits, 1.0, 1e-9), [[1, 0, 0, 0]])
    sharp = next_token_law(logits, 0.5)
    np.testing.assert_allclose(sharp, np.exp(2 * logits) / np.exp(2 * logits).sum())


def test_the_law_is_float64_whatever_the_logits_are() -> None:
    law = next_token_law(np.zeros((1, 3), np.float32), 1.0)
    assert law.dtype == np.float64
    assert law[0, 0] == 1 / 3  # float32 would have stopped at eight digits


def test_a_tiny_temperature_is_greedy() -> None:
    law = next_token_law(np.array([[1.0, 3.0, 2.0]]), 1e-310)
    np.testing.assert_array_equal(law, [[0, 1, 0]])


def test_ties_of_greedy_go_to_the_first() -> None:
    law = next_token_law(np.array([[1.0, 2.0, 2.0]]), 0.0)
    np.testing.assert_array_equal(law, [[0, 1, 0]])


def test_a_draw_never_falls_outside_the_law() -> None:
    class Edge:
        """A generator that returns the numbers next to 0 and 1."""

        def __init__(self, value: float) -> None:
            self.value = value

        def random(self, shape: tuple) -> np.ndarray:
            return np.full(shape, self.value)

    # ten tenths sum to less than one from the left, and to one in pairs
    tenths = np.array([[0.1] * 10 + [0.0] * 3])
    assert draw(tenths, Edge(1 - 2**-53))[0] == 9

    law = np.array([[0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(draw(law, Edge(0.0)), [1, 2])
    np.testing.assert_array_equal(draw(law, Edge(1 - 2**-53)), [2, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 23}, "25 positions asked for.*24"),
        ({"ids": np.zeros((1, 0), int)}, r"prompt has shape \(1, 0\)"),
        ({"ids": np.zeros(3, int)}, r"prompt has shape \(3,\)"),
        ({"ids": np.full((1, 3), 13)}, "token id 13"),
    ],
)
def test_bad_requests(arguments: dict, message: str) -> None:
    given = {"ids": prompts(1, 3), "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        generate(PARAMS, SMALL, **given)


def test_the_whole_context_can_be_used() -> None:
    new = generate(PARAMS, SMALL, prompts(1, 3), 22)  # the last token is not read
    assert new.shape == (1, 22)


def test_logits_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        next_token_law(np.array([[0.0, np.nan]]), 1.0)
