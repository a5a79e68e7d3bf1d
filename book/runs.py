"""A training on Python's own text, handed on step by step: what experiments share."""

from collections.abc import Callable, Iterator

import numpy as np

from minidsv3 import corpus, parameters
from minidsv3.config import Config, TrainConfig
from minidsv3.training import numpy_ref as training

Params = dict[str, np.ndarray]


def train(
    config: Config,
    recipe: TrainConfig,
    steps: int | None = None,
    show: Callable = iter,
    start: Params | None = None,
) -> Iterator[tuple[training.StepRecord, Params]]:
    """One record and the parameters, which move, a step; from scratch or from a start.

    Two models with the same recipe begin with the same weights wherever both have them,
    and read the same batches. The schedule is that of the whole run, so fewer steps are
    its beginning.
    """
    if start is None:
        start = parameters.initialise(config, recipe.seed, recipe.init_std)
    state = training.new_state(start)
    text = corpus.load_corpus().train
    for record in show(training.train(state, config, recipe, text)):
        yield record, state.params
        if record.step == steps:
            return
