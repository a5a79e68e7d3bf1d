"""What chapter 9 counts and computes on its page: bytes, calls, experts, laws."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from minidsv3 import parameters
from minidsv3.config import Config
from minidsv3.generation.decoding import Session
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.moe.torch_port import Routing

Array = np.ndarray


# --- the clock ------------------------------------------------------------------------


def seconds(run: Callable[[], object], tries: int = 1) -> float:
    """The best of some tries."""
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def step_seconds(session: Session, ids: Array, T: int, tries: int) -> float:
    """The best of steps over T tokens each, none of them kept: ids (1, ≥ T * tries)."""
    parts = iter(np.split(ids[:, : T * tries], tries, axis=1))
    return seconds(lambda: session.step(next(parts)), tries)


def cold_products(
    product: Callable[[Array, Array], object], rows: int, size: int = 2048
) -> float:
    """Seconds of x (rows, size) times a matrix that is in no cache; the best of 12.

    Six matrices take turns: together they are larger than what a processor keeps near.
    """
    rng = np.random.default_rng(0)
    matrices = iter([rng.random((size, size), np.float32) for _ in range(6)] * 2)
    x = rng.random((rows, size), np.float32)
    return seconds(lambda: product(x, next(matrices)), 12)


class Calls(NamedTuple):
    """Operations of torch in one run."""

    asked: int  # by Python
    inside: int  # all that these are made of
    products: int  # matrix products among them


def library_calls(run: Callable[[], object]) -> Calls:
    """Count what torch's profiler sees."""
    run()  # what is done only once is done
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    events = seen.events()
    asked = sum(event.cpu_parent is None for event in events)
    products = sum(event.name in ("aten::mm", "aten::bmm") for event in events)
    return Calls(asked, len(events), products)


# --- what a pass reads ----------------------------------------------------------------


class Weights(NamedTuple):
    """Numbers that a pass reads of a trunk and head, and of an MTP module and head."""

    dense: float  # whatever is asked
    expert: float  # of one expert
    layers: int  # that have experts
    module_dense: float  # of the module, with the head

    def of_a_pass(self, config: Config, tokens: float) -> float:
        """Read by a pass over so many tokens that choose experts independently."""
        return self.dense + self.layers * visited(config, tokens) * self.expert

    def of_a_draft(self, config: Config, tokens: float) -> float:
        """Read by the module for so many tokens."""
        return self.module_dense + visited(config, tokens) * self.expert


def weights(config: Config) -> Weights:
    """Counted from the table of shapes; of the embedding a pass reads a row or two."""
    trunk = dict(parameters.shapes(replace(config, num_nextn_predict_layers=0)))
    both = dict(parameters.shapes(config))
    embedding, head = "model.embed_tokens.weight", np.prod(trunk["lm_head.weight"])
    routed = [n for n in trunk if ".experts." in n]
    layers = len({n.split(".")[2] for n in routed})
    expert = sum(np.prod(trunk[n], dtype=float) for n in routed)
    expert /= layers * config.n_routed_experts
    others = {k: np.prod(s, dtype=float) for k, s in both.items() if k not in routed}
    dense = sum(others[k] for k in trunk if k in others and k != embedding)
    module = [k for k in both if k not in trunk and ".experts." not in k]
    return Weights(dense, expert, layers, sum(others[k] for k in module) + head)


def visited(config: Config, tokens: float) -> float:
    """Experts of a layer that tokens visit if each chooses K of E at random."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    return E * (1 - (1 - K / E) ** tokens)


def gain_by_bytes(config: Config, kept: float, texts: float) -> float:
    """Speed with drafts over speed without, if a pass lasts as long as its reading.

    Weights alone; each of the texts takes one token a pass, or two and a draft.
    """
    numbers = weights(config)
    one = numbers.of_a_pass(config, texts)
    two = numbers.of_a_pass(config, 2 * texts) + numbers.of_a_draft(config, texts)
    return (1 + kept) * one / two


def experts_visited(routings: list[Routing], rows: Array) -> float:
    """Experts that these tokens visit together, the mean over layers and draws.

    rows (draws, tokens) are places in the text that was routed.
    """
    counts = [
        len(np.unique(routing.experts.flatten(0, -2).numpy()[some]))
        for routing in routings
        for some in rows
    ]
    return float(np.mean(counts))


# --- drafts and their laws ------------------------------------------------------------


@torch.no_grad()
def both_logits(model: DeepSeekV3, ids: Array) -> tuple[Array, Array, list[Routing]]:
    """Logits of trunk and module for the same tokens: ids (B, T) -> (B * (T - 2), V).

    The trunk has read the token before, the module one less and that token as such.
    """
    tokens = torch.from_numpy(ids)
    h, routings = model.hidden_states(tokens)
    cache = model.new_caches(ids.shape[1])[0]
    z = model.draft_states(h[:, :-1], tokens[:, 1:], cache)
    p, q = model.lm_head(h[:, 1:-1]), model.lm_head(z[:, :-1])
    return p.flatten(0, 1).numpy(), q.flatten(0, 1).numpy(), routings


def overlap(p: Array, q: Array) -> float:
    """The share of drafts that is kept: the mean of Σ min(p, q) over rows (N, V)."""
    return float(np.minimum(p, q).sum(axis=-1).mean())


def distance(p: Array, q: Array) -> float:
    """Total variation, the mean over rows."""
    return 1 - overlap(p, q)


def written(p: Array, q: Array, drawn: Array) -> tuple[Array, float]:
    """The law that comes out, (N, V), and the share of drafts kept.

    The drafts are drawn from ``drawn`` and judged with p and q: kept with probability
    min(1, p / q), else replaced from what p has beyond q. Right if drawn is q.
    """
    keep = np.minimum(1.0, p / np.maximum(q, 1e-300))
    kept = drawn * keep
    rest = np.maximum(p - q, 0.0)
    rest /= np.maximum(rest.sum(axis=-1, keepdims=True), 1e-300)
    refused = 1 - kept.sum(axis=-1, keepdims=True)
    return kept + refused * rest, float(kept.sum(axis=-1).mean())
