"""Speculative decoding: the same greedy text, exactly the same law, honest counts."""

import dataclasses

import numpy as np
import pytest

from minidsv3 import parameters
from minidsv3.config import PLAIN, Config, TrainConfig
from minidsv3.generation import numpy_ref as generation
from minidsv3.model import numpy_ref as model
from minidsv3.mtp import numpy_ref as mtp
from minidsv3.training import numpy_ref as training

CONFIG = dataclasses.replace(
    PLAIN,
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=32,
    num_nextn_predict_layers=1,
)
Params = dict[str, np.ndarray]


def untrained(config: Config = CONFIG, seed: int = 0) -> Params:
    return parameters.initialise(config, seed, 0.5, np.float64)


def a_language(n: int) -> np.ndarray:
    """Each token depends on the two before it; one in six is a surprise."""
    rng = np.random.default_rng(7)
    V = CONFIG.vocab_size
    usual = rng.integers(0, V, (V, V))
    text = [0, 1]
    for surprise, other in zip(rng.random(n), rng.integers(0, V, n), strict=True):
        text.append(other if surprise < 1 / 6 else usual[text[-2], text[-1]])
    return np.array(text, np.uint16)


@pytest.fixture(scope="module")
def trained() -> Params:
    """A few seconds of training: its drafts are often right, and often wrong."""
    recipe = TrainConfig(
        steps=120, batch_size=8, sequence_length=24, learning_rate=1e-2, warmup_steps=9
    )
    state = training.new_state(parameters.initialise(CONFIG, 0, 0.1, np.float64))
    for _ in training.train(state, CONFIG, recipe, a_language(20_000)):
        pass
    return state.params


