r"""The model in NumPy: embedding, blocks, final norm, head, and all of it backwards.

The blocks are those of `minidsv3.model.block_numpy_ref`. With
``num_nextn_predict_layers`` the modules of `minidsv3.mtp` are trained too, with
``n_routed_experts`` the load of every expert is counted and balanced.
Parameters are one flat dict under DeepSeek's names (`minidsv3.parameters`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from minidsv3.config import Config, TrainConfig
from minidsv3.model.block_numpy_ref import (
    block_backward,
    block_forward,
    saved_experts,
)
from minidsv3.moe import numpy_ref as moe
from minidsv3.mtp import numpy_ref as mtp
from minidsv3.parameters import blame, check, cut, first_not_finite, prefixed
from minidsv3.primitives.cache import Cache, common_length
from minidsv3.primitives.numpy_ref import (
    cross_entropy_backward,
    cross_entropy_forward,
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_frequencies,
    rope_rotation,
)

Array = np.ndarray
Params = dict[str, Array]


def trunk_forward(
    params: Params, config: Config, ids: Array, caches: Sequence[Cache] | None = None
) -> tuple[Array, tuple]:
    """From token ids (B, T) to hidden states (B, T, D) after the final norm.

    With caches, one a layer, ids continue what the caches hold.
    """
    _, T = ids.shape
    start = 0
    if caches is not None:
        start = common_length(caches, config.num_hidden_layers)
    _check_length(start + T, config)
    x, saved_embed = embedding_forward(ids, params["model.embed_tokens.weight"])
    positions = np.arange(start, start + T)
    rotation = rope_rotation(positions, rope_frequencies(config), x.dtype)
    saved_blocks = []
    for layer in range(config.num_hidden_layers):
        block = cut(params, f"model.layers.{layer}.")
        cache = caches[layer] if caches else None
        x, saved = block_forward(block, x, config, rotation, cache)
        saved_blocks.append(saved)
    h, saved_norm = rmsnorm_forward(x, params["model.norm.weight"], config.rms_norm_eps)
    return h, (saved_embed, saved_blocks, saved_norm)


def trunk_backward(dh: Array, saved: tuple, dbalance: float = 0.0) -> Params:
    """Gradients of everything below the head, under the parameters' names.

    dbalance weighs the balance loss of each layer of experts.
    """
    saved_embed, saved_blocks, saved_norm = saved
    grads: Params = {}
    dx, grads["model.norm.weight"] = rmsnorm_backward(dh, saved_norm)
    for layer in reversed(range(len(saved_blocks))):
        dx, grads_block = block_backward(dx, saved_blocks[layer], dbalance)
        grads |= prefixed(f"model.layers.{layer}.", grads_block)
    grads["model.embed_tokens.weight"] = embedding_backward(dx, saved_embed)
    return grads


def forward(
    params: Params, config: Config, ids: Array, caches: Sequence[Cache] | None = None
) -> tuple[Array, tuple]:
    """Logits of the next token at every position: ids (B, T) -> (B, T, vocab).

    MTP modules are not asked: without them the logits are the same. Raises
    ParameterError for parameters that do not fit the config, ValueError for ids
    that are no integers, lie outside the vocabulary or exceed
    ``max_position_embeddings``, FloatingPointError for logits that are not finite
    (naming the parameter that is not, if one is).
    """
    check(params, config)
    ids = _checked_ids(ids)
    with naming_the_culprit(params):
        h, saved_trunk = trunk_forward(params, config, ids, caches)
        logits, saved_head = linear_forward(h, params["lm_head.weight"])
        _check_finite(logits)
    return logits, (saved_trunk, saved_head)


def backward(
    dlogits: Array,
    saved: tuple,
    dh_further: Array | float = 0.0,
    dbalance: float = 0.0,
) -> Params:
    """Gradients of trunk and head, given that of the logits (B, T, vocab).

    dh_further (B, T, D) is what others who read the hidden states send back to them,
    dbalance the weight of the balance losses.
    """
    saved_trunk, saved_head = saved
    dh, dW_head = linear_backward(dlogits, saved_head)
    dh = dh + dh_further
    return {**trunk_backward(dh, saved_trunk, dbalance), "lm_head.weight": dW_head}


def hidden_states(saved: tuple) -> Array:
    """What the head read, inside what `forward` saved: (B, T, D), after the norm."""
    return saved[1][0]


def saved_blocks(saved: tuple) -> list[tuple]:
    """What each block of the trunk saved, inside what `forward` saved."""
    return saved[0][1]


def routings(saved: tuple) -> list[moe.Routing]:
    """Where each layer of experts sent its tokens, inside what `forward` saved."""
    layers = map(saved_experts, saved_blocks(saved))
    return [moe.routing(layer) for layer in layers if layer is not None]


def loss_and_grads(
    params: Params, config: Config, ids: Array, train_config: TrainConfig
) -> tuple[dict[str, float], Params, dict]:
    """Losses (nats a token), gradients and statistics of one batch.

    ids (B, T+1): the first T columns are read, the last T are predicted. The losses are
    those of `loss_names`: total = main + λ/D · the sum of mtp_1 … mtp_D (DeepSeek-V3
    report, eq. 25) + α · balance, which is the sum of eq. 17 over the layers of
    experts, MTP modules included. λ and α are train_config's ``mtp_weight`` (the
    training loop puts the λ of each step there) and ``balance_weight``. The statistics
    are "load", the tokens that each expert received, by the name of the layer's bias.
    Returns ``(losses, grads, stats)``. Raises ValueError if T is not at least D + 1.
    """
    ids = _checked_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids of shape {ids.shape}: needs two columns at least")
    D, alpha = config.num_nextn_predict_layers, train_config.balance_weight
    mtp.check_depths(ids, D)
    logits, saved = forward(params, config, ids[:, :-1])
    loss, saved_loss = cross_entropy_forward(logits, ids[:, 1:])
    dlogits = cross_entropy_backward(1.0, saved_loss)
    blocks = list(saved_blocks(saved))
    values, dh, grads_mtp = [loss], 0.0, {}
    total = loss
    if D:
        h = hidden_states(saved)
        further, saved_mtp = mtp_losses(params, config, ids, h, alpha)
        weight = train_config.mtp_weight / D
        dh, grads_mtp = mtp_losses_backward(weight, saved_mtp, config)
        values += further
        total += weight * sum(further)
        blocks += map(mtp.saved_block, saved_mtp[1])
    layers = [s for s in map(saved_experts, blocks) if s is not None]
    if layers:
        values.append(sum(map(moe.balance_loss, layers)))
        total += alpha * values[-1]
    grads = backward(dlogits, saved, dh, alpha)
    for name, grad in grads_mtp.items():  # embedding and head are shared: they add up
        grads[name] = grads[name] + grad if name in grads else grad
    losses = dict(zip(loss_names(config), [*values, total], strict=True))
    return losses, grads, expert_loads(config, layers)


def loss_names(config: Config) -> list[str]:
    """The keys of the losses that `loss_and_grads` returns, in their order."""
    balance = ["balance"] if _sparse_blocks(config) else []
    return ["main", *(f"mtp_{k}" for k in _depths(config)), *balance, "total"]


def expert_loads(config: Config, layers: Sequence[tuple]) -> dict:
    """Statistics of what the layers of experts saved: nothing, or {"load": …}.

    The load of a layer, (E,) tokens an expert, stands under the name of its bias, which
    the training loop moves by it.
    """
    if not layers:
        return {}
    E = config.n_routed_experts
    names = [f"model.layers.{n}.mlp.{moe.BIAS}" for n in _sparse_blocks(config)]
    loads = [moe.load(moe.routing(saved).experts, E) for saved in layers]
    return {"load": dict(zip(names, loads, strict=True))}


def _sparse_blocks(config: Config) -> list[int]:
    """The blocks with experts, the MTP modules' too; perhaps all are dense."""
    blocks = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return [n for n in blocks if config.is_moe_layer(n)]


