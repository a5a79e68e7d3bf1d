"""Generating text in NumPy: one prefill, then one cached step a token.

Or less than one: speculative decoding lets MTP module 1 draft a token, and the model
checks it while it computes its own next step. The text follows the same law.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minidsv3.config import Config
from minidsv3.model.numpy_ref import (
    forward,
    hidden_states,
    mtp_step,
    new_caches,
    new_mtp_cache,
)
from minidsv3.mtp.numpy_ref import accept
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
        law = np.zeros(logits.shape)  # (B, V)
        np.put_along_axis(law, logits.argmax(axis=-1)[..., None], 1.0, axis=-1)
        return law
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
    speculative: bool = False,
) -> Iterator[Array]:
    """Yield the new ids one step at a time, each (B,), as `generate` would give them.

    A generator: its arguments are checked when the first token is asked for.
    """
    sampling = (temperature, top_p, seed)
    if speculative:
        for new, _ in speculate(params, config, ids, max_new_tokens, *sampling):
            yield from new.T
        return
    ids = _checked_request(ids, max_new_tokens, temperature, top_p)
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
    speculative: bool = False,
) -> Array:
    """Continue ids (B, T); returns the new ids alone, (B, max_new_tokens).

    Greedy at temperature 0. The same seed gives the same text. speculative lets MTP
    module 1 draft: the greedy text is the same (if two logits tie but for rounding, the
    pass over two tokens may round otherwise), a sampled one follows the same law, but
    its random numbers are used otherwise. Raises ValueError for an empty prompt, bad
    sampling values, a text beyond ``max_position_embeddings``, or speculation with a
    model that has no MTP module.
    """
    sampling = (temperature, top_p, seed, speculative)
    steps = stream(params, config, ids, max_new_tokens, *sampling)
    return np.stack(list(steps), axis=1)  # (B, max_new_tokens)


def _checked_request(
    ids: Array, max_new_tokens: int, temperature: float, top_p: float
) -> Array:
    """The prompt as an array, (B, T). Raises ValueError for what cannot be done."""
    check_sampling(temperature, top_p)
    ids = np.asarray(ids)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"the prompt has shape {ids.shape}: give (batch, time) with one token at "
            "least, a document boundary for instance"
        )
    return ids


# --- speculative decoding -----------------------------------------------------------


@dataclass(frozen=True)
class Speculation:
    """What speculative decoding has done so far, the prefill included.

    Everything is counted for each sequence of a batch, and added up.
    """

    trunk_passes: int = 0
    tokens: int = 0  # new ones
    drafts: int = 0
    accepted: int = 0  # of those

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept; NaN before the first draft."""
        return self.accepted / self.drafts if self.drafts else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        """New tokens a pass of the trunk: 1 without speculation, 2 at the most; NaN
        before the first."""
        return self.tokens / self.trunk_passes if self.trunk_passes else float("nan")


def speculate(
    params: dict[str, Array],
    config: Config,
    ids: Array,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[tuple[Array, Speculation]]:
    """Yield the new tokens of each trunk pass, (B, 1) or (B, 2), and the counts so far.

    :math:`x_1 … x_n` are settled, but :math:`x_n` is not read yet. Module 1 drafts d
    for :math:`x_{n+1}`; the trunk reads :math:`x_n` and d in one pass, so that it gives
    the laws of :math:`x_{n+1}`, which judges d, and of the token after d, which counts
    if d is kept. A rejected d is cropped from the trunk's caches. The module's own
    cache is fed with settled tokens only and never cropped. (DeepSeek-V3 report,
    section 5.4.3, p. 35: 85–90 % of the drafts are kept, 1.8 times the tokens.)

    The sequences of a batch advance together: a second token is taken where every one
    of them has kept its draft, so a batch gains less. Raises as `generate` does.
    """
    ids = _checked_request(ids, max_new_tokens, temperature, top_p)
    rng = np.random.default_rng(seed)
    room = ids.shape[1] + max_new_tokens - 1  # as without speculation
    caches, mtp_cache = new_caches(config, room), new_mtp_cache(config, room)

    def law(logits: Array) -> Array:
        """Draft and model are cut down alike: so most drafts are kept."""
        return next_token_law(logits, temperature, top_p)  # (B, V)

    def read(tokens: Array) -> tuple[Array, Array]:
        logits, saved = forward(params, config, tokens, caches)
        return logits, hidden_states(saved)

    logits, h = read(ids)
    new = draw(law(logits[:, -1]), rng)[:, None]  # (B, 1)
    counts, done = _counted(Speculation(), new), 1  # done: new tokens a sequence
    pairs = np.append(ids[:, 1:], new, axis=1)  # (B, T): the tokens after h's
    yield new, counts
    while done + 1 < max_new_tokens:  # there is room for two
        z = mtp_step(params, config, h, pairs, mtp_cache)[:, -1]  # (B, V)
        n = ids.shape[1] + done
        assert mtp_cache.length == n - 1 and {c.length for c in caches} == {n - 1}
        q = law(z)
        draft = draw(q, rng)  # (B)
        logits, h = read(np.stack([new[:, -1], draft], axis=1))
        kept, token = accept(law(logits[:, 0]), q, draft, rng)
        if kept.all():
            bonus = draw(law(logits[:, 1]), rng)  # (B)
            new = np.stack([token, bonus], axis=1)  # (B, 2)
        else:
            new, h = token[:, None], h[:, :1]  # (B, 1), (B, 1, D)
            for cache in caches:
                cache.crop(n)
        pairs = new
        counts, done = _counted(counts, new, kept), done + new.shape[1]
        yield new, counts
    if done < max_new_tokens:  # one is missing: nothing to gain by a draft
        logits, _ = read(new[:, -1:])
        new = draw(law(logits[:, -1]), rng)[:, None]  # (B, 1)
        yield new, _counted(counts, new)


def _counted(
    counts: Speculation, new: Array, kept: Array | tuple[()] = ()
) -> Speculation:
    """The counts after one more trunk pass over a batch."""
    return Speculation(
        trunk_passes=counts.trunk_passes + len(new),
        tokens=counts.tokens + new.size,
        drafts=counts.drafts + len(kept),
        accepted=counts.accepted + int(np.sum(kept)),
    )
