"""The classic mistakes of MTP, planted in the library's source: a test must see each.

Every one has been found in a public implementation. A row names the mistake, the file,
the lines that make it, and the check that fails on it; that the same checks pass on the
right code is what the other tests say.
"""

import inspect
import sys

import pytest

from minidsv3.generation import numpy_ref as generation
from minidsv3.model import numpy_ref as model
from minidsv3.mtp import numpy_ref as mtp
from tests import test_mtp, test_speculation
from tests.planting import plant
from tests.test_speculation import trained  # noqa: F401, a fixture


def losses_and_gradients() -> None:
    test_mtp.test_losses_and_every_gradient_agree_with_autograd(2, 2, 6)


def greedy(params: dict) -> None:
    test_speculation.check_greedy(params, how_many=30)


def greedy_and_short(params: dict) -> None:
    """With room in the context for what is not cropped."""
    test_speculation.check_greedy(params, how_many=30, n=7)


def counts(params: dict) -> None:
    test_speculation.test_the_counts_are_those_of_a_loop_without_caches(params)


def sampled() -> None:
    test_speculation.check_sampled_law(draws=8_000)


def sampled_coldly() -> float:
    return test_speculation.check_sampled_law(0.8, 0.9, draws=8_000)


TRAINING = {
    "concat order reversed": (
        mtp, [("[e_hat, h_hat]", "[h_hat, e_hat]")], losses_and_gradients),
    "logits from the projection's input": (
        mtp, [("x, saved_block = block.forward(params, h_prime)",
               "x, saved_block = h_prime, block.forward(params, h_prime)[1]")],
        losses_and_gradients),
    "hidden state from before the final norm": (
        model, [("return saved[1][0]", "return saved[0][2][0]")],
        losses_and_gradients),
    "targets shifted by one instead of two": (
        mtp, [("return ids[:, k + 1 :]", "return ids[:, k:-1]")],
        losses_and_gradients),
    "no shared_head.norm": (
        mtp, [("return h_k, (*saved,", "return x, (*saved,")], losses_and_gradients),
    "λ reversed": (
        mtp, [("if step - 1 < EARLY", "if step - 1 >= EARLY")],
        test_mtp.test_the_weight_falls_after_ten_of_every_14_8_steps),
    "λ not divided by the depths": (
        model, [("train_config.mtp_weight / D", "train_config.mtp_weight")],
        losses_and_gradients),
    "trunk detached": (
        model, [("(dlogits, saved, dh, alpha)", "(dlogits, saved, 0, alpha)")],
        losses_and_gradients),
    "chain detached": (
        mtp, [("mtp_backward(dstates[k - 1] + dh,", "mtp_backward(dstates[k - 1],")],
        losses_and_gradients),
    "embedding copied": (
        model, [("embedding_backward(de, saved_embed)",
                 "0 * embedding_backward(de, saved_embed)")], losses_and_gradients),
    "head copied": (
        model, [('"lm_head.weight": sum(dW_heads)',
                 '"lm_head.weight": 0 * sum(dW_heads)')], losses_and_gradients),
    "head's gradient of the first depth only": (
        model, [("sum(dW_heads)", "dW_heads[0]")], losses_and_gradients),
    "every depth reads the trunk: parallel heads": (
        mtp, [("mtp_forward(params, h[:, :-1], e[:, k:]",
               "mtp_forward(params, h[:, : e.shape[1] - k], e[:, k:]"),
              ("        states.append(h)", "        states.append(h)\n        h = h_0"),
              ("    states, saved = [], []\n",
               "    states, saved, h_0 = [], [], h\n")], losses_and_gradients),
    "the module sees the token it predicts": (
        model, [("e, saved_embed = embedding_forward(ids[:, :-1],",
                 "e, saved_embed = embedding_forward(ids[:, 1:],")],
        losses_and_gradients),
    "the training loop forgets the schedule": (
        sys.modules["minidsv3.training.numpy_ref"],
        [("config, ids, now)", "config, ids, c)")],
        test_mtp.test_training_uses_the_weight_of_its_step),
}  # fmt: skip