def prompts(how_many: int, B: int = 1) -> list[np.ndarray]:
    """Of 1 to 5 tokens."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, CONFIG.vocab_size, (B, 1 + i % 5)) for i in range(how_many)]


def last_counts(params: Params, ids: np.ndarray, n: int, **sampling):
    *_, (_, counts) = generation.speculate(params, CONFIG, ids, n, **sampling)
    return counts


# --- greedy -------------------------------------------------------------------------


def check_greedy(
    params: Params, B: int = 1, how_many: int = 100, n: int = 24, config=CONFIG
) -> tuple[int, int]:
    """The text without speculation, token for token; returns drafts and kept ones."""
    drafts = accepted = 0
    for ids in prompts(how_many, B):
        ids %= config.vocab_size
        plain = generation.generate(params, config, ids, n)
        steps = list(generation.speculate(params, config, ids, n))
        text = np.concatenate([new for new, _ in steps], axis=1)
        np.testing.assert_array_equal(text, plain)
        drafts += steps[-1][1].drafts
        accepted += steps[-1][1].accepted
    return drafts, accepted


def test_greedy_text_of_an_untrained_model_is_the_same() -> None:
    drafts, accepted = check_greedy(untrained())
    assert drafts > 1500 and 20 < accepted < drafts / 2  # both branches have run


def test_greedy_text_of_a_trained_model_is_the_same(trained) -> None:
    drafts, accepted = check_greedy(trained)
    assert 0.4 < accepted / drafts < 0.95


@pytest.mark.parametrize("B", [2, 5])
def test_a_batch_gives_the_same_text(trained, B: int) -> None:
    drafts, accepted = check_greedy(trained, B, how_many=20)
    assert 0.4 < accepted / drafts < 0.95


@pytest.mark.parametrize("n", range(1, 13))
def test_it_stops_exactly(trained, n: int) -> None:
    """Also where the last pass has kept its draft, and at the end of the context."""
    for ids in prompts(10):
        plain = generation.generate(trained, CONFIG, ids, n)
        text = generation.generate(trained, CONFIG, ids, n, speculative=True)
        np.testing.assert_array_equal(text, plain)
    longest = CONFIG.max_position_embeddings
    ids = np.arange(longest + 1 - n)[None] % CONFIG.vocab_size
    plain = generation.generate(trained, CONFIG, ids, n)
    text = generation.generate(trained, CONFIG, ids, n, speculative=True)
    np.testing.assert_array_equal(text, plain)


def test_streaming_gives_one_token_at_a_time(trained) -> None:
    ids = prompts(2, B=3)[1]
    asked = (trained, CONFIG, ids, 15, 0.9, 0.8, 5)
    steps = list(generation.stream(*asked, speculative=True))
    assert {step.shape for step in steps} == {(3,)}
    whole = generation.generate(*asked, speculative=True)
    np.testing.assert_array_equal(np.stack(steps, 1), whole)
    again = generation.generate(*asked[:-1], 6, speculative=True)
    assert (again != whole).any()


def draft_logits(
    params: Params, config: Config, h: np.ndarray, text: list[int]
) -> np.ndarray:
    """Module 1 without a cache: states h of all but the last token of text -> (V,)."""
    module = parameters.cut(params, f"model.layers.{config.num_hidden_layers}.")
    block = model._mtp_block(config, np.dtype(np.float64))
    e = params["model.embed_tokens.weight"][[text[1:]]]
    h_1, _ = mtp.mtp_forward(module, h, e, block, config.rms_norm_eps)
    return h_1[0, -1] @ params["lm_head.weight"].T


def naive(
    params: Params, ids: np.ndarray, n: int, config: Config = CONFIG
) -> tuple[list[int], int, int, int]:
    """Greedy speculation without a cache: text, trunk passes, drafts, kept ones."""

    def states(text: list[int]) -> tuple[np.ndarray, np.ndarray]:
        logits, saved = model.forward(params, config, np.array([text]))
        return logits[0].argmax(-1), model.hidden_states(saved)

    text = ids[0].tolist()
    text.append(int(states(text)[0][-1]))
    passes, drafts, kept, end = 1, 0, 0, ids.shape[1] + n
    while len(text) < end:
        passes += 1
        best, h = states(text)
        if end - len(text) == 1:
            return [*text, int(best[-1])], passes, drafts, kept
        draft = int(draft_logits(params, config, h[:, :-1], text).argmax())
        drafts += 1
        text.append(int(best[-1]))
        if draft == text[-1]:
            kept += 1
            text.append(int(states(text)[0][-1]))
    return text, passes, drafts, kept


def test_the_counts_are_those_of_a_loop_without_caches(trained) -> None:
    """Wrong pairs, a stale cache or a wrong position would draft other tokens."""
    for params in (untrained(), trained):
        for ids in prompts(15):
            *_, (_, counts) = generation.speculate(params, CONFIG, ids, 20)
            text, passes, drafts, kept = naive(params, ids, 20)
            new = generation.generate(params, CONFIG, ids, 20, speculative=True)
            assert new[0].tolist() == text[ids.shape[1] :]
            assert counts == generation.Speculation(passes, 20, drafts, kept)


def test_counts_add_up(trained) -> None:
    """Each pass of the trunk gives one token, and one more for a draft that is kept."""
    for sampling in ({}, {"temperature": 1.0, "seed": 2}):
        steps = list(
            generation.speculate(trained, CONFIG, prompts(1)[0], 31, **sampling)
        )
        tokens = 0
        for number, (new, counts) in enumerate(steps, start=1):
            tokens += new.shape[1]
            assert new.shape in ((1, 1), (1, 2))
            assert counts.tokens == tokens == counts.trunk_passes + counts.accepted
            assert counts.trunk_passes == number
        assert counts.tokens == 31
        assert counts.tokens_per_pass == 31 / counts.trunk_passes > 1
        assert counts.acceptance == counts.accepted / counts.drafts
    assert np.isnan(last_counts(trained, prompts(1)[0], 2).acceptance)


# --- the law ------------------------------------------------------------------------

FOUR = dataclasses.replace(
    CONFIG, vocab_size=4, hidden_size=8, intermediate_size=8, qk_rope_head_dim=4
)
DRAWS, BATCH = 24_000, 4


def deviation(counts: np.ndarray, law: np.ndarray) -> float:
    """How many standard deviations χ² is above what the law makes one expect."""
    expected = law * counts.sum()
    assert counts[law == 0].sum() == 0, "a token without probability was drawn"
    cells = expected >= 5
    chi2 = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    dof = cells.sum() - 1
    return float((chi2 - dof) / (2 * dof) ** 0.5)


def joint_law(params: Params, ids: np.ndarray, temperature: float, top_p: float):
    """Of the next three tokens, by the chain rule, each law written out."""
    V = FOUR.vocab_size

    def law(text: np.ndarray) -> np.ndarray:
        logits, _ = model.forward(params, FOUR, text[None])
        w = np.exp(logits[0, -1] / temperature)
        w /= w.sum()
        kept, total = np.zeros(V), 0.0
        for i in sorted(range(V), key=lambda i: -w[i]):
            if total < top_p:
                kept[i], total = w[i], total + w[i]
        return kept / kept.sum()

    joint = np.zeros((V, V, V))
    for x in range(V):
        for y in range(V):
            text = np.append(ids[0], [x, y])
            joint[x, y] = law(ids[0])[x] * law(text[:-1])[y] * law(text)
    return joint


def check_sampled_law(
    temperature: float = 1.0, top_p: float = 1.0, draws: int = DRAWS
) -> float:
    """χ² of the joint law of three tokens: one plain, then draft, verdict and bonus.

    Returns the share of drafts that were kept.
    """
    params, ids = untrained(FOUR, seed=4), np.array([[0, 2, 3]])
    counts, accepted, drafts = np.zeros((4, 4, 4)), 0, 0
    for seed in range(draws // BATCH):
        batch = np.repeat(ids, BATCH, axis=0)
        steps = list(
            generation.speculate(params, FOUR, batch, 3, temperature, top_p, seed)
        )
        text = np.concatenate([new for new, _ in steps], axis=1)
        np.add.at(counts, tuple(text.T), 1)
        accepted += steps[-1][1].accepted
        drafts += steps[-1][1].drafts
    assert 0.2 < accepted / drafts < 0.9
    assert abs(deviation(counts, joint_law(params, ids, temperature, top_p))) < 4
    return accepted / drafts


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_sampled_tokens_follow_the_joint_law(temperature, top_p) -> None:
    check_sampled_law(temperature, top_p)


def laws(seed: int = 0, V: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(V), 2)
    q[1] = p[4] = 0  # a token that only one of them has
    return p / p.sum(), q / q.sum()


def check_verdict(n: int = 100_000) -> None:
    """The rule alone: p's law comes out, whatever q was, and Σ min(p, q) are kept."""
    for seed in range(3):
        p, q = laws(seed)
        rng = np.random.default_rng(seed)
        P, Q = np.repeat([p], n, 0), np.repeat([q], n, 0)
        draft = rng.choice(len(q), n, p=q)
        kept, token = mtp.accept(P, Q, draft, rng)
        assert abs(deviation(np.bincount(token, minlength=len(p)), p)) < 4
        share = np.minimum(p, q).sum()
        assert kept.mean() == pytest.approx(share, abs=4 * (0.25 / n) ** 0.5)
        np.testing.assert_array_equal(token[kept], draft[kept])


