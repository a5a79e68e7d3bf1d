r"""AdamW, the learning-rate schedule, clipping, and the training loop in NumPy.

The recipe is the report's in small (DeepSeek-V3, §4.2): AdamW with β = (0.9, 0.95),
weight decay 0.1, gradient norm clipped at 1, linear warm-up, cosine decay.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minidsv3.config import Config, TrainConfig
from minidsv3.corpus import batch
from minidsv3.model.numpy_ref import forward, loss_and_grads
from minidsv3.moe.numpy_ref import update_bias
from minidsv3.mtp.numpy_ref import mtp_weight
from minidsv3.parameters import first_not_finite
from minidsv3.primitives.numpy_ref import cross_entropy_forward
from minidsv3.training.held_out import bits_per_byte

Array = np.ndarray
Params = dict[str, Array]


@dataclass
class TrainState:
    """All that changes while a model trains; saved whole, it resumes bit for bit."""

    params: Params
    m: Params  # running mean of the gradient
    v: Params  # running mean of its square
    step: int = 0  # optimiser steps taken


@dataclass(frozen=True)
class StepRecord:
    """What one step reports."""

    step: int  # counts from 1
    losses: dict[str, float]  # nats a token
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float  # wall time of the step
    stats: dict


def new_state(params: Params) -> TrainState:
    """A fresh optimiser around ``params``, which it will update in place."""
    zeros = {name: np.zeros_like(p) for name, p in params.items()}
    return TrainState(params, zeros, {name: z.copy() for name, z in zeros.items()})


def learning_rate(step: int, train_config: TrainConfig) -> float:
    """Rate of optimiser step 1, 2, …, steps: linear warm-up, then a half cosine.

    The last step runs at ``min_learning_rate`` exactly, unless all are warm-up.
    """
    c = train_config
    if step <= c.warmup_steps:
        return c.learning_rate * (step / c.warmup_steps)
    done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
    height = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return c.min_learning_rate + height * (c.learning_rate - c.min_learning_rate)


def clip_gradients(grads: Params, max_norm: float) -> float:
    """Scale all gradients in place so that their joint norm is at most ``max_norm``.

    Returns the norm before. One factor for all keeps the direction.
    """
    squares = sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values())
    norm = math.sqrt(squares)  # in float64: a float32 square overflows beyond 1e19
    if norm > max_norm:
        for g in grads.values():
            g *= max_norm / norm
    return norm


def decays(name: str) -> bool:
    """Whether weight decay applies: not to norms, biases and the embedding."""
    kept_free = ("norm.weight", "bias", "embed_tokens.weight")
    return not name.endswith(kept_free)


def adamw_step(state: TrainState, grads: Params, train_config: TrainConfig) -> float:
    r"""One AdamW update of ``state``, in place; returns the learning rate used.

    :math:`m ← β_1 m + (1-β_1) g`, :math:`v ← β_2 v + (1-β_2) g^2`, both divided by
    :math:`1-β^t` because they started at zero;
    :math:`w ← w - η\,(\hat m / (\sqrt{\hat v} + ε) + λ_{wd}\,w)`. The decay is
    decoupled: it is not divided by :math:`\sqrt{\hat v}` (Loshchilov & Hutter 2019).
    """
    c = train_config
    state.step += 1
    rate = learning_rate(state.step, c)
    m_scale = 1 / (1 - c.beta1**state.step)
    v_scale = 1 / (1 - c.beta2**state.step)
    for name, g in grads.items():
        w, m, v = state.params[name], state.m[name], state.v[name]
        m += (1 - c.beta1) * (g - m)
        v += (1 - c.beta2) * (g * g - v)
        update = (m * m_scale) / (np.sqrt(v * v_scale) + c.adam_eps)
        if decays(name):
            update += c.weight_decay * w
        w -= rate * update
    return rate


def balance(state: TrainState, stats: dict, train_config: TrainConfig) -> None:
    """Move every router's bias, in place, by the load of the batch just trained on.

    Not a gradient step: the optimiser never sees the biases (report, section 2.1.2).
    """
    for name, counts in stats.get("load", {}).items():
        bias = state.params[name]
        bias[:] = update_bias(bias, counts, train_config.bias_update_speed)


def train(
    state: TrainState, config: Config, train_config: TrainConfig, tokens: Array
) -> Iterator[StepRecord]:
    """Train from ``state.step`` to ``train_config.steps``, one record a step.

    A generator: whoever iterates shows progress, saves, or stops, always between two
    whole steps. The batch of a step depends on the seed and the step's number alone, so
    a resumed run reads what the unbroken one would have read.
    """
    c = train_config
    while state.step < c.steps:
        began = time.perf_counter()
        ids = batch(tokens, c.batch_size, c.sequence_length, c.seed, state.step)
        now = replace(c, mtp_weight=mtp_weight(state.step + 1, c))
        losses, grads, stats = loss_and_grads(state.params, config, ids, now)
        grad_norm = clip_gradients(grads, c.clip_norm)
        if not math.isfinite(grad_norm):  # before it reaches the parameters
            raise FloatingPointError(
                f"step {state.step + 1}: the gradient of {first_not_finite(grads)} is "
                "not finite; the state is that of the step before. Resume, or start "
                "again with a lower learning rate"
            )
        rate = adamw_step(state, grads, c)
        balance(state, stats, c)
        seconds = time.perf_counter() - began
        yield StepRecord(state.step, losses, rate, grad_norm, seconds, stats)


def evaluate(
    params: Params,
    config: Config,
    tokens: Array,
    sequence_length: int,
    batch_size: int = 16,
    n_bytes: int | None = None,
) -> float:
    """Bits per byte on ``tokens``; see `minidsv3.training.held_out.bits_per_byte`."""

    def nats(ids: Array) -> float:
        logits, _ = forward(params, config, ids[:, :-1])
        loss, _ = cross_entropy_forward(logits, ids[:, 1:])
        return loss

    return bits_per_byte(nats, tokens, sequence_length, batch_size, n_bytes)
