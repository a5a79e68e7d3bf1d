"""MTP: what it costs in training, and what drafting gains in decoding.

Plain and speculative decoding take turns on the same weights and prompts. The weights
are those of a short training on Python's own sources, so that drafts are worth
something; a longer training keeps more of them.
"""

import dataclasses

import numpy as np
import pytest

from minidsv3 import parameters
from minidsv3.config import PLAIN, TrainConfig
from minidsv3.corpus import encode, load_corpus
from minidsv3.generation.numpy_ref import generate, speculate
from minidsv3.model.numpy_ref import loss_and_grads
from minidsv3.training.numpy_ref import new_state, train
from tests.benchmarks.test_plain import seconds
from tests.test_model import ids

CONFIG = dataclasses.replace(PLAIN, num_nextn_predict_layers=1)
RECIPE = TrainConfig(steps=150, batch_size=8, sequence_length=64, warmup_steps=20)
PROMPTS = ["def ", "import ", "class A", "    return ", "for i in "]
LENGTH = 120


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    state = new_state(parameters.initialise(CONFIG, 0, RECIPE.init_std))
    for _ in train(state, CONFIG, RECIPE, load_corpus().train):
        pass
    return state.params


def test_a_training_step_with_and_without() -> None:
    tokens = ids(16, 129, config=PLAIN)
    with_module = parameters.initialise(CONFIG, 0, RECIPE.init_std)
    without = parameters.initialise(PLAIN, 0, RECIPE.init_std)
    times = [
        (
            seconds(lambda: loss_and_grads(with_module, CONFIG, tokens, RECIPE)),
            seconds(lambda: loss_and_grads(without, PLAIN, tokens, RECIPE)),
        )
        for _ in range(9)
    ][1:]
    a, b = (min(column) for column in zip(*times, strict=True))
    print(f"\nloss and gradients, 16 × 128 bytes   D = 1 {1e3 * a:7.1f} ms   "
          f"D = 0 {1e3 * b:7.1f} ms   ratio {a / b:4.2f}")  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_plain_and_speculative_decoding(params, temperature: float) -> None:
    texts = [encode(prompt)[None].astype(int) for prompt in PROMPTS]

    def run(speculative: bool) -> float:
        return sum(
            seconds(
                lambda x=x: generate(
                    params, CONFIG, x, LENGTH, temperature, 1.0, 0, speculative
                )
            )
            for x in texts
        )

    times = [(run(False), run(True)) for _ in range(4)][1:]
    plain, drafted = (min(column) for column in zip(*times, strict=True))
    ends = [
        list(speculate(params, CONFIG, x, LENGTH, temperature, 1.0, 0))[-1][1]
        for x in texts
    ]
    kept = sum(c.accepted for c in ends) / sum(c.drafts for c in ends)
    per_pass = sum(c.tokens for c in ends) / sum(c.trunk_passes for c in ends)
    n = LENGTH * len(texts)
    print(f"\ntemperature {temperature}: plain {n / plain:5.0f} tokens/s   speculative "
          f"{n / drafted:5.0f} tokens/s   ratio {plain / drafted:4.2f}   "
          f"{kept:.0%} of the drafts kept, {per_pass:.2f} tokens a pass")  # fmt: skip
