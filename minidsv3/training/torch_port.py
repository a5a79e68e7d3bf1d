r"""Training in PyTorch: the loop of `minidsv3.training.numpy_ref`, faster.

The same recipe, batches, schedule and records; gradients come from autograd, AdamW is
torch's fused one. What is rounded lower under ``precision="bfloat16"`` are the matrix
products and what passes between them; weights, stored gradients, both moments, the
stream and the router stay in float32, and norms and softmax compute in it (as the
report has it, section 3.3, with bfloat16 in the place of FP8).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minidsv3.config import Config, TrainConfig
from minidsv3.corpus import batch
from minidsv3.model.torch_port import DeepSeekV3, arrays, cross_entropy, tensors
from minidsv3.moe.torch_port import update_bias
from minidsv3.mtp.numpy_ref import mtp_weight
from minidsv3.training import numpy_ref
from minidsv3.training.held_out import bits_per_byte
from minidsv3.training.numpy_ref import StepRecord, decays, learning_rate

Array = np.ndarray


class TrainState:
    """A model and its optimiser; `params`, `m` and `v` show it as the NumPy one's.

    So both kinds of state are saved by the same lines, under the same names.
    """

    def __init__(
        self,
        config: Config,
        train_config: TrainConfig,
        start: numpy_ref.TrainState,
        device: str | torch.device = "cpu",
    ) -> None:
        with torch.device("meta"):
            self.model = DeepSeekV3(config)
        self.model.load_state_dict(tensors(start.params), assign=True)
        self.model.to(device)
        self.step = start.step
        self.optimiser = _adamw(self.model, train_config)
        for name, weight in self.model.named_parameters():
            self.optimiser.state[weight] = {
                # on the weight's device, which the fused optimiser reads it on
                "step": torch.tensor(start.step, dtype=torch.float32, device=device),
                "exp_avg": torch.from_numpy(start.m[name]).to(device),
                "exp_avg_sq": torch.from_numpy(start.v[name]).to(device),
            }

    @property
    def params(self) -> dict[str, Array]:
        """The weights, and the biases of the routers."""
        return arrays(self.model)

    @property
    def m(self) -> dict[str, Array]:
        """Running mean of the gradient."""
        return self._moment("exp_avg")

    @property
    def v(self) -> dict[str, Array]:
        """Running mean of its square."""
        return self._moment("exp_avg_sq")

    def _moment(self, which: str) -> dict[str, Array]:
        """A moment by name; zeros for the biases, as the NumPy state has them."""
        biases = {name: torch.zeros_like(b) for name, b in self.model.named_buffers()}
        moments = {
            name: self.optimiser.state[weight][which]
            for name, weight in self.model.named_parameters()
        }
        return {name: t.cpu().numpy() for name, t in (moments | biases).items()}


def _adamw(model: DeepSeekV3, c: TrainConfig) -> torch.optim.AdamW:
    """Weight decay for what `decays` names, none for the rest."""
    named = list(model.named_parameters())
    groups = [
        {"params": [w for name, w in named if decays(name)]},
        {"params": [w for name, w in named if not decays(name)], "weight_decay": 0.0},
    ]
    betas, decay = (c.beta1, c.beta2), c.weight_decay
    return torch.optim.AdamW(
        groups, c.learning_rate, betas, c.adam_eps, decay, fused=True
    )


def train(
    state: TrainState, config: Config, train_config: TrainConfig, tokens: Array
) -> Iterator[StepRecord]:
    """Train from ``state.step`` to ``train_config.steps``, one record a step.

    A generator, as the NumPy `train` is, with the same batches. With ``accumulate`` a
    batch is worked off in as many parts, which takes less memory and gives the same
    gradient. Raises FloatingPointError, before the weights change, for a gradient that
    is not finite.
    """
    c, model = train_config, state.model
    device = next(model.parameters()).device
    while state.step < c.steps:
        began = time.perf_counter()
        ids = batch(tokens, c.batch_size, c.sequence_length, c.seed, state.step)
        now = replace(c, mtp_weight=mtp_weight(state.step + 1, c))
        losses, loads = _gradients(model, torch.from_numpy(ids).to(device), now)
        grad_norm = _clip(model, c.clip_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"step {state.step + 1}: the gradient of {_first_not_finite(model)} is "
                "not finite; the state is that of the step before. Resume, or start "
                "again with a lower learning rate"
            )
        rate = learning_rate(state.step + 1, c)
        for group in state.optimiser.param_groups:
            group["lr"] = rate
        state.optimiser.step()
        state.step += 1
        for name, counts in loads.items():
            update_bias(model.get_buffer(name), counts, c.bias_update_speed)
        stats = {"load": {n: counts.cpu().numpy() for n, counts in loads.items()}}
        seconds = time.perf_counter() - began
        yield StepRecord(
            state.step, losses, rate, grad_norm, seconds, stats if loads else {}
        )


def _gradients(
    model: DeepSeekV3, ids: Tensor, c: TrainConfig
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Fill every gradient with the mean over the batch; its losses and loads."""
    model.zero_grad()
    losses: dict[str, float] = {}
    loads: dict[str, Tensor] = {}
    for part in ids.chunk(c.accumulate):
        with autocast(model, c.precision):
            part_losses, part_load = model.loss(part, c)
        (part_losses["total"] / c.accumulate).backward()
        for name, loss in part_losses.items():
            losses[name] = losses.get(name, 0.0) + loss.item() / c.accumulate
        for name, counts in part_load.items():
            loads[name] = loads[name] + counts if name in loads else counts
    return losses, loads


def autocast(model: DeepSeekV3, precision: str) -> torch.autocast:
    """Matrix products in ``precision``, "float32" or "bfloat16"."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def _clip(model: DeepSeekV3, max_norm: float) -> float:
    """As the NumPy `clip_gradients`: all by one factor, and only if they are longer."""
    grads = [w.grad for w in model.parameters() if w.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item()
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


def _first_not_finite(model: DeepSeekV3) -> str:
    """Whose gradient to name: of a weight that is broken itself, if there is one."""
    named = [(name, w) for name, w in model.named_parameters() if w.grad is not None]
    broken = [name for name, w in named if not w.isfinite().all()]
    if broken:
        return f"{broken[0]} (which holds NaN or infinity itself)"
    spoiled = [name for name, w in named if not w.grad.isfinite().all()]
    return spoiled[0] if spoiled else "all together (each is finite, their norm is not)"


@torch.no_grad()
def evaluate(
    model: DeepSeekV3,
    tokens: Array,
    sequence_length: int,
    batch_size: int = 16,
    precision: str = "float32",
    n_bytes: int | None = None,
) -> float:
    """Bits per byte on ``tokens``, as the NumPy `evaluate` counts them."""
    device = next(model.parameters()).device

    def nats(ids: Array) -> float:
        given = torch.from_numpy(ids).to(device)
        with autocast(model, precision):
            logits = model(given[:, :-1])
        return cross_entropy(logits, given[:, 1:]).item()

    return bits_per_byte(nats, tokens, sequence_length, batch_size, n_bytes)


def chosen_device(name: str | None) -> str:
    """The device of that name, or the best there is: cuda, mps, else cpu.

    Raises ValueError for one that this machine or this build of torch does not have.
    """
    if name is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"torch has no such device here ({error})") from error
    return name
