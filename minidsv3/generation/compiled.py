r"""Decoding by compiled loops: the fastest way on a processor, for models with MLA.

No graph, no copy of a weight, and for a short past one call for the attention of a
layer and one for what follows: a step of one token takes little longer than memory
takes to deliver the weights that it needs. Over a longer past attention is two products
of NumPy's between the loops; they alone use several threads.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from minidsv3.config import Config
from minidsv3.generation import cpu_kernels as kernels
from minidsv3.generation.prefill import PrefilledSession, Reader
from minidsv3.mla.numpy_ref import LATENT_EPS
from minidsv3.model.numpy_ref import mtp_states, naming_the_culprit, trunk_forward
from minidsv3.parameters import check, cut, first_not_finite
from minidsv3.primitives.cache import Cache
from minidsv3.primitives.numpy_ref import (
    linear_forward,
    rope_frequencies,
    softmax_scale,
)

Array = np.ndarray
SHORT = 4096  # scores of a layer up to which loops are faster than library calls


class _Block(NamedTuple):
    """Arguments of the kernels of one block, in their order."""

    project: tuple  # sizes, norm, queries, latents
    output: tuple  # d_h, W_UKV, W_O
    feed: Callable
    feed_weights: tuple


class CompiledDecoder:
    """A dict of parameters and its config; reader reads the prompts.

    The arrays are used as they are: a step of training in between is seen. Raises
    ValueError for plain attention, and for arrays of mixed or other precision or not in
    C order, ParameterError for names and shapes that are not the config's.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        config: Config,
        reader: Reader | None = None,
    ) -> None:
        kinds = {array.dtype for array in params.values()}
        if not config.uses_mla:
            raise ValueError("compiled decoding is for MLA; kv_lora_rank is None here")
        if len(kinds) != 1 or not kinds <= {np.dtype("f4"), np.dtype("f8")}:
            raise ValueError(
                "compiled decoding needs parameters of one precision, float32 or "
                f"float64; these are {', '.join(sorted(map(str, kinds)))}"
            )
        check(params, config)  # a kernel does not look where an array ends
        if slanted := [k for k, a in params.items() if not a.flags.c_contiguous]:
            raise ValueError(  # Numba reshapes them wrongly
                f"compiled decoding needs arrays in C order; {slanted[0]} is not: "
                "np.ascontiguousarray makes it so"
            )
        self.params, self.config = params, config
        self.reader = reader or NumpyReader(params, config)
        self.dtype = kinds.pop()
        L = config.num_hidden_layers
        self.blocks = [self._block(n) for n in range(L)]
        if config.num_nextn_predict_layers:
            self.module = self._block(L)
            own = cut(params, f"model.layers.{L}.")
            names = ("enorm", "hnorm", "eh_proj")
            self.entrance = tuple(own[f"{name}.weight"] for name in names)
            self.module_norm = own["shared_head.norm.weight"]

    def session(self, B: int, capacity: int, drafts: bool, chunk: int) -> "_Session":
        """Empty caches for B texts."""
        return _Session(self, B, capacity, drafts, chunk)

    def culprit(self) -> str | None:
        """The name of a parameter that is not finite."""
        return first_not_finite(self.params)

    def _block(self, n: int) -> _Block:
        c = self.config
        block = cut(self.params, f"model.layers.{n}.")
        attention, mlp = cut(block, "self_attn."), cut(block, "mlp.")
        none, nothing = np.empty((0, 0), self.dtype), np.empty(0, self.dtype)
        if c.q_lora_rank is None:
            queries = (none, nothing, attention["q_proj.weight"])
        else:
            names = ("q_a_proj", "q_a_layernorm", "q_b_proj")
            queries = tuple(attention[f"{name}.weight"] for name in names)
        W_UKV = attention["kv_b_proj.weight"]
        latents = (
            attention["kv_a_proj_with_mqa.weight"],
            attention["kv_a_layernorm.weight"],
            W_UKV,
        )
        feed: tuple = (c.rms_norm_eps, block["post_attention_layernorm.weight"])
        if "gate.weight" not in mlp:
            feed += _swiglu(mlp, "")
        else:
            shared = (none, none, none)
            if c.n_shared_experts:
                shared = _swiglu(mlp, "shared_experts.")
            feed += (
                mlp["gate.weight"],
                mlp["gate.e_score_correction_bias"],
                *(c.n_group, c.topk_group, c.num_experts_per_tok),
                float(c.routed_scaling_factor),
                *_swiglu(mlp, "experts."),
                *shared,
            )
        sizes = (c.qk_nope_head_dim, softmax_scale(c), c.rms_norm_eps, LATENT_EPS)
        return _Block(
            (*sizes, block["input_layernorm.weight"], *queries, *latents),
            (c.qk_nope_head_dim, W_UKV, attention["o_proj.weight"]),
            kernels.experts if "gate.weight" in mlp else kernels.dense,
            feed,
        )


