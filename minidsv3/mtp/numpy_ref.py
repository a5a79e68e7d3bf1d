r"""MTP in NumPy: one module, the chain of D modules, λ, and the verdict on a draft.

A module is handed its block: two functions, forward and backward, so that it does not
care what attention and feed-forward are made of. Parameters come under the names
``enorm.weight``, ``hnorm.weight``, ``eh_proj.weight``, ``shared_head.norm.weight``, and
the block's own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minidsv3.config import TrainConfig
from minidsv3.primitives.numpy_ref import (
    draw,
    linear_backward,
    linear_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)

Array = np.ndarray
Params = dict[str, Array]

# λ falls after this part of training: 10T of 14.8T tokens (report, section 4.2, p. 23).
EARLY = 10 / 14.8


class Block(NamedTuple):
    """A transformer block, as two functions: what a module is handed."""

    forward: Callable[[Params, Array], tuple[Array, tuple]]  # (params, x) -> y, saved
    backward: Callable[[Array, tuple], tuple[Array, Params]]  # (dy, saved) -> dx, grads


# --- the module ---------------------------------------------------------------------


def mtp_forward(
    params: Params, h: Array, e: Array, block: Block, eps: float
) -> tuple[Array, tuple]:
    r"""Module k: from :math:`h^{k-1}_i` and Emb(:math:`t_{i+k}`) to :math:`h^k_i`.

    Eqs. (21) and (22) of the DeepSeek-V3 report (section 2.2, p. 10), in the order of
    the released weights: the first D columns of eh_proj act on the embedding. h comes
    from after the final norm at k = 1. The answer has passed ``shared_head.norm``: it
    is what the shared head reads, and what module k + 1 takes. The report is silent on
    both. Transformers chains its modules so, and only so is every :math:`h^k`, as
    :math:`h^0` is, the state that OutHead reads in eq. (23). But DeepSeek has released
    D = 1 alone, where no state is chained: for D > 1 this stays unconfirmed.

    Shapes: h, e (B, T, D) -> (B, T, D). Raises ValueError if h and e differ in shape.
    """
    if h.shape != e.shape:
        raise ValueError(
            f"mtp: hidden states {h.shape} and embeddings {e.shape} must have one "
            "shape: give each position i the token i + k"
        )
    e_hat, saved_enorm = rmsnorm_forward(e, params["enorm.weight"], eps)
    h_hat, saved_hnorm = rmsnorm_forward(h, params["hnorm.weight"], eps)
    joined = np.concatenate([e_hat, h_hat], axis=-1)  # (B, T, 2*D)
    h_prime, saved_proj = linear_forward(joined, params["eh_proj.weight"])
    x, saved_block = block.forward(params, h_prime)
    h_k, saved_norm = rmsnorm_forward(x, params["shared_head.norm.weight"], eps)
    saved = (saved_enorm, saved_hnorm, saved_proj, saved_block, saved_norm)
    return h_k, (*saved, block.backward)


def mtp_backward(dh_k: Array, saved: tuple) -> tuple[Array, Array, Params]:
    """Gradients of a module: its lines in reverse.

    dh goes on into the trunk, or the module before, and de into the embedding. Neither
    is cut off. Returns dh, de (B, T, D) and the gradients under the parameters' names.
    """
    saved_enorm, saved_hnorm, saved_proj, saved_block, saved_norm, block_back = saved
    dx, dg_norm = rmsnorm_backward(dh_k, saved_norm)
    dh_prime, grads_block = block_back(dx, saved_block)
    djoined, dW_eh = linear_backward(dh_prime, saved_proj)
    de_hat, dh_hat = np.split(djoined, 2, axis=-1)  # (B, T, D), (B, T, D)
    dh, dg_h = rmsnorm_backward(dh_hat, saved_hnorm)
    de, dg_e = rmsnorm_backward(de_hat, saved_enorm)
    grads = {
        "enorm.weight": dg_e,
        "hnorm.weight": dg_h,
        "eh_proj.weight": dW_eh,
        **grads_block,
        "shared_head.norm.weight": dg_norm,
    }
    return dh, de, grads


def saved_block(saved: tuple) -> tuple:
    """What the block saved, inside what `mtp_forward` saved."""
    return saved[3]


# --- the chain ----------------------------------------------------------------------


def check_depths(ids: Array, depths: int) -> None:
    """Raise ValueError if ids (B, T+1) leave the deepest module nothing to predict."""
    T = ids.shape[1] - 1
    if depths + 1 > T:
        raise ValueError(
            f"ids of shape {ids.shape}: {T} positions to read, but {depths} modules of "
            f"multi-token prediction need {depths + 1} at least; give longer sequences"
        )


def targets(ids: Array, k: int) -> Array:
    r"""What depth k predicts: :math:`t_{i+k+1}` for i = 1 … T - k.

    Of ids (B, T+1), depth 0 (the main model) predicts all but the first. Each depth
    loses one more at the front. Shapes: (B, T+1) -> (B, T-k).
    """
    return ids[:, k + 1 :]


def chain_forward(
    modules: Sequence[Params], h: Array, e: Array, block: Block, eps: float
) -> tuple[list[Array], list[tuple]]:
    r"""All depths: from h (B, T, D) to :math:`h^1 … h^D`, each (B, T-k, D).

    e (B, T, D) embeds :math:`t_1 … t_T`. Depth k reads the states i = 1 … T - k, so all
    but the last of those before it, and the tokens i + k, so e from its row k on.
    """
    states, saved = [], []
    for k, params in enumerate(modules, start=1):
        h, saved_k = mtp_forward(params, h[:, :-1], e[:, k:], block, eps)
        states.append(h)
        saved.append(saved_k)
    return states, saved


def chain_backward(
    dstates: Sequence[Array], saved: Sequence[tuple]
) -> tuple[Array, Array, list[Params]]:
    """Gradients of the chain, given those that the head sends to each state.

    Depth k hears from its own head and from depth k + 1; the last state of each depth
    was read by its head alone and gets a zero from the next. Returns dh, de (B, T, D),
    and one table of gradients a module.
    """
    B, n, D = dstates[0].shape
    de = np.zeros((B, n + 1, D), dstates[0].dtype)  # (B, T, D)
    dh = np.zeros_like(dstates[-1])  # nothing stands behind the deepest module
    grads = []
    for k in range(len(saved), 0, -1):
        dh, de_k, grads_k = mtp_backward(dstates[k - 1] + dh, saved[k - 1])
        dh = np.pad(dh, [(0, 0), (0, 1), (0, 0)])  # (B, T - k + 1, D)
        de[:, k:] += de_k
        grads.append(grads_k)
    return dh, de, grads[::-1]


# --- the weight of the losses -------------------------------------------------------


def mtp_weight(step: int, train_config: TrainConfig) -> float:
    """λ of optimiser step 1, 2, …: large first, then small.

    ``mtp_weight`` for the first 10/14.8 of the steps, then ``mtp_weight_final``: 0.3
    for 10T tokens and 0.1 for the other 4.8T in DeepSeek-V3 (section 4.2, p. 23). The
    step that the border falls into still counts as early.
    """
    c = train_config
    return c.mtp_weight if step - 1 < EARLY * c.steps else c.mtp_weight_final


# --- speculative decoding -----------------------------------------------------------


def residual(p: Array, q: Array) -> Array:
    r"""The law after a rejection: :math:`\max(p - q, 0)`, normalised. (B, V) -> (B, V).

    It holds what p has beyond the draft's law q. Where p equals q, rejection never
    happens, and p is returned.
    """
    beyond = np.maximum(p - q, 0.0)  # (B, V)
    beyond = np.where(beyond.any(axis=-1, keepdims=True), beyond, p)  # (B, V)
    return beyond / beyond.sum(axis=-1, keepdims=True)


def accept(
    p: Array, q: Array, draft: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    r"""Keep a drafted token or replace it, so that the token's law is p exactly.

    The draft d was drawn from q. It is kept with probability min(1, p[d] / q[d]), else
    a token is drawn from `residual`. Token x then has probability
    :math:`\min(p_x, q_x) + (p_x - q_x)^+ = p_x`, and
    :math:`\sum_x \min(p_x, q_x)` of the drafts are kept. Greedy decoding is the case of
    laws with one possible token: kept if equal, else p's token. q must be the law that
    the draft was drawn from; most are kept if p and q have gone through the same
    temperature and top-p. (Leviathan et al., arXiv 2211.17192.)

    Shapes: p, q (B, V), draft (B,) -> accepted (B,), token (B,). Raises ValueError for
    shapes that differ and for a draft that q cannot have drawn.
    """
    if p.shape != q.shape or p.ndim != 2 or draft.shape != p.shape[:1]:
        raise ValueError(
            f"accept: laws of shape {p.shape} and {q.shape}, drafts of shape "
            f"{draft.shape}; needs (B, V), (B, V) and (B,)"
        )
    rows = np.arange(len(draft))
    if not (q[rows, draft] > 0).all():
        raise ValueError("accept: a draft has no probability under the law it is from")
    accepted = rng.random(len(draft)) * q[rows, draft] < p[rows, draft]  # (B)
    return accepted, np.where(accepted, draft, draw(residual(p, q), rng))
