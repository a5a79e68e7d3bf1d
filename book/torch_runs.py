"""Short trainings and the shipped log: what the chapter on training looks at."""

import csv
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minidsv3 import parameters
from minidsv3.config import Config, TrainConfig
from minidsv3.corpus import Corpus
from minidsv3.training import numpy_ref, run_folder
from minidsv3.training import torch_port as training

Array = np.ndarray


# --- the run that made the shipped model ----------------------------------------------


def log(folder: Path) -> dict[str, Array]:
    """The columns of a run's log."""
    return _columns(folder / run_folder.LOG)


def held_out(folder: Path) -> dict[str, Array]:
    """The curve of the held-out text."""
    return _columns(folder / run_folder.HELD_OUT)


def _columns(path: Path) -> dict[str, Array]:
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    return dict(zip(head, np.array(rows, float).T, strict=True))


def smooth(values: Array, n: int) -> Array:
    """Means of n consecutive values; the rest at the end is left out."""
    whole = len(values) // n * n
    return np.asarray(values[:whole], float).reshape(-1, n).mean(axis=1)


# --- short trainings ------------------------------------------------------------------


@dataclass
class Short:
    """What a short training reported, step by step, and where it ended."""

    state: training.TrainState
    main: Array  # bits per byte
    norm: Array  # of the gradient, before clipping


def fresh(config: Config, recipe: TrainConfig) -> training.TrainState:
    """A model at its start."""
    params = parameters.initialise(config, recipe.seed, recipe.init_std)
    return training.TrainState(config, recipe, numpy_ref.new_state(params))


def branch(state: training.TrainState, recipe: TrainConfig) -> training.TrainState:
    """A copy that goes on by another recipe."""
    tables = ({k: a.copy() for k, a in t.items()} for t in (state.params, state.m,
                                                            state.v))  # fmt: skip
    start = numpy_ref.TrainState(*tables, state.step)
    return training.TrainState(state.model.config, recipe, start)


def short(
    state: training.TrainState,
    recipe: TrainConfig,
    text: Corpus,
    until: int | None = None,
    rounded: bool = False,
) -> Short:
    """Train to the end, or to a step of it.

    ``rounded`` keeps the weights themselves in bfloat16: no master weights.
    """
    main, norm = [], []
    for record in training.train(state, state.model.config, recipe, text.train):
        main.append(record.losses["main"] / np.log(2))
        norm.append(record.grad_norm)
        if rounded:
            with torch.no_grad():
                for weight in state.model.parameters():
                    weight.copy_(weight.bfloat16())
        if record.step == until:
            break
    return Short(state, np.array(main), np.array(norm))


def held_out_bits(state: training.TrainState, text: Corpus, length: int) -> float:
    """Bits per byte on the beginning of the held-out text."""
    return training.evaluate(state.model, text.held_out[:65_536], length)


# --- how fast -------------------------------------------------------------------------


def seconds_a_step(config: Config, recipe: TrainConfig, steps: int = 3) -> dict:
    """Seconds of a step in NumPy and in PyTorch, the best of some."""
    tokens = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint16)
    recipe = replace(recipe, steps=steps + 1, warmup_steps=1)
    params = parameters.initialise(config, 0, recipe.init_std)
    start = numpy_ref.new_state({name: a.copy() for name, a in params.items()})
    runs = {
        "NumPy": numpy_ref.train(start, config, recipe, tokens),
        "PyTorch": training.train(fresh(config, recipe), config, recipe, tokens),
    }
    return {name: min(r.seconds for r in run) for name, run in runs.items()}


def multiplications(config: Config, T: int) -> float:
    """Products a token in the forward pass: active weights, and attention's core."""
    idle = config.n_routed_experts - config.num_experts_per_tok
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = range(config.num_hidden_layers)
    sparse = sum(config.is_moe_layer(n) for n in layers)
    table = parameters.shapes(config)
    weights = sum(np.prod(s) for s in table.values() if len(s) > 1)
    weights -= np.prod(table["model.embed_tokens.weight"]) + sparse * idle * per_expert
    core = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return float(weights + config.num_hidden_layers * core * T / 2)


def product_rate(threads: int, n: int = 1024) -> float:
    """Operations a second of a square product in float32, as torch comes."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, seconds = torch.randn(n, n), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * n**3 / min(seconds)


def passage(text: Corpus, length: int) -> Array:
    """Held-out bytes from the beginning of a function on."""
    ids = text.held_out
    start = bytes(np.minimum(ids, 255).astype(np.uint8)).index(b"\ndef ", 40_000)
    return ids[start : start + length].astype(np.int64)