# --- multi-token prediction ---------------------------------------------------------


def mtp_losses(
    params: Params, config: Config, ids: Array, h: Array, dbalance: float = 0.0
) -> tuple[list[float], tuple]:
    """Losses L^1 … L^D of the MTP modules, from the trunk's h (B, T, D): eqs. 21-24.

    The embedding is looked up a second time, and the head reads each depth's states:
    both are the trunk's own. Depth k averages over its T - k targets. dbalance is the
    weight that the balance loss of a module's experts will have on the way back.
    """
    e, saved_embed = embedding_forward(ids[:, :-1], params["model.embed_tokens.weight"])
    modules = [_module(params, config, k) for k in _depths(config)]
    block = _mtp_block(config, h.dtype, dbalance=dbalance)
    losses, saved_heads = [], []
    with naming_the_culprit(params):
        states, saved_chain = mtp.chain_forward(
            modules, h, e, block, config.rms_norm_eps
        )
        for k, h_k in enumerate(states, start=1):
            logits, saved_head = linear_forward(h_k, params["lm_head.weight"])
            _check_finite(logits)
            loss, saved_loss = cross_entropy_forward(logits, mtp.targets(ids, k))
            losses.append(loss)
            saved_heads.append((saved_head, saved_loss))
    return losses, (saved_embed, saved_chain, saved_heads)


