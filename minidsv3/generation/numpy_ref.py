"""Generating text in NumPy: one prefill, then one cached step a token."""

from collections.abc import Iterator

import numpy as np

from minidsv3.config import Config
from minidsv3.model.numpy_ref import forward, new_caches
from minidsv3.primitives.numpy_ref import draw, softmax

Array = np.ndarray


def next_token_law(logits: Array, temperature: float, top_p: float = 1.0) -> Array:
    """The law that the next token is drawn from: logits (B, V) -> (B, V), float64.

    Temperature 0 puts everything on the largest logit (the first among equals). Below
    top_p 1, the smallest set of most probable tokens that reaches top_p is kept and
    renormalised. Raises ValueError for temperature < 0, top_p outside (0, 1] or logits
    that are not finite.
    """
    check_sampling(temperature, top_p)
    if not np.isfinite(logits).all():
        raise ValueError("next_token_law: the logits hold NaN or infinity")
    if temperature == 0:
        return np.eye(logits.shape[-1])[logits.argmax(axis=-1)]  # (B, V)
    z = logits.astype(np.float64)  # (B, V)
    z -= z.max(axis=-1, keepdims=True)  # first: a tiny temperature would overflow
    with np.errstate(over="ignore"):
        law = softmax(z / temperature)  # (B, V)
    if top_p == 1:
        return law
    order = np.argsort(-law, axis=-1, kind="stable")  # (B, V)
    ranked = np.take_along_axis(law, order, axis=-1)  # (B, V)
    before = np.cumsum(ranked, axis=-1) - ranked  # (B, V)
    kept = np.where(before < top_p, ranked, 0.0)  # (B, V)
    np.put_along_axis(law, order, kept, axis=-1)
    return law / law.sum(axis=-1, keepdims=True)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError unless temperature ≥ 0 and 0 < top_p ≤ 1."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")


def stream(
    params: dict[str, Array],
    config: Config,
    ids: Array,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[Array]:
    """Yield the new ids one step at a time, each (B,), as `generate` would give them.

    A generator: its arguments are checked when the first token is asked for.
    """
    check_sampling(temperature, top_p)
    ids = np.asarray(ids)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"the prompt has shape {ids.shape}: give (batch, time) with one token at "
            "least, a document boundary for instance"
        )
    rng = np.random.default_rng(seed)
    # the last token drawn is never fed back, so it needs no room in the cache
    caches = new_caches(config, ids.shape[1] + max_new_tokens - 1)
    for _ in range(max_new_tokens):
        logits, _ = forward(params, config, ids, caches)
        law = next_token_law(logits[:, -1], temperature, top_p)
        new = draw(law, rng)  # (B)
        yield new
        ids = new[:, None]  # (B, 1)


def generate(
    params: dict[str, Array],
    config: Config,
    ids: Array,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Array:
    """Continue ids (B, T); returns the new ids alone, (B, max_new_tokens).

    Greedy at temperature 0. The same seed gives the same text. Raises ValueError for an
    empty prompt, bad sampling values, or a text beyond ``max_position_embeddings``.
    """
    steps = stream(params, config, ids, max_new_tokens, temperature, top_p, seed)
    return np.stack(list(steps), axis=1)
