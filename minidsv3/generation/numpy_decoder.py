"""Decoding with the NumPy model, one text after the other: for any model, and slow."""

import numpy as np

from minidsv3.config import Config
from minidsv3.model.numpy_ref import (
    forward,
    hidden_states,
    mtp_step,
    new_caches,
    new_mtp_cache,
)
from minidsv3.parameters import first_not_finite

Array = np.ndarray
Params = dict[str, Array]


class NumpyDecoder:
    """A dict of parameters and its config, for `minidsv3.generation.generate`."""

    def __init__(self, params: Params, config: Config) -> None:
        self.params, self.config = params, config

    def session(self, B: int, capacity: int, drafts: bool, chunk: int) -> "_Session":
        """Caches for B texts, each by itself."""
        capacity = min(capacity, self.config.max_position_embeddings)
        return _Session([_Text(self, capacity, drafts, chunk) for _ in range(B)])

    def culprit(self) -> str | None:
        """The name of a parameter that is not finite."""
        return first_not_finite(self.params)


class _Text:
    """The caches of one text; `h` are the hidden states of what was read last."""

    def __init__(
        self, decoder: NumpyDecoder, capacity: int, drafts: bool, chunk: int
    ) -> None:
        self.model = (decoder.params, decoder.config)
        self.caches = new_caches(decoder.config, capacity)
        self.module_cache = new_mtp_cache(decoder.config, capacity) if drafts else None
        self.chunk, self.capacity, self.length = chunk, capacity, 0

    def read(self, ids: Array) -> Array:
        """Logits (1, T, V) of ids (1, T), which the caches keep for now."""
        logits, saved = forward(*self.model, ids, self.caches)
        self.h = hidden_states(saved)
        return logits

    def prefill(self, ids: Array) -> Array:
        for start in range(0, ids.shape[1], self.chunk):
            logits = self.read(ids[:, start : start + self.chunk])
            after = ids[:, start + 1 : start + 1 + self.chunk]
            if self.module_cache is not None and after.size:
                h = self.h[:, : after.shape[1]]
                mtp_step(*self.model, h, after, self.module_cache)
        self.h, self.length = self.h[:, -1:], ids.shape[1]
        return logits[:, -1]

    def step(self, ids: Array) -> Array:
        """Logits (1, T, V). A draft that stands behind the context is not read."""
        logits = self.read(ids[:, : self.capacity - self.length])
        missing = ids.shape[1] - logits.shape[1]
        return np.pad(logits, ((0, 0), (0, missing), (0, 0)))

    def keep(self, count: int) -> None:
        self.length += count
        for cache in self.caches:
            cache.crop(self.length)

    def draft(self, ids: Array) -> Array:
        h = self.h[:, : ids.shape[1]]
        return mtp_step(*self.model, h, ids, self.module_cache)[:, -1]


class _Session:
    """See `minidsv3.generation.decoding.Session`."""

    def __init__(self, texts: list[_Text]) -> None:
        self.texts = texts

    def prefill(self, ids: Array, lengths: Array) -> Array:
        return np.concatenate(
            [
                text.prefill(ids[None, b, : lengths[b]])
                for b, text in enumerate(self.texts)
            ]
        )

    def step(self, ids: Array) -> Array:
        return np.concatenate(
            [text.step(ids[None, b]) for b, text in enumerate(self.texts)]
        )

    def keep(self, counts: Array) -> None:
        for text, count in zip(self.texts, counts.tolist(), strict=True):
            text.keep(count)

    def draft(self, ids: Array, counts: Array) -> Array:
        return np.concatenate(
            [text.draft(ids[None, b, : counts[b]]) for b, text in enumerate(self.texts)]
        )

    def select(self, texts: Array) -> None:
        self.texts = [self.texts[b] for b in texts]