def mtp_losses_backward(
    dloss: float, saved: tuple, config: Config
) -> tuple[Array, Params]:
    """Gradients of the further losses, each weighed with dloss (λ / D).

    Returns dh (B, T, D), which flows on into the whole trunk, and the gradients of the
    modules, of the head (a sum over depths) and of the embedding.
    """
    saved_embed, saved_chain, saved_heads = saved
    dstates, dW_heads = [], []
    for saved_head, saved_loss in saved_heads:
        dlogits = cross_entropy_backward(dloss, saved_loss)
        dh_k, dW_head = linear_backward(dlogits, saved_head)
        dstates.append(dh_k)
        dW_heads.append(dW_head)
    dh, de, grads_modules = mtp.chain_backward(dstates, saved_chain)
    grads = {
        "lm_head.weight": sum(dW_heads),
        "model.embed_tokens.weight": embedding_backward(de, saved_embed),
    }
    for k, grads_module in zip(_depths(config), grads_modules, strict=True):
        grads |= prefixed(_module_prefix(config, k), grads_module)
    return dh, grads


def mtp_step(
    params: Params, config: Config, h: Array, ids: Array, cache: Cache
) -> Array:
    """Logits of module 1 for drafting: it reads the pairs (h_i, t_{i+1}).

    h (B, T, D) are `hidden_states`, ids (B, T) the tokens one place further on; the
    logits (B, T, vocab) at i are for t_{i+2}. The pairs continue what the cache holds,
    which is the module's own. Raises ValueError for a model without modules and for
    ids outside the vocabulary, FloatingPointError for logits that are not finite.
    """
    check(params, config)
    with naming_the_culprit(params):
        h_1 = mtp_states(params, config, h, ids, cache)
        logits, _ = linear_forward(h_1, params["lm_head.weight"])
        _check_finite(logits)
    return logits


def mtp_states(
    params: Params, config: Config, h: Array, ids: Array, cache: Cache
) -> Array:
    """What the head reads of module 1 in `mtp_step`: (B, T, D). Raises likewise."""
    _check_has_module(config)
    ids = _checked_ids(ids)
    _check_length(cache.length + ids.shape[1], config)
    e, _ = embedding_forward(ids, params["model.embed_tokens.weight"])
    block = _mtp_block(config, h.dtype, cache)
    module = _module(params, config, 1)
    h_1, _ = mtp.mtp_forward(module, h, e, block, config.rms_norm_eps)
    return h_1


def _depths(config: Config) -> range:
    return range(1, config.num_nextn_predict_layers + 1)


def _module_prefix(config: Config, k: int) -> str:
    """Module k follows the L layers as block L + k - 1."""
    return f"model.layers.{config.num_hidden_layers + k - 1}."


def _module(params: Params, config: Config, k: int) -> Params:
    return cut(params, _module_prefix(config, k))


def _mtp_block(
    config: Config, dtype: np.dtype, cache: Cache | None = None, dbalance: float = 0.0
) -> mtp.Block:
    """The block of a module, with positions counted from 0 at every depth.

    The token at i stands at i + k, but only differences matter to rotated positions.
    """

    def forward(params: Params, x: Array) -> tuple[Array, tuple]:
        start = cache.length if cache else 0
        positions = np.arange(start, start + x.shape[1])
        rotation = rope_rotation(positions, rope_frequencies(config), dtype)
        return block_forward(params, x, config, rotation, cache)

    return mtp.Block(forward, partial(block_backward, dbalance=dbalance))


# --- the border ---------------------------------------------------------------------


def new_caches(config: Config, capacity: int) -> list[Cache]:
    """One empty cache a layer, for ``capacity`` positions."""
    _check_length(capacity, config)
    return [Cache(capacity) for _ in range(config.num_hidden_layers)]


def new_mtp_cache(config: Config, capacity: int) -> Cache:
    """An empty cache for `mtp_step`. Raises ValueError for a model without modules."""
    _check_has_module(config)
    return Cache(capacity)


def _checked_ids(ids: Array) -> Array:
    ids = np.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids must be integers of shape (batch, time), neither axis empty, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    return ids


def _check_length(length: int, config: Config) -> None:
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length} positions asked for, but max_position_embeddings is "
            f"{config.max_position_embeddings}; shorten the text or raise the limit"
        )


def _check_has_module(config: Config) -> None:
    if config.num_nextn_predict_layers == 0:
        raise ValueError(
            "num_nextn_predict_layers is 0: the model has no MTP module to draft with; "
            "generate without speculation, or train one with such a module"
        )


def _check_finite(logits: Array) -> None:
    if not np.isfinite(logits).all():
        raise FloatingPointError("the logits are not finite")


@contextmanager
def naming_the_culprit(params: Params) -> Iterator[None]:
    """Say whose NaN it was: a router, or the head, only sees that one has arrived."""
    try:
        yield
    except FloatingPointError as error:
        why = blame(first_not_finite(params))
        raise FloatingPointError(f"{error}{why}") from error
