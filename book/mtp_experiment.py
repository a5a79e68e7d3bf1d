"""What MTP does to a small model, over several seeds: the numbers of chapter 2.

    OMP_NUM_THREADS=1 python book/mtp_experiment.py --seeds 0 1 2 3 4

``mtp_training.csv``: each seed is trained three times, without a module, with one, and
without one for as many steps as fit into the time that the one with took.
``mtp_agreement.csv``: whether both questions pull the trunk the same way.
``mtp_drafts.csv``: trunks of 2, 4 and 8 layers with a module, trained shorter, write
text with and without drafts. Time is that of the processor, so that a busy machine
disturbs it little. The chapter plots the rows and runs one seed again; a test
recomputes one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from rows import Row, provenance, write
from rows import read as read
from tqdm import tqdm

from minidsv3 import corpus, parameters
from minidsv3.config import PLAIN, Config, TrainConfig
from minidsv3.generation.numpy_ref import generate, speculate
from minidsv3.model import numpy_ref as model
from minidsv3.primitives.numpy_ref import cross_entropy_forward
from minidsv3.training import numpy_ref as training

SMALL = replace(PLAIN, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, intermediate_size=192)  # fmt: skip
RECIPE = TrainConfig(steps=1000, batch_size=8, sequence_length=64, warmup_steps=50,
                     learning_rate=3e-3, min_learning_rate=3e-4)  # fmt: skip
DRAFT_STEPS = 400
LAYERS = (2, 4, 8)
TEMPERATURES = (0.0, 0.8, 1.3)
PROMPTS, PROMPT_BYTES, NEW_BYTES = 20, 32, 64
HELD_OUT = 200_000  # tokens of the held-out text that losses are taken on

EMBEDDING = "model.embed_tokens.weight"

Params = dict[str, np.ndarray]


def small(depths: int, layers: int = SMALL.num_hidden_layers) -> Config:
    """The small model with so many MTP modules behind so many layers."""
    return replace(SMALL, num_nextn_predict_layers=depths, num_hidden_layers=layers)


def train(
    config: Config, seed: int, steps: int, show: Callable = iter
) -> tuple[Params, float]:
    """Train from scratch. Returns the parameters and the milliseconds of a step.

    The trunk begins with the same weights, and reads the same batches, whatever the
    number of modules.
    """
    recipe = replace(RECIPE, seed=seed, steps=steps)
    start = parameters.initialise(config, seed, recipe.init_std)
    state = training.new_state(start)
    text = corpus.load_corpus()
    began = time.process_time()
    for _ in show(training.train(state, config, recipe, text.train)):
        pass
    return state.params, 1000 * (time.process_time() - began) / steps


def held_out_bits(params: Params, config: Config) -> tuple[float, float]:
    """Bits a token on held-out text: of the main model, and of module 1 (or NaN)."""
    tokens, T = corpus.load_corpus().held_out[:HELD_OUT], RECIPE.sequence_length
    rows = len(tokens) // (T + 1)
    windows = tokens[: rows * (T + 1)].reshape(rows, T + 1).astype(np.int64)
    main = mtp = 0.0
    for ids in np.array_split(windows, rows // 16):
        logits, saved = model.forward(params, config, ids[:, :-1])
        main += cross_entropy_forward(logits, ids[:, 1:])[0] * len(ids)
        if config.num_nextn_predict_layers:
            h = model.hidden_states(saved)
            mtp += model.mtp_losses(params, config, ids, h)[0][0] * len(ids)
    nats = np.array([main, mtp or np.nan]) / rows
    return tuple(map(float, nats / np.log(2)))


def training_row(
    arm: str, seed: int, depths: int, steps: int, show: Callable = iter
) -> tuple[Row, Params]:
    """One training: what it cost and what it reached."""
    config = small(depths)
    params, ms = train(config, seed, steps, show)
    main, mtp = held_out_bits(params, config)
    row = {"arm": arm, "seed": seed, "steps": steps, "ms_per_step": ms}
    return {**row, "main_bits": main, "mtp_bits": mtp}, params


def training_rows(seed: int, show: Callable = iter) -> tuple[list[Row], list[Row]]:
    """The three trainings of a seed, and how the two questions agree in the second."""
    plain, _ = training_row("without", seed, 0, RECIPE.steps, show)
    with_mtp, params = training_row("with", seed, 1, RECIPE.steps, show)
    ratio = with_mtp["ms_per_step"] / plain["ms_per_step"]
    steps = round(RECIPE.steps * ratio)
    longer, _ = training_row("equal time", seed, 0, steps, show)
    return [plain, with_mtp, longer], list(agreement_rows(seed, params))


def agreement(params: Params, batch: np.ndarray) -> dict[str, float]:
    """Cosine between the gradients of the main and of the MTP question.

    For each part of the trunk that both reach: embedding, each block, head; all its
    matrices taken as one vector.
    """
    config, parts = small(1), {}
    grads = [
        model.loss_and_grads(params, config, batch, replace(RECIPE, mtp_weight=weight))[
            1
        ]
        for weight in (0.0, 1.0)
    ]
    places = ["model.embed_tokens."]
    places += [f"model.layers.{n}." for n in range(config.num_hidden_layers)]
    for place in [*places, "lm_head."]:
        names = [k for k in grads[0] if k.startswith(place) and grads[0][k].ndim == 2]
        a = np.concatenate([grads[0][k].ravel() for k in names])
        b = np.concatenate([grads[1][k].ravel() for k in names]) - a
        part = place.removeprefix("model.").strip(".")
        parts[part] = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return parts


def agreement_rows(seed: int, trained: Params) -> Iterator[Row]:
    """The cosines before and after a training, on a batch that neither has seen."""
    text = corpus.load_corpus().held_out
    batch = corpus.batch(text, batch_size=64, length=64, seed=seed, step=0)
    start = parameters.initialise(small(1), seed, RECIPE.init_std)
    for when, params in (("start", start), ("end", trained)):
        yield {"arm": when, "seed": seed, **agreement(params, batch)}


def prompts() -> list[np.ndarray]:
    """Beginnings for the model to continue, each (1, T), from held-out text."""
    tokens = corpus.load_corpus().held_out
    places = np.linspace(0, len(tokens) - PROMPT_BYTES, PROMPTS).astype(int)
    return [tokens[p : p + PROMPT_BYTES].astype(np.int64)[None] for p in places]


def draft_row(params: Params, config: Config, temperature: float, seed: int) -> Row:
    """Continue every prompt with and without drafts; count, and look at the clock.

    ``acceptance`` and ``tokens_per_pass`` are counted after the prefill and do not
    depend on the machine; ``speed_up``, time without / time with drafts, does.
    """
    drafts = accepted = passes = tokens = 0
    plain = speculative = 0.0
    for number, ids in enumerate(prompts()):
        sampling = (NEW_BYTES, temperature, 1.0, 1000 * seed + number)
        began = time.process_time()
        generate(params, config, ids, *sampling)
        middle = time.process_time()
        *_, (_, counts) = speculate(params, config, ids, *sampling)
        plain += middle - began
        speculative += time.process_time() - middle
        drafts, accepted = drafts + counts.drafts, accepted + counts.accepted
        passes, tokens = passes + counts.trunk_passes - 1, tokens + counts.tokens - 1
    row = {"seed": seed, "layers": config.num_hidden_layers, "temperature": temperature}
    row |= {"drafts": drafts, "acceptance": accepted / drafts}
    return row | {"tokens_per_pass": tokens / passes, "speed_up": plain / speculative}


def draft_rows(
    seed: int, layers: Sequence[int] = LAYERS, show: Callable = iter
) -> Iterator[Row]:
    """Drafts behind trunks of several depths, at several temperatures."""
    for count in layers:
        config = small(1, count)
        params, _ = train(config, seed, DRAFT_STEPS, show)
        for temperature in TEMPERATURES:
            yield draft_row(params, config, temperature, seed)


def module_cost(layers: int) -> float:
    """What a draft costs, in passes of the trunk: multiplications of module and head
    over those of trunk and head. In DeepSeek-V3 about 1/61 of the layers.
    """
    shapes = parameters.shapes(small(1, layers))
    sizes = {k: int(np.prod(s)) for k, s in shapes.items() if len(s) == 2}
    head = sizes["lm_head.weight"]
    module = sum(n for k, n in sizes.items() if f".layers.{layers}." in k) + head
    return module / (sum(sizes.values()) - module + head - sizes[EMBEDDING])


def pass_costs(layers: int, tries: int = 30) -> tuple[float, float, float]:
    """Milliseconds of a trunk pass over one token and over two, and of a draft.

    With a cache of 64 tokens and fresh weights: the arithmetic does not know the
    difference. The best of many tries.
    """
    config = small(1, layers)
    params = parameters.initialise(config, 0, RECIPE.init_std)
    ids = corpus.load_corpus().held_out[:64].astype(np.int64)[None]
    caches = model.new_caches(config, 64 + 2)
    mtp_cache = model.new_mtp_cache(config, 64 + 1)
    _, saved = model.forward(params, config, ids, caches)
    h = model.hidden_states(saved)
    model.mtp_step(params, config, h, ids, mtp_cache)
    times = []
    for _ in range(tries):
        row = []
        for count in (1, 2):
            began = time.perf_counter()
            model.forward(params, config, ids[:, :count], caches)
            row.append(time.perf_counter() - began)
            for cache in caches:
                cache.crop(64)
        began = time.perf_counter()
        model.mtp_step(params, config, h[:, :1], ids[:, :1], mtp_cache)
        row.append(time.perf_counter() - began)
        mtp_cache.crop(64)
        times.append(row)
    return tuple(float(t) for t in 1000 * np.min(times, axis=0))


def main() -> int:
    """Run every seed and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    names = ("mtp_training", "mtp_agreement", "mtp_drafts")
    tables: dict[str, list[Row]] = {name: [] for name in names}
    for seed in seeds:
        show = partial(tqdm, desc=f"seed {seed}")
        trained, agreed = training_rows(seed, show)
        tables["mtp_training"] += trained
        tables["mtp_agreement"] += agreed
        tables["mtp_drafts"] += draft_rows(seed, show=show)
    for table, rows in tables.items():
        write(table, rows, provenance("mtp_experiment.py", seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
