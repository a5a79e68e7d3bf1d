"""The whole model, and what each mechanism adds to it, over several seeds: chapter 5.

    OMP_NUM_THREADS=1 python book/mini_experiment.py --seeds 0 1 2

``mini_ablation.csv``: MINI, the same with one mechanism switched off in turn, with none
of them, and chapter 1's model; what each reached and what it cost. A batch is half of
chapter 1's, so that every model can be trained with every seed in half an hour.
``mini_curves.csv``: the same trainings on the way, by steps and by seconds of the
processor. The chapter plots the rows and trains MINI again; a test recomputes the
beginning of one.
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
from minidsv3.config import MINI, PLAIN, Config, TrainConfig
from minidsv3.generation.numpy_ref import speculate
from minidsv3.model import numpy_ref as model
from minidsv3.moe import numpy_ref as moe
from minidsv3.training.numpy_ref import StepRecord, evaluate

RECIPE = TrainConfig(steps=400, batch_size=8, sequence_length=128, warmup_steps=40,
                     learning_rate=3e-3, min_learning_rate=3e-4)  # fmt: skip
EVERY = 80  # steps between two looks at the held-out text
HELD_OUT = 65_536  # tokens of it
PROMPTS, PROMPT_BYTES, NEW_BYTES = 20, 32, 64

# As wide, over all layers, as the feed-forwards that a token of MINI meets.
ACTIVE = (512 + 2 * 9 * 32) // 3
NO_MOE = {"n_routed_experts": None, "n_shared_experts": 0, "num_experts_per_tok": None,
          "moe_intermediate_size": None, "n_group": 1, "topk_group": 1,
          "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
          "intermediate_size": ACTIVE}  # fmt: skip
NO_MLA = {"kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0,
          "qk_rope_head_dim": 32}  # fmt: skip
NO_MTP = {"num_nextn_predict_layers": 0}
ARMS = {
    "MINI": MINI,
    "without MTP": replace(MINI, **NO_MTP),
    "without MoE": replace(MINI, **NO_MOE),
    "without MLA": replace(MINI, **NO_MLA),
    "with none": replace(MINI, **NO_MTP, **NO_MOE, **NO_MLA),
    "chapter 1": PLAIN,
}

Params = dict[str, np.ndarray]


def look(params: Params, config: Config) -> tuple[float, float]:
    """Bits per byte on held-out text, and MaxVio there (NaN without experts)."""
    tokens, T = corpus.load_corpus().held_out[:HELD_OUT], RECIPE.sequence_length
    bits = evaluate(params, config, tokens, T)
    if not config.uses_moe:
        return bits, float("nan")
    windows = tokens[: len(tokens) // T * T].reshape(-1, 16, T).astype(np.int64)
    loads = 0
    for ids in windows:
        _, saved = model.forward(params, config, ids)
        E = config.n_routed_experts
        loads += np.array([moe.load(r.experts, E) for r in model.routings(saved)])
    return bits, float(np.mean([moe.max_violation(counts) for counts in loads]))


def train(
    config: Config, seed: int, recipe: TrainConfig = RECIPE, show: Callable = iter
) -> Iterator[tuple[StepRecord, Params]]:
    """Train a model from scratch; what two have in common starts with equal weights."""
    return runs.train(config, replace(recipe, seed=seed), show=show)


def acceptance(params: Params, config: Config, temperature: float) -> float:
    """The share of drafts kept while continuing held-out text; NaN without a module."""
    if config.num_nextn_predict_layers == 0:
        return float("nan")
    tokens = corpus.load_corpus().held_out
    places = np.linspace(0, len(tokens) - PROMPT_BYTES, PROMPTS).astype(int)
    drafts = accepted = 0
    for number, place in enumerate(places):
        ids = tokens[place : place + PROMPT_BYTES].astype(np.int64)[None]
        *_, (_, counts) = speculate(
            params, config, ids, NEW_BYTES, temperature, 1.0, number
        )
        drafts, accepted = drafts + counts.drafts, accepted + counts.accepted
    return accepted / drafts


def cache_bytes(config: Config) -> float:
    """What the caches of all layers keep of a token, in float32, counted."""
    params = parameters.initialise(config, 0, RECIPE.init_std)
    caches = model.new_caches(config, 2)
    model.forward(params, config, np.zeros((1, 2), np.int64), caches)
    return sum(cache.nbytes for cache in caches) / 2


def rows(arm: str, seed: int, show: Callable = iter) -> tuple[Row, list[Row]]:
    """One training: what it reached and cost, and the way there."""
    config, way, spent = ARMS[arm], [], 0.0
    began = time.process_time()
    for record, params in train(config, seed, show=show):
        if record.step % EVERY:
            continue
        spent += time.process_time() - began
        bits, max_vio = look(params, config)
        row = {"arm": arm, "seed": seed, "step": record.step, "seconds": spent}
        way.append(row | {"bits": bits, "max_vio": max_vio})
        began = time.process_time()
    end = {"arm": arm, "seed": seed, "ms_per_step": 1000 * spent / RECIPE.steps}
    end |= {"parameters": parameters.count(config), "cache": cache_bytes(config)}
    end |= {"bits": way[-1]["bits"], "max_vio": way[-1]["max_vio"]}
    end |= {"kept_greedy": acceptance(params, config, 0.0)}
    return end | {"kept_08": acceptance(params, config, 0.8)}, way


def main() -> int:
    """Train every model with every seed and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    head = provenance("mini_experiment.py", seeds)
    ends: list[Row] = []
    ways: list[Row] = []
    for seed in seeds:
        for arm in ARMS:
            show = partial(tqdm, desc=f"seed {seed}, {arm}", total=RECIPE.steps)
            end, way = rows(arm, seed, show)
            ends.append(end)
            ways += way
            write("mini_ablation", ends, head)
            write("mini_curves", ways, head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
