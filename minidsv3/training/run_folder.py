"""A training run on disk: its state, its log, and the model that comes out.

::

    config.json  model.safetensors     the model, as `minidsv3.checkpoints` writes it
    training_state.safetensors         weights, both Adam moments, the step: to resume
    log.csv                            one row a step, with a column for each loss,
                                       and MaxVio of the batch if there are experts
    held_out.csv                       bits per byte on held-out text, where asked for
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from minidsv3 import checkpoints
from minidsv3.config import Config, TrainConfig
from minidsv3.files import replacing
from minidsv3.model.numpy_ref import loss_names
from minidsv3.moe.numpy_ref import max_violation
from minidsv3.parameters import ParameterError, cut, first_not_finite, prefixed
from minidsv3.safetensors_files import CheckpointError, read_tensors, write_tensors
from minidsv3.training.numpy_ref import StepRecord, TrainState

STATE = "training_state.safetensors"
LOG = "log.csv"
HELD_OUT = "held_out.csv"
COLUMNS = ["step", "loss_nats", "learning_rate", "grad_norm", "seconds"]
HELD_OUT_COLUMNS = ["step", "bits_per_byte"]


def is_used(folder: Path) -> bool:
    """Whether ``folder`` holds a run or a model, which a new run would overwrite."""
    names = (STATE, LOG, checkpoints.WEIGHTS, checkpoints.INDEX)
    return any((folder / name).exists() for name in names)


def identity(folder: Path) -> tuple[int | None, str | None]:
    """What a run was trained with: its sequence length, and the hash of its text.

    Both are None where ``folder`` holds a model and no run.
    """
    if not (folder / STATE).is_file():
        return None, None
    _, metadata = read_tensors(folder / STATE)
    recipe, text = json.loads(metadata["recipe"]), json.loads(metadata["text"])
    return recipe["sequence_length"], text


def save(
    folder: Path,
    state: TrainState,
    config: Config,
    tc: TrainConfig,
    corpus: str,
    backend: str = "numpy",
) -> None:
    """Write state and model. ``corpus`` is the hash of the text that is trained on.

    ``backend`` is "numpy" or "torch": each rounds in its own way, so a run that is
    resumed with another would not be the same run.

    All that resuming needs is one file, replaced in one step: killed at any moment, the
    folder holds the old state or the new one, never a mixture. Raises ParameterError
    for a state that holds NaN or infinity, and leaves what is there.
    """
    tensors = {
        **prefixed("params/", state.params),
        **prefixed("m/", state.m),
        **prefixed("v/", state.v),
    }
    if culprit := first_not_finite(tensors):
        raise ParameterError(f"not saved: {culprit} holds NaN or infinity")
    metadata = {"step": str(state.step), **_identity(config, tc, corpus, backend)}
    write_tensors(folder / STATE, tensors, metadata)
    checkpoints.save(folder, config, state.params)


def resume(
    folder: Path,
    config: Config,
    tc: TrainConfig,
    corpus: str,
    backend: str = "numpy",
) -> TrainState:
    """Read the state back, to continue as if nothing had happened.

    Raises CheckpointError if there is none, or if the run was started with another
    config, recipe, text or backend (naming the fields): it would not be the same run.
    """
    if not (folder / STATE).is_file():
        raise CheckpointError(f"{folder} holds no {STATE}: there is no run to resume")
    tensors, metadata = read_tensors(folder / STATE)
    for part, wanted in _identity(config, tc, corpus, backend).items():
        if metadata.get(part) != wanted:
            raise CheckpointError(
                f"{folder} was started with another {part}: "
                f"{_difference(metadata.get(part), wanted)}. "
                "Give the same values again, or train into another folder"
            )
    step = int(metadata["step"])
    _forget_rows_after(folder / LOG, step, _columns(loss_names(config)))
    _forget_rows_after(folder / HELD_OUT, step, HELD_OUT_COLUMNS)
    parts = (cut(tensors, f"{name}/") for name in ("params", "m", "v"))
    return TrainState(*parts, step)


def append_log(folder: Path, record: StepRecord) -> None:
    """Add one row to the log."""
    row = [
        record.step,
        record.losses["total"],
        record.learning_rate,
        record.grad_norm,
        f"{record.seconds:.4f}",
        *(record.losses[name] for name in _parts(record.losses)),
        *_fullest(record.stats),
    ]
    _append(folder / LOG, _columns(record.losses), row)


def append_held_out(folder: Path, step: int, bits: float) -> None:
    """Add one row to the curve of the held-out text, in bits per byte."""
    _append(folder / HELD_OUT, HELD_OUT_COLUMNS, [step, bits])


def _append(path: Path, columns: list[str], row: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([columns, row] if fresh else [row])


def _parts(losses: Iterable[str]) -> list[str]:
    """The losses that the total is made of, if there are several."""
    names = [name for name in losses if name != "total"]
    return names if len(names) > 1 else []


def _fullest(stats: dict) -> list[float]:
    """MaxVio of the batch, the mean over layers of experts; nothing without any."""
    loads = stats.get("load", {}).values()
    return [sum(map(max_violation, loads)) / len(loads)] if loads else []


def _columns(losses: Iterable[str]) -> list[str]:
    """The header: the balance loss is a pure number, and MaxVio comes with it."""
    names = _parts(losses)
    parts = [name if name == "balance" else f"{name}_nats" for name in names]
    return COLUMNS + parts + (["max_vio"] if "balance" in names else [])


def _identity(
    config: Config, tc: TrainConfig, corpus: str, backend: str
) -> dict[str, str]:
    return {
        "config": json.dumps(asdict(config), sort_keys=True),
        "recipe": json.dumps(asdict(tc), sort_keys=True),
        "text": json.dumps(corpus),
        "backend": json.dumps(backend),
    }


def _difference(found: str | None, wanted: str) -> str:
    """The fields that differ, as ``name: then -> now``."""
    then, now = json.loads(found or "null"), json.loads(wanted)
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{then} -> {now}"
    names = [n for n in now | then if then.get(n) != now.get(n)]
    return ", ".join(f"{n}: {then.get(n)} -> {now.get(n)}" for n in names)


def _forget_rows_after(path: Path, step: int, columns: list[str]) -> None:
    """Drop log rows of steps that were taken after the last save."""
    if not path.exists():
        return
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.reader(file))
    # a row cut short by a kill has too few columns; the header has no number in front
    whole = (r for r in rows if len(r) == len(columns) and r[0].isdecimal())
    kept = [r for r in whole if int(r[0]) <= step]
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        csv.writer(file).writerows([columns, *kept])