def _swiglu(mlp: Mapping[str, Array], which: str) -> tuple[Array, ...]:
    return tuple(mlp[f"{which}{part}_proj.weight"] for part in ("gate", "up", "down"))


class NumpyReader:
    """Reads prompts with the NumPy model."""

    def __init__(self, params: Mapping[str, Array], config: Config) -> None:
        self.params, self.config = params, config

    def read(self, ids: Array, caches: list[Cache]) -> Array:
        """Hidden states after the final norm: ids (B, T) -> (B, T, D)."""
        with naming_the_culprit(self.params):
            return trunk_forward(self.params, self.config, ids, caches)[0]

    def read_pairs(self, h: Array, ids: Array, cache: Cache) -> None:
        """Leave pairs in the cache of module 1: h (B, T, D), ids (B, T)."""
        with naming_the_culprit(self.params):
            mtp_states(self.params, self.config, h, ids, cache)

    def logits(self, h: Array) -> Array:
        """The head: h (..., D) -> (..., V)."""
        return linear_forward(h, self.params["lm_head.weight"])[0]

    @staticmethod
    def stack(rows: list[Array]) -> Array:
        """States (D,) of B texts as one array (B, 1, D)."""
        return np.stack(rows)[:, None]


class _Session(PrefilledSession):
    """See `minidsv3.generation.decoding.Session`."""

    def __init__(
        self, decoder: CompiledDecoder, B: int, capacity: int, drafts: bool, chunk: int
    ) -> None:
        c = decoder.config
        caches = [Cache(capacity) for _ in decoder.blocks]
        super().__init__(
            decoder.reader, caches, Cache(capacity) if drafts else None, chunk
        )
        self.decoder, self.config, self.dtype = decoder, c, decoder.dtype
        angles = np.arange(capacity)[:, None] * rope_frequencies(c)  # (capacity, d_R/2)
        turns = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self.angles = turns.astype(self.dtype)  # (capacity, 2, d_R/2)
        self.kept: list[Array] = []  # of each layer, (B, capacity, d_c + d_R)
        self.module_kept: Array | None = None
        self.embedding = decoder.params["model.embed_tokens.weight"]
        self.norm = decoder.params["model.norm.weight"]
        self.head = decoder.params["lm_head.weight"]

    def prefill(self, ids: Array, lengths: Array) -> Array:
        logits = super().prefill(ids, lengths)
        self.kept = [np.asarray(cache.arrays[0]) for cache in self.caches]
        if self.module_cache is not None:
            some = self.module_cache.arrays  # none after prompts of one token
            empty = np.zeros_like(self.kept[0])
            self.module_kept = np.asarray(some[0]) if some else empty
        self.h = np.asarray(self.h).reshape(len(lengths), -1)  # (B*1, D)
        return logits

    def step(self, ids: Array) -> Array:
        B, T = ids.shape
        x = self.embedding[ids.reshape(-1)]  # (N, D)
        seen = self.lengths.max() + T
        short = len(x) * self.config.num_attention_heads * seen <= SHORT
        for block, kept in zip(self.decoder.blocks, self.kept, strict=True):
            if short:
                W_O = block.output[-1]
                kernels.attention(
                    x, self.lengths, kept, self.angles, *block.project, W_O
                )
            else:
                q = self._project(block, x, kept, self.lengths)
                self._attend(block, x, q, kept, self.lengths)
            block.feed(x, *block.feed_weights)
        self.h = np.empty_like(x)
        return self._logits(x, self.norm, self.h).reshape(B, T, -1)  # (B, T, V)

    def keep(self, counts: Array) -> None:
        self.lengths = self.lengths + counts

    def draft(self, ids: Array, counts: Array) -> Array:
        B, T = ids.shape
        states = self.h.reshape(B, -1, self.h.shape[-1])[:, :T]  # (B, T, D)
        h = np.ascontiguousarray(states).reshape(B * T, -1)  # (N, D)
        x, e = np.empty_like(h), self.embedding[ids.reshape(-1)]  # (N, D)
        kernels.entrance(h, e, self.config.rms_norm_eps, *self.decoder.entrance, x)
        starts = self.lengths - counts  # pairs that it has read
        block, kept = self.decoder.module, self.module_kept
        q = self._project(block, x, kept, starts)
        # only the pair of the last settled token is answered: one before it left what
        # it had to in the cache, one behind it is a rejected draft's
        last = np.arange(B) * T + counts - 1  # (B)
        x = x[last]
        self._attend(block, x, q[last], kept, self.lengths - 1)
        block.feed(x, *block.feed_weights)
        return self._logits(x, self.decoder.module_norm, np.empty_like(x))

    def select(self, texts: Array) -> None:
        B = len(self.lengths)
        self.h = self.h.reshape(B, -1, self.h.shape[-1])  # (B, T, D)
        super().select(texts)
        self.h = self.h.reshape(-1, self.h.shape[-1])  # (N, D)
        self.kept = [kept[texts] for kept in self.kept]
        if self.module_kept is not None:
            self.module_kept = self.module_kept[texts]

    def _project(self, block: _Block, x: Array, kept: Array, starts: Array) -> Array:
        """New latents into the cache, each text's behind its start; their queries."""
        w = kept.shape[-1]
        q = np.empty((len(x), self.config.num_attention_heads, w), self.dtype)
        kernels.project(x, starts, kept, self.angles, *block.project, q)
        return q  # (N, N_h, w)

    def _attend(
        self, block: _Block, x: Array, q: Array, kept: Array, starts: Array
    ) -> None:
        """Attention after `_project`, added to the stream x (N, D)."""
        N, N_h, w = q.shape
        B, d_c = len(starts), self.config.kv_lora_rank
        seen = kept[:, : starts.max() + N // B]  # (B, S, w)
        weights = q.reshape(B, -1, w) @ seen.swapaxes(1, 2)  # (B, T*N_h, S)
        kernels.shift(weights.reshape(B, -1, N_h, seen.shape[1]), starts)
        np.exp(weights, out=weights)
        latents = weights @ seen[..., :d_c]  # (B, T*N_h, d_c)
        latents = latents.reshape(N, N_h, d_c)  # (N, N_h, d_c)
        sums = weights.sum(axis=-1).reshape(N, N_h)  # (N, N_h)
        kernels.output(x, sums, latents, *block.output)

    def _logits(self, x: Array, norm: Array, h: Array) -> Array:
        """The norm into h (N, D), and the head: x (N, D) -> (N, V)."""
        z = np.empty((len(x), len(self.head)), self.dtype)
        kernels.head(x, norm, self.config.rms_norm_eps, self.head, h, z)
        return z
