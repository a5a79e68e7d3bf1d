"""What balance does to a mixture of experts, over several seeds: chapter 3's numbers.

    OMP_NUM_THREADS=1 python book/moe_experiment.py --seeds 0 1 2 3 4

``moe_balance.csv``: a small model with 8 of 256 experts, trained without any balancing,
with a balance loss, and with the bias rule at several speeds; and two dense models, as
wide as the experts that a token meets, and as wide as all of them.
``moe_curves.csv``: the same trainings on the way. Loads and losses are taken on
held-out text, with the biases as they stand. The chapter plots the rows and runs one
seed again; a test recomputes the beginning of one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import runs
from kinds import KINDS, kinds
from rows import Row, provenance, write
from rows import read as read
from tqdm import tqdm

from minidsv3 import corpus, parameters
from minidsv3.config import PLAIN, Config, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.moe import numpy_ref as moe
from minidsv3.primitives.numpy_ref import cross_entropy_forward
from minidsv3.training.numpy_ref import StepRecord

SMALL = replace(PLAIN, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, intermediate_size=192)  # fmt: skip
EXPERTS = replace(SMALL, n_routed_experts=256, num_experts_per_tok=8,
                  moe_intermediate_size=16, n_shared_experts=4, n_group=8,
                  topk_group=4, routed_scaling_factor=2.5)  # fmt: skip
ALL = 16 * (256 + 4)  # as wide as all experts together
RECIPE = TrainConfig(steps=1500, batch_size=8, sequence_length=64, warmup_steps=50,
                     learning_rate=3e-3, min_learning_rate=3e-4,
                     bias_update_speed=0.0, balance_weight=0.0)  # fmt: skip
EVERY = 250  # steps between two looks at the held-out text
HELD_OUT = 65_536  # tokens of it; a router by lot would show a MaxVio of 0.06
DEAD = 0.1  # an expert that gets less than this of its share is called dead

Params = dict[str, np.ndarray]


class Arm(NamedTuple):
    """A way to train: the model, γ and α."""

    config: Config
    speed: float = 0.0
    weight: float = 0.0


ARMS = {
    "neither": Arm(EXPERTS),
    "loss": Arm(EXPERTS, weight=1e-2),
    "bias": Arm(EXPERTS, speed=1e-3),
    "both": Arm(EXPERTS, speed=1e-3, weight=1e-4),
    "bias 0.0001": Arm(EXPERTS, speed=1e-4),
    "bias 0.01": Arm(EXPERTS, speed=1e-2),
    "bias 0.03": Arm(EXPERTS, speed=3e-2),
    "bias 0.1": Arm(EXPERTS, speed=1e-1),
    "dense active": Arm(SMALL),
    "dense total": Arm(replace(SMALL, intermediate_size=ALL)),
}


def windows(length: int = RECIPE.sequence_length) -> np.ndarray:
    """Held-out text as rows of tokens, (N, length + 1)."""
    rows = HELD_OUT // length
    tokens = corpus.load_corpus().held_out[: rows * (length + 1)]
    return tokens.reshape(rows, length + 1).astype(np.int64)


def look(params: Params, config: Config) -> tuple[float, np.ndarray]:
    """Bits a token on held-out text, and the load of each expert there.

    Loads are (layers of experts, E); a dense model has none of them.
    """
    nats, text = 0.0, windows()
    loads = np.zeros((sum(map(config.is_moe_layer, range(config.num_hidden_layers))),
                      config.n_routed_experts or 0))  # fmt: skip
    for ids in np.split(text, len(text) // 64):
        logits, saved = model.forward(params, config, ids[:, :-1])
        nats += cross_entropy_forward(logits, ids[:, 1:])[0] * len(ids)
        for layer, routing in enumerate(model.routings(saved)):
            loads[layer] += moe.load(routing.experts, config.n_routed_experts)
    return float(nats / len(text) / np.log(2)), loads


def experts_by_kind(params: Params, config: Config) -> np.ndarray:
    """How often each expert got a token of each kind: (layers, E, kinds), counts.

    Held-out text; the kind is that of the byte that the position reads.
    """
    text = windows()
    kind = kinds(text.ravel()).reshape(text.shape)[:, :-1]
    counts = np.zeros((config.num_hidden_layers, config.n_routed_experts, len(KINDS)))
    for ids, what in zip(np.split(text, 16), np.split(kind, 16), strict=True):
        _, saved = model.forward(params, config, ids[:, :-1])
        pairs = np.repeat(what.reshape(-1, 1), config.num_experts_per_tok, axis=1)
        for layer, routing in enumerate(model.routings(saved)):
            known = pairs >= 0
            np.add.at(counts[layer], (routing.experts[known], pairs[known]), 1)
    return counts


def balance(loads: np.ndarray) -> dict[str, float]:
    """MaxVio and the share of dead experts, the mean over layers; NaN without any."""
    if not loads.size:
        return {"max_vio": float("nan"), "dead": float("nan")}
    dead = loads < DEAD * loads.mean(axis=1, keepdims=True)
    violations = [moe.max_violation(counts) for counts in loads]
    return {"max_vio": float(np.mean(violations)), "dead": float(dead.mean())}


def train(
    arm: Arm, seed: int, steps: int | None = None, show: Callable = iter
) -> Iterator[tuple[StepRecord, Params]]:
    """Train an arm from scratch, for all the steps of the recipe or for the first."""
    recipe = replace(RECIPE, seed=seed, bias_update_speed=arm.speed,
                     balance_weight=arm.weight)  # fmt: skip
    return runs.train(arm.config, recipe, steps, show)


def rows(name: str, seed: int, show: Callable = iter) -> tuple[Row, list[Row], Params]:
    """One training: what it reached, and the way there."""
    arm, way, spent = ARMS[name], [], 0.0
    began = time.process_time()
    for record, params in train(arm, seed, show=show):
        if record.step % EVERY:
            continue
        spent += time.process_time() - began
        bits, loads = look(params, arm.config)
        way.append({"arm": name, "seed": seed, "step": record.step, "bits": bits}
                   | balance(loads))  # fmt: skip
        began = time.process_time()
    end = {"arm": name, "seed": seed, "ms_per_step": 1000 * spent / RECIPE.steps}
    end |= {"parameters": parameters.count(arm.config), "active": active(arm.config)}
    return end | {k: way[-1][k] for k in ("bits", "max_vio", "dead")}, way, params


def active(config: Config) -> int:
    """Parameters that a token passes through: without the experts not chosen, and
    without the embedding, of which it takes one row.
    """
    E = config.n_routed_experts or 1
    idle = 1 - (config.num_experts_per_tok or 0) / E
    sizes = {k: int(np.prod(s)) for k, s in parameters.shapes(config).items()}
    resting = sum(n for k, n in sizes.items() if ".experts." in k) * idle
    return round(sum(sizes.values()) - sizes["model.embed_tokens.weight"] - resting)


def main() -> int:
    """Train every arm with every seed and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    head = provenance("moe_experiment.py", seeds)
    ends: list[Row] = []
    ways: list[Row] = []
    for seed in seeds:
        for name in ARMS:
            show = partial(tqdm, desc=f"seed {seed}, {name}", total=RECIPE.steps)
            end, way, _ = rows(name, seed, show)
            ends.append(end)
            ways += way
            write("moe_balance", ends, head)
            write("moe_curves", ways, head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