def test_the_verdict_leaves_the_law_as_it_is() -> None:
    check_verdict()


def test_the_verdict_on_certain_laws_is_a_comparison() -> None:
    eye = np.eye(3)
    kept, token = mtp.accept(
        eye[[0, 1, 2]], eye[[0, 2, 2]], np.array([0, 2, 2]), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(kept, [True, False, True])
    np.testing.assert_array_equal(token, [0, 1, 2])


def test_equal_laws_keep_every_draft() -> None:
    p, _ = laws()
    P = np.repeat([p], 1000, 0)
    rng = np.random.default_rng(0)
    kept, _ = mtp.accept(P, P, rng.choice(len(p), 1000, p=p), rng)
    assert kept.all()


def test_the_residual_is_a_law() -> None:
    p, q = laws()
    left = mtp.residual(p[None], q[None])[0]
    assert left.sum() == pytest.approx(1, abs=1e-15)
    beyond = np.array([max(a - b, 0) for a, b in zip(p, q, strict=True)])
    np.testing.assert_allclose(left, beyond / beyond.sum())
    np.testing.assert_array_equal(mtp.residual(p[None], p[None])[0], p / p.sum())


# --- the border ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "draft", "message"),
    [
        ((2, 3), (2, 4), [0, 0], r"shape \(2, 3\) and \(2, 4\)"),
        ((2, 3), (2, 3), [0], r"drafts of shape \(1,\)"),
        ((3,), (3,), 0, r"needs \(B, V\)"),
    ],
)
def test_laws_that_do_not_belong_together(p, q, draft, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mtp.accept(np.ones(p), np.ones(q), np.array(draft), np.random.default_rng(0))


def test_a_draft_that_was_not_drawn_from_its_law() -> None:
    p, q = laws()
    with pytest.raises(ValueError, match="no probability under the law"):
        mtp.accept(p[None], q[None], np.array([1]), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 31}, "33 positions asked for.*32"),
        ({"ids": np.zeros((1, 0), int)}, r"prompt has shape \(1, 0\)"),
        ({"ids": np.full((1, 3), 23)}, "token id 23"),
    ],
)
def test_bad_requests(arguments: dict, message: str) -> None:
    given = {"ids": prompts(3)[2], "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        generation.generate(untrained(), CONFIG, **given, speculative=True)


def test_a_model_without_a_module_cannot_speculate() -> None:
    plain = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    for n in (1, 5):
        with pytest.raises(ValueError, match="generate without speculation"):
            generation.generate(
                untrained(plain), plain, prompts(1)[0], n, speculative=True
            )


def test_a_module_that_is_not_finite_stops_the_text() -> None:
    params = untrained()
    params["model.layers.1.hnorm.weight"][0] = np.nan
    steps = generation.speculate(params, CONFIG, prompts(1)[0], 5)
    next(steps)  # the first token is the trunk's
    with pytest.raises(FloatingPointError, match="layers.1.hnorm.weight holds NaN"):
        next(steps)
