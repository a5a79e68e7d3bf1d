"""The classic mistakes of MoE, planted in the library's source: a test must see each.

Most have been found in public implementations. A row names the mistake, the file, the
lines that make it, and the check that fails on it.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest

from minidsv3.model import numpy_ref as model
from minidsv3.moe import numpy_ref as moe
from minidsv3.training import numpy_ref as training
from tests import test_moe, test_moe_model
from tests.planting import plant


def gradients() -> None:
    test_moe.check_gradients(test_moe.layer(B=2, T=2))


def whole_model() -> None:
    test_moe_model.check_model(test_moe_model.with_modules(1), 2, 3)


routing = partial(test_moe.test_routing_is_that_of_a_loop_over_tokens, "whole breadth")
negative_biases = partial(
    test_moe.test_routing_is_that_of_a_loop_over_tokens,
    "whole breadth, negative biases",
)
answers = partial(
    test_moe.test_the_layer_is_that_of_a_loop_over_tokens, "TINY's experts"
)
same_twice = test_moe.test_the_same_question_has_the_same_answer
no_tokens = test_moe.test_an_expert_without_tokens_has_zero_gradients
eq_18 = test_moe.test_neither_bias_nor_groups_enter_the_balance_loss
rule = partial(test_moe.test_the_bias_moves_against_the_load_by_its_speed, np.float64)
controller = test_moe.test_the_controller_balances_a_skewed_router
causality = test_moe_model.test_no_position_sees_the_future
evaluation = test_moe_model.test_a_model_that_is_used_keeps_its_biases
training_loop = test_moe_model.test_training_moves_the_biases_by_their_speed

SIGMOID = "    s = sigmoid(z)\n"
HALF = (
    "    import ml_dtypes\n"
    "    s = sigmoid(z.astype(ml_dtypes.bfloat16).astype(z.dtype))\n"
)
CHOSEN = "chosen = np.take_along_axis(s, experts, axis=-1)  # (N, K)\n    shares ="
SHARES = "shares = chosen / (chosen.sum(axis=-1, keepdims=True) + 1e-20)"
MASKED = "np.where(shut, -np.inf, choice)"
TWO_BEST = "np.partition(grouped, -2, axis=-1)[..., -2:].sum(axis=-1)"
ROUTER = {
    "bias leaking into the gates": (
        moe, [(CHOSEN, CHOSEN.replace("(s,", "(s + params[BIAS],"))], routing),
    "bias forgotten": (
        moe, [("choose(s + params[BIAS], config)", "choose(s, config)")], answers),
    "softmax instead of sigmoid": (
        moe, [(SIGMOID, "    s = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)\n")],
        answers),
    "softmax over the chosen": (
        moe, [(SHARES, "shares = np.exp(chosen)\n"
               "    shares /= shares.sum(axis=-1, keepdims=True)")], routing),
    "closed groups masked with 0": (
        moe, [(MASKED, "np.where(shut, 0.0, choice)")], negative_biases),
    "closed groups not masked": (
        moe, [(MASKED, "choice")], routing),
    "group score = max": (
        moe, [(TWO_BEST, "grouped.max(axis=-1)")], routing),
    "group score = sum of all": (
        moe, [(TWO_BEST, "grouped.sum(axis=-1)")], routing),
    "groups of every M-th expert instead of neighbours": (
        moe, [("choice.reshape(len(choice), n_group, -1)",
               "choice.reshape(len(choice), -1, n_group).swapaxes(1, 2)")], routing),
    "normalised over all experts": (
        moe, [(SHARES, "shares = chosen / s.sum(axis=-1, keepdims=True)")], routing),
    "not normalised": (
        moe, [(SHARES, "shares = chosen")], routing),
    "2.5 forgotten": (
        moe, [("config.routed_scaling_factor * shares", "shares")], routing),
    "of equals the last wins": (
        moe, [("scores.argmax(axis=-1, keepdims=True)",
               "scores.shape[-1] - 1 - scores[..., ::-1].argmax(-1, keepdims=True)")],
        test_moe.test_equal_scores_choose_the_first_of_the_first_groups),
    "router in half precision": (
        moe, [(SIGMOID, HALF)], test_moe.test_float32_chooses_like_float64),
    "scores in the precision of the states": (
        moe, [("    u = u.astype(np.result_type(u, np.float32), copy=False)\n", ""),
              ('params["gate.weight"])  # (N, E)',
               'params["gate.weight"].astype(u.dtype))')],
        test_moe.test_half_precision_scores_in_full),
    "router noise at evaluation": (
        moe, [(SIGMOID, "    s = sigmoid(z + 0.1 * np.random.normal(size=z.shape))\n")],
        same_twice),
}  # fmt: skip

WEIGHED = 'y = np.einsum("nk,nkd->nd", routing.gates, answers)'
SHARED = "return y + y_shared, saved"
BACK = "    answers[order.pairs] = o\n"
GATHER = "x = u[order.pairs // K]  # (P, D)\n    W_gate"
LAYER = {
    "capacity dropping: two tokens an expert": (
        moe, [(BACK, "    starts = np.repeat(order.starts[:-1], np.diff(order.starts))"
               f"\n    o[np.arange(len(o)) - starts >= 2] = 0\n{BACK}")], answers),
    "capacity dropping: a later token evicts an earlier one": (
        moe, [(WEIGHED, "rank = np.argsort(np.argsort(-routing.gates[:, 0]))\n"
               f"    answers[rank >= 6] = 0\n    {WEIGHED}")], causality),
    "shared expert gated": (
        moe, [(SHARED, "return y + y_shared * sigmoid(u[..., :1]), saved")], answers),
    "shared expert scaled with the routed ones": (
        moe, [(SHARED, "return y + config.routed_scaling_factor * y_shared, saved")],
        answers),
    "shared expert missing": (
        moe, [(SHARED, "return y, saved")], answers),
    "the layer adds the stream, which the block adds again": (
        moe, [(SHARED, "return u + y + y_shared, saved")], answers),
    "answers left in the order of experts": (
        moe, [(BACK, "    answers[:] = o\n")], answers),
    "gates applied before the expert": (
        moe, [(WEIGHED, "y = answers.sum(axis=1)"),
              (GATHER, "x = u[order.pairs // K] * "
               "routing.gates.reshape(-1, 1)[order.pairs]\n    W_gate")], answers),
    "an expert's tokens backwards": (
        moe, [('np.argsort(keys, kind="stable")',
               'len(flat) - 1 - np.argsort(keys[::-1], kind="stable")')],
        test_moe.test_pairs_are_sorted_by_expert),
}  # fmt: skip

SEQUENCES = "return affinities, routing.experts.shape[1]"
GRADIENTS = {
    "mean not subtracted": (
        moe, [("(dgates - mean)", "dgates")], gradients),
    "scaling factor missing in the router": (
        moe, [("scale / total * (dgates", "1 / total * (dgates")], gradients),
    "sigmoid missing in the router": (
        moe, [("(ds + daffinities) * s * (1 - s)", "(ds + daffinities)")], gradients),
    "a gate's gradient weighed with the gate": (
        moe, [('dgates = np.einsum("nd,nkd->nk", dy, answers)',
               'dgates = routing.gates * np.einsum("nd,nkd->nk", dy, answers)')],
        gradients),
    "the gate does not weigh what its expert hears": (
        moe, [("do = weights * dy", "do = dy")], gradients),
    "du not summed over K": (
        moe, [("dx.reshape(N, K, -1).sum(axis=1)", "dx.reshape(N, K, -1)[:, 0]")],
        gradients),
    "du left in the order of experts": (
        moe, [("dx[order.pairs] = dx_up", "dx[:] = dx_up")], gradients),
    "du of one branch": (
        moe, [("dx_up + dx_gate", "dx_up")], gradients),
    "router's du missing": (
        moe, [("(du + du_router)", "du")], gradients),
    "shared expert's du missing": (
        moe, [("du = du + du_shared", "pass")], gradients),
    "shared expert's weights not trained": (
        moe, [("grads |= prefixed(", "prefixed(")], gradients),
    "dW of an expert without tokens left as memory was": (
        moe, [("    dW[np.diff(starts) == 0] = 0\n", "")], no_tokens),
    "the bias gets a gradient": (
        moe, [('grads = {"gate.weight": dW_router, **grads}',
               'grads = {"gate.weight": dW_router, BIAS: dW_router[:, 0], **grads}')],
        gradients),
    "balance gradient missing": (
        moe, [("    if dbalance:", "    if False:")], gradients),
    "balance gradient without the sigmoid": (
        moe, [("(ds + daffinities) * s * (1 - s)", "ds * s * (1 - s) + daffinities")],
        gradients),
    "balance gradient without the shares' sum": (
        moe, [("(f - mean) / total", "f / total")], gradients),
    "balance gradient of the chosen only": (
        moe, [("dz = (ds + daffinities)", "dz = (ds + daffinities * (ds != 0))")],
        gradients),
    "balance gradient summed over sequences": (
        moe, [("dloss / (B * T)", "dloss / T")], gradients),
}  # fmt: skip

BALANCE = {
    "f counts where tokens went: bias and groups": (
        moe, [(SEQUENCES, SEQUENCES + ", routing.experts"),
              ("balance_forward(affinities: Array, K: int)",
               "balance_forward(affinities: Array, K: int, experts=None)"),
              ("best = top(affinities, K).reshape", "best = (top(affinities, K) "
               "if experts is None else experts).reshape")], eq_18),
    "bias in the affinities": (
        moe, [("routed_scaling_factor * shares, s)",
               "routed_scaling_factor * shares, s + params[BIAS])")], eq_18),
    "the batch as one sequence": (
        moe, [("    B, T, E = affinities.shape\n    best",
               "    affinities = affinities.reshape(1, -1, affinities.shape[-1])\n"
               "    B, T, E = affinities.shape\n    best")],
        test_moe.test_the_balance_loss_is_taken_sequence_by_sequence),
    "f not scaled with E / K": (
        moe, [("(E / (K * T))", "(1 / T)")],
        partial(test_moe.test_perfect_balance_costs_one, 8, 3)),
    "P of raw affinities": (
        moe, [("shares = affinities / total", "shares = affinities + 0 * total")],
        partial(test_moe.test_perfect_balance_costs_one, 8, 3)),
    "α missing in the total": (
        model, [("total += alpha * values[-1]", "total += values[-1]")], whole_model),
    "α missing on the way back": (
        model, [("(dlogits, saved, dh, alpha)", "(dlogits, saved, dh)")], whole_model),
    "α missing on the way back through the module": (
        model, [("_mtp_block(config, h.dtype, dbalance=dbalance)",
                 "_mtp_block(config, h.dtype)")], whole_model),
    "load of half the batch": (
        model, [("moe.load(moe.routing(saved).experts, E)",
                 "moe.load(moe.routing(saved).experts[::2], E)")], whole_model),
    "load of the first choice only": (
        model, [("moe.load(moe.routing(saved).experts, E)",
                 "moe.load(moe.routing(saved).experts[:, :1], E)")], whole_model),
}  # fmt: skip

SIGN = "np.sign(counts.mean() - counts)"
ROUTED = "    routing, saved_route = route_forward(params, rows, config)\n"
MOVE = "bias[:] = update_bias("
BIASES = {
    "bias updated at evaluation": (
        moe, [(ROUTED, ROUTED + "    counts = load(routing.experts, len(params[BIAS]))"
               "\n    params[BIAS][:] = update_bias(params[BIAS], counts, 1e-3)\n")],
        evaluation),
    "wrong sign": (
        moe, [(SIGN, "np.sign(counts - counts.mean())")], rule),
    "wrong sign, by what becomes of the load": (
        moe, [(SIGN, "np.sign(counts - counts.mean())")], controller),
    "by the size of the violation": (
        moe, [(SIGN, "(counts.mean() - counts) / counts.mean()")], rule),
    "against the median": (
        moe, [(SIGN, "np.sign(np.median(counts) - counts)")], rule),
    "not above its share, so raised": (
        moe, [(SIGN, "np.where(counts > counts.mean(), -1, 1)")], rule),
    "multiplied instead of added": (
        moe, [("return bias + (speed", "return bias * (1 + speed")], rule),
    "in float64 whatever the bias is": (
        moe, [(").astype(bias.dtype)", ").astype(np.float64)")],
        partial(rule.func, np.float32)),
    "never moved": (
        training, [(MOVE, "bias = update_bias(")], training_loop),
    "the module's router forgotten": (
        training, [('in stats.get("load", {}).items():',
                    'in list(stats.get("load", {}).items())[:-1]:')], training_loop),
    "decayed like a weight": (
        training, [(MOVE, "bias[:] = 0.95 * update_bias(")], training_loop),
    "moved by the learning rate": (
        training, [("counts, train_config.bias_update_speed)",
                    "counts, train_config.learning_rate)")], training_loop),
}  # fmt: skip

MISTAKES = ROUTER | LAYER | GRADIENTS | BALANCE | BIASES


@cache
def passes(check: Callable) -> bool:
    """Run a check on the right code: once is enough."""
    check()
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = MISTAKES[mistake]
    assert passes(check)
    plant(monkeypatch, module, *lines)
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        check()


ALL_HALF = HALF + "    s = s.astype(ml_dtypes.bfloat16).astype(z.dtype)\n"


@pytest.mark.parametrize(("lines", "share"), [(HALF, 0.036), (ALL_HALF, 0.15)])
def test_half_precision_sends_many_tokens_elsewhere(
    lines: str, share: float, monkeypatch
) -> None:
    """Rounding z to bfloat16 moves 3.6 % of 2,048 tokens, s as well four times that."""
    plant(monkeypatch, moe, (SIGMOID, lines))
    assert test_moe.changed_by_precision() == pytest.approx(share, rel=0.2)
