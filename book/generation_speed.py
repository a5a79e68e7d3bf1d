"""What a token costs, by context and by who computes; what drafts bring: chapter 9.

    python book/generation_speed.py --threads 2

``generation_speed.csv``: milliseconds a token of one model (that of chapter 7's table,
fresh weights) with 64, 1,024 and 8,192 tokens behind it, for Hugging Face transformers
with the same weights, our modules, our compiled loops, and the plain reading of as
many bytes as one token's weights have. ``speculation.csv``: the shipped `MINI`, by kind
of text and temperature: drafts kept, time with and without. ``draft_costs.csv``: passes
over one token and over two and a draft, for models of several depths.

Each arm is a process of its own, and all are gone through twice; the better counts.
Needs transformers.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from typing import Any
from unittest import mock

import numpy as np
import torch
from rows import RESULTS as RESULTS
from rows import Row, write
from rows import read as read
from torch_speed import CONFIG, STD, their_model
from tqdm import tqdm

from minidsv3 import corpus, parameters
from minidsv3.config import MINI, Config
from minidsv3.generation import decoder_for, stream
from minidsv3.generation.decoding import Decoder
from minidsv3.generation.torch_port import ModuleDecoder
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.shipped import MINI_FOLDER

CONTEXTS = (64, 1024, 8192)
READING = ("reading", "reading, one core")  # the loops use one, but for a long past
ARMS = ("transformers", "modules, naive", "modules", "compiled", *READING)
ENGINES: dict[str, Callable[[DeepSeekV3], Decoder]] = {
    "modules": ModuleDecoder,
    "compiled": decoder_for,
}
TEMPERATURES = (0.0, 0.6, 1.0)
DEPTHS = (3, 6, 12, 24)
STEPS = 48  # tokens that are timed


# --- a token, by context --------------------------------------------------------------


def active_bytes(config: Config) -> int:
    """Bytes of the float32 weights that one token needs, head included.

    Of the embedding it needs one row, of the routed experts K.
    """
    total = 0
    for name, shape in parameters.shapes(config).items():
        if "embed_tokens" in name:
            total += shape[-1]
        elif ".experts." in name:
            share = config.num_experts_per_tok / config.n_routed_experts
            total += int(np.prod(shape) * share)
        else:
            total += int(np.prod(shape))
    return 4 * total


def prompt(context: int) -> np.ndarray:
    """Random ids (1, context), the same for everyone."""
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, context))


def seconds_of_ours(decoder: Decoder, context: int) -> tuple[list[float], int]:
    """Seconds of each greedy token behind the first, and bytes of the cache."""
    steps = stream(decoder, prompt(context), STEPS, speculative=False)
    return list(intervals(steps)), cache_bytes(context)


def cache_bytes(context: int) -> int:
    """Of our cache at so many tokens, counted from its arrays."""
    model = DeepSeekV3(CONFIG, init_std=STD)
    caches = model.new_caches(context)
    with torch.inference_mode():
        model.hidden_states(torch.from_numpy(prompt(context)), caches)
    return sum(cache.nbytes for cache in caches)


def intervals(steps: Iterator) -> Iterator[float]:
    """Seconds between one answer and the next; the first includes the prompt."""
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        yield now - began
        began = now


def seconds_of_transformers(context: int) -> tuple[list[float], int]:
    """The same for transformers, one call of the model a token, its own cache."""
    from transformers import DynamicCache

    model = their_model().eval()
    cache = DynamicCache(config=model.config)

    def steps() -> Iterator[None]:
        ids = torch.from_numpy(prompt(context))
        with torch.inference_mode():
            for _ in range(STEPS):
                logits = model(ids, past_key_values=cache, use_cache=True).logits
                ids = logits[:, -1:].argmax(-1)
                yield

    found = list(intervals(steps()))
    held = sum(
        layer.keys[:, :, :context].nbytes + layer.values[:, :, :context].nbytes
        for layer in cache.layers
    )
    return found, held


def seconds_of_reading() -> list[float]:
    """Seconds to add up as many numbers as one token's weights, cold, in one piece."""
    numbers = active_bytes(CONFIG) // 4
    arena = torch.randn(20 * numbers)
    found = []
    for i in range(60):
        piece = arena[(i * 7 % 19) * numbers :][:numbers]
        began = time.perf_counter()
        piece.sum()
        found.append(time.perf_counter() - began)
    return found


def token_here(arm: str, context: int, threads: int) -> Row:
    """One arm at one context in this process."""
    torch.set_num_threads(1 if arm == READING[1] else threads)
    held = 0
    if arm in READING:
        seconds = seconds_of_reading()
    elif arm == "transformers":
        seconds, held = seconds_of_transformers(context)
    else:
        model = DeepSeekV3(CONFIG, init_std=STD)
        decoder = ENGINES[arm.split(",")[0]](model)
        with naive_attention(arm.endswith("naive")):
            seconds, held = seconds_of_ours(decoder, context)
    return {
        "arm": arm, "context": context, "ms": 1e3 * float(np.median(seconds)),
        "cache_bytes": held,
    }  # fmt: skip


def naive_attention(wanted: bool) -> Any:
    """Where wanted, every head's keys and values are made again for every token."""
    from minidsv3.mla.torch_port import LatentAttention

    how = LatentAttention.attend_naive if wanted else LatentAttention.attend_absorbed
    return mock.patch.object(LatentAttention, "attend_absorbed", how)


# --- drafts ---------------------------------------------------------------------------


