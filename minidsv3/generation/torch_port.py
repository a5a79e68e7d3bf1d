"""Decoding with the PyTorch model, on whatever device it is."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidsv3.config import Config
from minidsv3.generation.prefill import PrefilledSession
from minidsv3.model.torch_port import DeepSeekV3, arrays
from minidsv3.parameters import first_not_finite
from minidsv3.primitives.cache import Cache, RaggedCache

Array = np.ndarray


def _plainly(method: Callable) -> Callable:
    """Without gradients, and in the model's own precision under autocast too."""

    @wraps(method)
    def run(self: "TorchReader", *arguments: Any) -> Any:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *arguments)

    return run


class TorchReader:
    """Reads prompts; ids come as arrays, states stay tensors."""

    def __init__(self, model: DeepSeekV3) -> None:
        self.model = model
        self.device = model.lm_head.weight.device

    @property
    def weights(self) -> tuple[dict[str, Array], Config]:
        """What the NumPy model takes, the same memory."""
        return arrays(self.model), self.model.config

    @property
    def weights_say_all(self) -> bool:
        """Whether the weights alone, on a processor, answer as the model does."""
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()
        )
        own_class = type(self.model) is DeepSeekV3
        return self.device.type == "cpu" and own_class and not hooked

    @_plainly
    def read(self, ids: Array, caches: list[Cache]) -> Tensor:
        """Hidden states after the final norm: ids (B, T) -> (B, T, D).

        Raises FloatingPointError at a text's beginning for a router's bias that is not
        finite: it would send tokens anywhere, and no logit would show it.
        """
        if not caches[0].length:
            biases = {name: b.cpu().numpy() for name, b in self.model.named_buffers()}
            if culprit := first_not_finite(biases):
                raise FloatingPointError(f"{culprit} holds NaN or infinity")
        return self.model.hidden_states(self._ids(ids), caches)[0]

    @_plainly
    def read_pairs(self, h: Tensor, ids: Array, cache: Cache) -> None:
        """Leave pairs in the cache of module 1: h (B, T, D), ids (B, T)."""
        self.model.draft_states(h, self._ids(ids), cache, answer=False)

    @_plainly
    def draft(self, h: Tensor, ids: Array, cache: Cache) -> Tensor:
        """Module 1's states, before the head: h (B, T, D), ids (B, T) -> (B, T, D)."""
        return self.model.draft_states(h, self._ids(ids), cache)

    @_plainly
    def logits(self, h: Tensor) -> Array:
        """The head: h (..., D) -> (..., V), in float32 at least."""
        z = self.model.lm_head(h)
        return z.to(torch.promote_types(z.dtype, torch.float32)).cpu().numpy()

    @staticmethod
    def stack(rows: list[Tensor]) -> Tensor:
        """States (D,) of B texts as one tensor (B, 1, D)."""
        return torch.stack(rows)[:, None]

    def _ids(self, ids: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)


class ModuleDecoder:
    """The model's own modules, with caches that let texts differ in length."""

    def __init__(self, model: DeepSeekV3) -> None:
        self.reader, self.config = TorchReader(model), model.config

    def session(self, B: int, capacity: int, drafts: bool, chunk: int) -> "_Session":
        """Empty caches for B texts."""
        caches = [RaggedCache(capacity) for _ in range(self.config.num_hidden_layers)]
        module_cache = RaggedCache(capacity) if drafts else None
        return _Session(self.reader, caches, module_cache, chunk)

    def culprit(self) -> str | None:
        """The name of a parameter that is not finite."""
        return first_not_finite(self.reader.weights[0])


class _Session(PrefilledSession):
    """See `minidsv3.generation.decoding.Session`."""

    def prefill(self, ids: Array, lengths: Array) -> Array:
        logits = super().prefill(ids, lengths)
        self._settle()
        return logits

    def step(self, ids: Array) -> Array:
        self.h = self.reader.read(ids, self.caches)
        return self.reader.logits(self.h)

    def keep(self, counts: Array) -> None:
        self.lengths = self.lengths + counts
        self._settle()

    def draft(self, ids: Array, counts: Array) -> Array:
        T = ids.shape[1]
        self.module_cache.settle(self.lengths - counts)  # pairs that it has read
        z = self.reader.draft(self.h[:, :T], ids, self.module_cache)  # (B, T, D)
        return self.reader.logits(z[np.arange(len(counts)), counts - 1])

    def select(self, texts: Array) -> None:
        super().select(texts)
        for cache in [*self.caches, *filter(None, [self.module_cache])]:
            cache.select(texts)
        self._settle()

    def _settle(self) -> None:
        for cache in self.caches:
            cache.settle(self.lengths)
