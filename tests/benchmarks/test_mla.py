"""MLA: what the two forms cost in decoding, and cached decoding beside transformers'.

A step reads S new tokens after N others. The naive form makes N keys anew, the absorbed
form works with wider ones: the more queries meet, the sooner the making pays. Where
both take as long is measured, and computed from the multiplications alone.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from minidsv3 import parameters
from minidsv3.config import PLAIN, Config
from minidsv3.model import numpy_ref as model
from minidsv3.primitives.attention_numpy_ref import Cache
from tests.benchmarks.test_plain import side_by_side
from tests.test_mla import (
    agree,
    as_float32,
    as_tensors,
    computed_products,
    layer,
    peer_config,
    weights,
)
from tests.test_model import ids
from tests.test_primitives import normal

PAGE = dataclasses.replace(
    PLAIN,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=8,
    num_key_value_heads=8,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    kv_lora_rank=64,
    q_lora_rank=96,
    max_position_embeddings=8192,
)
BIG = dataclasses.replace(
    PAGE,
    hidden_size=1024,
    intermediate_size=2048,
    num_attention_heads=16,
    num_key_value_heads=16,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    kv_lora_rank=256,
    q_lora_rank=384,
)
each_size = pytest.mark.parametrize("config", [PAGE, BIG], ids=["page", "big"])
CHUNKS = [1, 4, 16, 32, 64, 128, 256]


def processor_seconds(f: Callable) -> float:
    """Of this process alone: a busy neighbour must not move the crossover."""
    began = time.process_time()
    f()
    return time.process_time() - began


def both_forms(config: Config, past: int, new: int) -> tuple[float, float]:
    """Best seconds of a step in the naive and in the absorbed form, taking turns."""
    params = as_float32(weights(config))
    x = normal(1, new, config.hidden_size).astype(np.float32)
    cache = Cache(past + new)
    kept = normal(1, past, config.kv_lora_rank + config.qk_rope_head_dim)
    cache.extend(kept.astype(np.float32))

    def step(form: str) -> None:
        layer(params, x, config, form, cache)
        cache.crop(past)

    times = [
        [processor_seconds(lambda f=form: step(f)) for form in ("naive", "absorbed")]
        for _ in range(9)
    ][1:]
    naive, absorbed = (min(column) for column in zip(*times, strict=True))
    return naive, absorbed


def computed_crossover(config: Config, past: int) -> int:
    """The first S at which the absorbed form needs more multiplications (facts A.7).

    In the limit it is N·a / (a + N·N_h·(2·d_c - d_h - d_v)) with a the size of W_UKV.
    """
    for S in range(1, 1000):
        costs = (computed_products(config, past, S, f) for f in ("naive", "absorbed"))
        naive, absorbed = costs
        if absorbed >= naive:
            return S
    return 1000


@each_size
@pytest.mark.parametrize("past", [256, 1024, 4096])
def test_naive_and_absorbed(config: Config, past: int) -> None:
    print(f"\n{past} tokens are kept    naive   absorbed   ratio   of products")
    ratios = []
    for S in CHUNKS:
        naive, absorbed = both_forms(config, past, S)
        costs = [computed_products(config, past, S, f) for f in ("naive", "absorbed")]
        ratios.append(naive / absorbed)
        print(f"{S:5} new          {1e3 * naive:8.2f}   {1e3 * absorbed:5.2f} ms   "
              f"{ratios[-1]:5.2f}   {costs[0] / costs[1]:8.2f}")  # fmt: skip
    # where the ratio passes 1, between two chunks, straight lines of logarithms
    falling = -np.log(np.minimum.accumulate(ratios))
    measured = np.exp(np.interp(0, falling, np.log(CHUNKS)))
    beyond = "more than " if ratios[-1] > 1 else ""
    print(f"as long at a chunk of {beyond}{measured:.0f}, by products of "
          f"{computed_crossover(config, past)}")  # fmt: skip


@each_size
@pytest.mark.parametrize("past", [64, 512, 2048])
@torch.no_grad()
def test_cached_decoding_beside_transformers(config: Config, past: int) -> None:
    """Eight tokens after a prompt; transformers makes all keys anew for each."""
    from transformers import DeepseekV3ForCausalLM, DynamicCache

    params = parameters.initialise(config, 0, 0.02)
    peer = DeepseekV3ForCausalLM(peer_config(config)).eval()
    peer.load_state_dict(as_tensors(params), strict=True)
    tokens = ids(1, past + 8, config=config)
    prompt, further = tokens[:, :past], np.split(tokens[:, past:], 8, axis=1)
    caches = model.new_caches(config, past + 8)
    cache = DynamicCache(config=peer.config)
    theirs = peer(torch.tensor(prompt), past_key_values=cache).logits
    agree(model.forward(params, config, prompt, caches)[0], theirs)

    def ours() -> None:
        for own in caches:
            own.crop(past)
        for token in further:
            model.forward(params, config, token, caches)

    def by_transformers() -> None:
        cache.crop(past - cache.get_seq_length())
        for token in further:
            peer(torch.tensor(token), past_key_values=cache)

    side_by_side(f"8 tokens after {past}", ours, by_transformers)