def prompts(kind: str, how_many: int = 6, length: int = 128) -> list[np.ndarray]:
    """Texts (1, length) that `MINI` has not seen, of one kind.

    Code and documentation are of the held-out files; "a list" counts, line by line.
    """
    if kind == "a list":
        texts = [
            "".join(f"    {name}_{i} = {i}\n" for i in range(40)) for name in "abcdef"
        ]
        return [corpus.encode(t)[None, :length].astype(np.int64) for t in texts]
    held_out = corpus.load_corpus().held_out.astype(np.int64)
    documents = np.split(held_out, np.flatnonzero(held_out == corpus.BOUNDARY))
    is_code = {"code": True, "documentation": False}[kind]
    found = []
    for document in documents:
        text = corpus.decode(document)
        looks_like_code = "import " in text and "def " in text
        if len(document) > 4 * length and looks_like_code == is_code:
            start = len(document) // 2
            found.append(document[None, start : start + length])
    return found[:how_many]


def speculation_here(engine: str, threads: int, new: int = 200) -> list[Row]:
    """Every kind and temperature, with drafts and without, in this process."""
    torch.set_num_threads(threads)
    model = DeepSeekV3.from_pretrained(MINI_FOLDER)
    decoder = ENGINES[engine](model)
    found = []
    for kind in ("code", "documentation", "a list"):
        for temperature in TEMPERATURES:
            times = {False: 0.0, True: 0.0}
            tokens = passes = drafts = accepted = 0
            for seed, ids in enumerate(prompts(kind)):
                for speculative in times:
                    asked = (decoder, ids, new, temperature, 1.0, speculative, seed)
                    list(stream(*asked[:2], 8, *asked[3:]))  # caches warm
                    steps = stream(*asked)
                    next(steps)  # the prompt is not counted
                    began = time.perf_counter()
                    *_, last = steps
                    times[speculative] += time.perf_counter() - began
                counts = last.statistics
                tokens, passes = tokens + counts.tokens, passes + counts.trunk_passes
                drafts, accepted = drafts + counts.drafts, accepted + counts.accepted
            found.append({
                "engine": engine, "kind": kind, "temperature": temperature,
                "acceptance": accepted / drafts, "tokens_per_pass": tokens / passes,
                "plain_ms": 1e3 * times[False] / tokens,
                "speculative_ms": 1e3 * times[True] / tokens,
            })  # fmt: skip
    return found


def costs_here(engine: str, threads: int, depths: tuple[int, ...]) -> list[Row]:
    """Milliseconds of the parts of a round, at 128 tokens of context."""
    torch.set_num_threads(threads)
    found = []
    for layers in depths:
        model = DeepSeekV3(replace(MINI, num_hidden_layers=layers), init_std=STD)
        session = ENGINES[engine](model).session(1, 160, True, 512)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 256, (1, 128))
        session.prefill(ids, np.array([128]))
        times: dict[str, list[float]] = {"one": [], "two": [], "draft": []}
        for _ in range(40):
            pair = rng.integers(0, 256, (1, 2))  # other tokens, other experts
            for part, run, asked in (
                ("one", session.step, (pair[:, :1],)),
                ("two", session.step, (pair,)),
                ("draft", session.draft, (pair, np.array([2]))),
            ):
                began = time.perf_counter()
                run(*asked)
                times[part].append(time.perf_counter() - began)
        medians = {part: 1e3 * float(np.median(t)) for part, t in times.items()}
        found.append({"engine": engine, "layers": layers, **medians})
    return found


# --- all of it ------------------------------------------------------------------------


def in_a_process(what: str, threads: int, *words: str) -> Any:
    """One measurement, in a process of its own: the rows it printed."""
    command = [sys.executable, __file__, "--threads", str(threads), "--only", what]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{what} {words}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def token(arm: str, context: int, threads: int) -> Row:
    """`token_here` in a process of its own."""
    return in_a_process("token", threads, "--arm", arm, "--context", str(context))


def better(first: Row, second: Row) -> Row:
    """Of two measurements of one thing, times of the quieter one."""
    times = {"ms", "plain_ms", "speculative_ms", "one", "two", "draft"}
    return {k: min(v, second[k]) if k in times else v for k, v in first.items()}


def twice(rows: Callable[[], list[Row]]) -> list[Row]:
    """Go through all rows two times; the better of each."""
    return [better(*pair) for pair in zip(rows(), rows(), strict=True)]


def main() -> None:
    """Measure everything, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="token, speculation or costs: measure, print it")
    parser.add_argument("--arm", choices=[*ARMS, *ENGINES])
    parser.add_argument("--context", type=int)
    options = parser.parse_args()
    threads = options.threads
    if options.only:
        here: dict[str, Callable[[], Any]] = {
            "token": lambda: token_here(options.arm, options.context, threads),
            "speculation": lambda: speculation_here(options.arm, threads),
            "costs": lambda: costs_here(options.arm, threads, DEPTHS),
        }
        print(json.dumps(here[options.only]()))
        return
    import transformers

    head = [
        f"# python book/generation_speed.py --threads {threads}",
        f"# {date.today()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {threads} threads",
    ]
    cases = [(arm, n) for n in CONTEXTS for arm in ARMS]
    found = twice(lambda: [token(*case, threads) for case in tqdm(cases)])
    write("generation_speed", found, head)
    for table, what in (("draft_costs", "costs"), ("speculation", "speculation")):

        def rows(what: str = what) -> list[Row]:
            each = [in_a_process(what, threads, "--arm", e) for e in tqdm(ENGINES)]
            return [row for rows in each for row in rows]

        write(table, twice(rows), head)


if __name__ == "__main__":
    main()