CROP = ("cache.crop(n)", "pass")
INVARIANT = (
    "assert mtp_cache.length == n - 1 and {c.length for c in caches} == {n - 1}",
    "pass",
)
BONUS = ("bonus = draw(law(logits[:, 1])", "bonus = draw(law(logits[:, 0])")
JUDGE = "accept(law(logits[:, 0]), q, draft, rng)"
VERDICT = "rng.random(len(draft)) * q[rows, draft] < p[rows, draft]"
DECODING = {
    "main cache not cropped: the invariant": (generation, [CROP], greedy),
    "main cache not cropped: the text": (
        generation, [CROP, INVARIANT, (" - 1  # as without", " + 20  # as without")],
        greedy_and_short),
    "bonus token from p0": (
        generation, [BONUS], greedy),
    "every draft kept": (
        mtp, [(VERDICT, "np.ones(len(draft), bool)")], greedy),
    "the discarded state is fed": (
        generation, [("h[:, :1]", "h[:, 1:]")], counts),
    "the module's cache is cropped too": (
        generation, [INVARIANT, ("            for cache in caches:",
                      "            for cache in [*caches, mtp_cache]:"),
                     ("cache.crop(n)", "cache.crop(min(n, cache.length) - 1 + "
                      "(cache is not mtp_cache))")], counts),
    "bonus token from p0, sampled": (
        generation, [BONUS], sampled),
    "a rejected draft is replaced by a draw from p": (
        mtp, [("draw(residual(p, q), rng)", "draw(p, rng)")], sampled),
    "residual without its positive part": (
        mtp, [("np.maximum(p - q, 0.0)", "np.abs(p - q)")], sampled),
    "kept with probability p[d], as if q were certain": (
        mtp, [(VERDICT, "rng.random(len(draft)) < p[rows, draft]")], sampled),
    "the ratio upside down": (
        mtp, [(VERDICT, "rng.random(len(draft)) * p[rows, draft] < q[rows, draft]")],
        sampled),
    "residual not renormalised": (
        mtp, [("return beyond / beyond.sum(axis=-1, keepdims=True)",
               "return beyond")], test_speculation.test_the_residual_is_a_law),
    "p at another temperature than the text": (
        generation, [(JUDGE, "accept(next_token_law(logits[:, 0], 1.0, top_p), q, "
                      "draft, rng)")], sampled_coldly),
    "p without top-p": (
        generation, [(JUDGE, "accept(next_token_law(logits[:, 0], temperature), q, "
                      "draft, rng)")], sampled_coldly),
    "q at another temperature than the draft": (
        generation, [(JUDGE, "accept(law(logits[:, 0]), next_token_law(z, 1.0), draft, "
                      "rng)")], sampled_coldly),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TRAINING)
def test_mistakes_of_training_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = TRAINING[mistake]
    check()
    plant(monkeypatch, module, *lines)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("mistake", DECODING)
def test_mistakes_of_decoding_are_seen(mistake: str, monkeypatch, trained) -> None:  # noqa: F811
    module, lines, check = DECODING[mistake]
    arguments = (trained,) if inspect.signature(check).parameters else ()
    check(*arguments)
    plant(monkeypatch, module, *lines)
    with pytest.raises(AssertionError):
        check(*arguments)


def test_a_warmer_draft_leaves_the_law_exact(monkeypatch) -> None:
    """q may have any temperature if the draft is drawn from it: the law stays exact.

    Here it costs drafts. So "p and q through the same temperature" is two rules:
    the one that the law needs (above), and this one.
    """
    usual = sampled_coldly()
    lines = ("q = law(z)", "q = next_token_law(z, 3 * temperature)")
    plant(monkeypatch, generation, lines)
    assert sampled_coldly() < usual - 0.02
