"""The plain transformer: NumPy against torch eager, side by side in one run.

Both have the same weights, batch, precision and number of threads, and take turns, so
that a busy machine disturbs both alike. The figure is the ratio of the best times.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3 import parameters
from minidsv3.config import PLAIN, TrainConfig
from minidsv3.generation.numpy_ref import generate
from minidsv3.model.numpy_ref import forward, loss_and_grads
from tests.test_model import ids, torch_model

RECIPE = TrainConfig()
PARAMS = parameters.initialise(PLAIN, 0, RECIPE.init_std)
TENSORS = {k: torch.tensor(p, requires_grad=True) for k, p in PARAMS.items()}


def seconds(f: Callable) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def side_by_side(title: str, ours: Callable, theirs: Callable) -> None:
    """Print the best time of each, after one turn to warm up, and their ratio."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(12)][1:]
    a, b = (min(column) for column in zip(*times, strict=True))
    print(f"\n{title:34} NumPy {1e3 * a:7.1f} ms   torch {1e3 * b:7.1f} ms   "
          f"ratio {a / b:4.2f}")  # fmt: skip


def test_forward() -> None:
    tokens = ids(16, 128, config=PLAIN)

    def theirs() -> None:
        with torch.no_grad():
            torch_model(TENSORS, PLAIN, torch.tensor(tokens))

    side_by_side(
        "forward, 16 × 128 bytes", lambda: forward(PARAMS, PLAIN, tokens), theirs
    )


def test_loss_and_gradients() -> None:
    tokens = ids(16, 129, config=PLAIN)

    def theirs() -> None:
        t = torch.tensor(tokens)
        logits = torch_model(TENSORS, PLAIN, t[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten())
        torch.autograd.grad(loss, list(TENSORS.values()))

    def ours() -> None:
        loss_and_grads(PARAMS, PLAIN, tokens, RECIPE)

    side_by_side("loss and gradients, 16 × 128 bytes", ours, theirs)


def test_cached_decoding_against_reading_everything_again() -> None:
    prompt = ids(1, 8, config=PLAIN)

    def uncached() -> None:
        text = prompt
        for _ in range(120):
            logits, _ = forward(PARAMS, PLAIN, text)
            text = np.append(text, logits[:, -1:].argmax(-1), axis=1)

    a = min(seconds(lambda: generate(PARAMS, PLAIN, prompt, 120)) for _ in range(3))
    b = min(seconds(uncached) for _ in range(3))
    print(f"\n120 bytes: cached {1e3 * a:.0f} ms, reading all again {1e3 * b:.0f} ms, "
          f"ratio {b / a:.1f}")  # fmt: skip
