"""What attention through a latent costs and keeps, over several seeds: chapter 4.

    OMP_NUM_THREADS=1 python book/mla_experiment.py --seeds 0 1 2 3 4

``mla_quality.csv``: one small model with five kinds of attention, all with as many
parameters: what attention saves goes to the feed-forward. MQA and the smaller latent
keep as many numbers of each token, and so do GQA and the larger latent. GQA and MQA
are there a second time without that gift, "narrow".
``mla_yarn.csv``: the model with the larger latent reads eight times as far as it was
trained, as it is, with YaRN's frequencies, and with its temperature too; before and
after a little training at that length. The chapter plots the rows and runs one seed
again; a test recomputes the beginning of one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import runs
from rows import Row, provenance, write
from rows import read as read
from tqdm import tqdm

from minidsv3 import corpus, parameters
from minidsv3.config import PLAIN, Config, TrainConfig, Yarn
from minidsv3.mla import numpy_ref as mla
from minidsv3.model import numpy_ref as model
from minidsv3.model.block_numpy_ref import saved_attention
from minidsv3.training.numpy_ref import StepRecord

MHA = replace(PLAIN, hidden_size=128, num_hidden_layers=2, num_attention_heads=8,
              num_key_value_heads=8, v_head_dim=16, qk_rope_head_dim=16,
              intermediate_size=256, max_position_embeddings=1024)  # fmt: skip
MLA = replace(MHA, kv_lora_rank=56, qk_nope_head_dim=16, qk_rope_head_dim=8)
RECIPE = TrainConfig(steps=1500, batch_size=4, sequence_length=128, warmup_steps=50,
                     learning_rate=3e-3, min_learning_rate=3e-4)  # fmt: skip
FAR = 8  # how many times further it reads
TUNE = replace(RECIPE, steps=100, batch_size=1, sequence_length=FAR * 128,
               warmup_steps=10, learning_rate=5e-4, min_learning_rate=5e-5)  # fmt: skip
HELD_OUT = 64 * 1024  # tokens of the held-out text that losses are taken on
BINS = 8  # stretches of the long context, each as long as the training's

Params = dict[str, np.ndarray]


def filled(config: Config) -> Config:
    """The feed-forward widened until the model has as many parameters as with MHA."""
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    spare = parameters.count(MHA) - parameters.count(config)
    return replace(config, intermediate_size=MHA.intermediate_size + spare // per_unit)


ARMS = {
    "MHA": MHA,
    "GQA": filled(replace(MHA, num_key_value_heads=2)),
    "MLA": filled(MLA),
    "MQA": filled(replace(MHA, num_key_value_heads=1)),
    "MLA small": filled(replace(MLA, kv_lora_rank=24)),
    "GQA narrow": replace(MHA, num_key_value_heads=2),
    "MQA narrow": replace(MHA, num_key_value_heads=1),
}
YARN = Yarn(factor=FAR, original_max_position_embeddings=RECIPE.sequence_length,
            beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)  # fmt: skip
STRETCH = {
    "as it is": None,
    "frequencies": replace(YARN, mscale=1e-9, mscale_all_dim=1e-9),
    "YaRN": YARN,
}


def kept(config: Config) -> float:
    """Numbers that the cache keeps of a token in each layer, counted in a cache."""
    params = parameters.initialise(config, 0, RECIPE.init_std)
    caches = model.new_caches(config, 2)
    model.forward(params, config, np.zeros((1, 2), np.int64), caches)
    return sum(cache.nbytes for cache in caches) / len(caches) / 2 / 4


def train(
    config: Config, seed: int, show: Callable = iter
) -> Iterator[tuple[StepRecord, Params]]:
    """Train a kind of attention from scratch; all kinds read the same batches."""
    return runs.train(config, replace(RECIPE, seed=seed), show=show)


def bits_by_position(params: Params, config: Config, length: int) -> np.ndarray:
    """Bits a token on held-out text at each position of a window: (length,)."""
    tokens = corpus.load_corpus().held_out[:HELD_OUT]
    rows = len(tokens) // (length + 1)
    text = tokens[: rows * (length + 1)].reshape(rows, length + 1).astype(np.int64)
    total = np.zeros(length)
    for ids in np.array_split(text, max(1, rows * length // 2048)):
        logits, _ = model.forward(params, config, ids[:, :-1])
        z = logits - logits.max(axis=-1, keepdims=True)  # (B, T, V)
        right = np.take_along_axis(z, ids[:, 1:, None], axis=-1)[..., 0]  # (B, T)
        total += (np.log(np.exp(z).sum(axis=-1)) - right).sum(axis=0)
    return total / rows / np.log(2)


def keys_and_values(params: Params, config: Config, ids: np.ndarray) -> list:
    """What plain attention would keep, before the rotation: (B*T, 2*N_kv*d) a layer."""
    _, saved = model.forward(params, config, ids)
    kept_by_layer = []
    for block in model.saved_blocks(saved):
        (u, W_k), (_, W_v) = saved_attention(block)[1:3]  # of the two projections
        kv = np.concatenate([u @ W_k.T, u @ W_v.T], axis=-1)  # (B, T, 2*N_kv*d)
        kept_by_layer.append(kv.reshape(-1, kv.shape[-1]))
    return kept_by_layer


def multiplications(config: Config, S: int, N: int) -> dict[str, int]:
    """Of one layer with S new tokens and N in all, beyond the projections that every
    form has: keys and values expanded and kept, expanded anew each time, absorbed.
    """
    c = config
    d_h, d_R, d_v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    d_c, N_h = c.kv_lora_rank, c.num_attention_heads
    up = N_h * (d_h + d_v) * d_c  # W_UK and W_UV, once
    pairs = S * N * N_h
    return {
        "expanded": S * up + pairs * (d_h + d_R + d_v),
        "naive": N * up + pairs * (d_h + d_R + d_v),
        "absorbed": S * up + pairs * (d_c + d_R + d_c),
    }


def crossover(config: Config, N: int) -> float:
    """New tokens at which naive and absorbed cost as many multiplications."""
    one, many = (multiplications(config, S, N) for S in (0, 1))
    slope = {form: many[form] - one[form] for form in one}
    return one["naive"] / (slope["absorbed"] - slope["naive"])


def milliseconds(config: Config, S: int, N: int, tries: int = 5) -> tuple[float, float]:
    """Of the naive and of the absorbed form, S queries on N latents: best of tries."""
    rng = np.random.default_rng(0)
    c = config

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    heads = c.num_attention_heads
    W_UKV = array(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    q_C = array(1, S, heads, c.qk_nope_head_dim)
    q_R = array(1, S, heads, c.qk_rope_head_dim)
    latents = array(1, N, c.kv_lora_rank + c.qk_rope_head_dim)
    best = []
    for form in (mla.naive_forward, mla.absorbed_forward):
        times = []
        for _ in range(tries):
            began = time.perf_counter()
            form(W_UKV, q_C, q_R, latents, config)
            times.append(time.perf_counter() - began)
        best.append(1000 * min(times))
    return best[0], best[1]


def quality_row(arm: str, seed: int, show: Callable = iter) -> tuple[Row, Params]:
    """One training: what it keeps, what it cost and what it reached."""
    config = ARMS[arm]
    began = time.process_time()
    *_, (_, params) = train(config, seed, show=show)
    ms = 1000 * (time.process_time() - began) / RECIPE.steps
    bits = bits_by_position(params, config, RECIPE.sequence_length).mean()
    row = {"arm": arm, "seed": seed, "kept": kept(config), "ms_per_step": ms}
    row |= {"parameters": parameters.count(config), "bits": float(bits)}
    return row, params


def yarn_rows(params: Params, seed: int) -> Iterator[Row]:
    """Bits in each stretch of the long context, before and after a little training."""
    for arm, yarn in STRETCH.items():
        config = replace(ARMS["MLA"], rope_scaling=yarn)
        for tuned in (0, 1):
            mine = {name: array.copy() for name, array in params.items()}
            if tuned:
                for _ in runs.train(config, replace(TUNE, seed=seed), start=mine):
                    pass
            bits = bits_by_position(mine, config, TUNE.sequence_length)
            by_bin = bits.reshape(BINS, -1).mean(axis=1)
            row = {"arm": arm, "seed": seed, "tuned": tuned}
            yield row | {f"bits_{n}": float(b) for n, b in enumerate(by_bin)}


def main() -> int:
    """Train every kind with every seed and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    head = provenance("mla_experiment.py", seeds)
    quality: list[Row] = []
    yarn: list[Row] = []
    for seed in seeds:
        for arm in ARMS:
            show = partial(tqdm, desc=f"seed {seed}, {arm}", total=RECIPE.steps)
            row, params = quality_row(arm, seed, show)
            quality.append(row)
            write("mla_quality", quality, head)
            if arm == "MLA":
                yarn += yarn_rows(params, seed)
                write("mla_yarn", yarn, head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
