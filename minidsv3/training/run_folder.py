"""A training run on disk: its state, its log, and the model that comes out.

::

    config.json  model.safetensors     the model, as `minidsv3.checkpoints` writes it
    training_state.safetensors         weights, both Adam moments, the step: to resume
    log.csv                            one row a step
"""

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path

from minidsv3 import checkpoints
from minidsv3.checkpoints import CheckpointError, read_tensors, write_tensors
from minidsv3.config import Config, TrainConfig
from minidsv3.parameters import cut, prefixed
from minidsv3.training.numpy_ref import StepRecord, TrainState

STATE = "training_state.safetensors"
LOG = "log.csv"
COLUMNS = ["step", "loss_nats", "learning_rate", "grad_norm", "seconds"]


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run that could be resumed."""
    return (folder / STATE).is_file()


def save(
    folder: Path, state: TrainState, config: Config, tc: TrainConfig, corpus: str
) -> None:
    """Write state and model. ``corpus`` is the hash of the text that is trained on.

    All that resuming needs is one file, replaced in one step: killed at any moment, the
    folder holds the old state or the new one, never a mixture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        **prefixed("params/", state.params),
        **prefixed("m/", state.m),
        **prefixed("v/", state.v),
    }
    identity = _identity(config, tc, corpus)
    write_tensors(folder / STATE, tensors, {"step": str(state.step), **identity})
    checkpoints.save(folder, state.params, config)


def resume(folder: Path, config: Config, tc: TrainConfig, corpus: str) -> TrainState:
    """Read the state back, to continue as if nothing had happened.

    Raises CheckpointError if there is none, or if the run was started with another
    config, recipe or text (naming the fields): it would not be the same run.
    """
    if not is_run(folder):
        raise CheckpointError(f"{folder} holds no {STATE}: there is no run to resume")
    tensors, metadata = read_tensors(folder / STATE)
    for part, wanted in _identity(config, tc, corpus).items():
        if metadata.get(part) != wanted:
            raise CheckpointError(
                f"{folder} was started with another {part}: "
                f"{_difference(metadata.get(part), wanted)}. "
                "Give the same values again, or train into another folder"
            )
    step = int(metadata["step"])
    _forget_rows_after(folder / LOG, step)
    parts = (cut(tensors, f"{name}/") for name in ("params", "m", "v"))
    return TrainState(*parts, step)


def append_log(folder: Path, record: StepRecord) -> None:
    """Add one row to the log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerow(
            [
                record.step,
                record.losses["total"],
                record.learning_rate,
                record.grad_norm,
                f"{record.seconds:.4f}",
            ]
        )


def _identity(config: Config, tc: TrainConfig, corpus: str) -> dict[str, str]:
    return {
        "config": json.dumps(asdict(config), sort_keys=True),
        "recipe": json.dumps(asdict(tc), sort_keys=True),
        "text": json.dumps(corpus),
    }


def _difference(found: str | None, wanted: str) -> str:
    """The fields that differ, as ``name: then -> now``."""
    then, now = json.loads(found or "null"), json.loads(wanted)
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{then} -> {now}"
    names = [n for n in now | then if then.get(n) != now.get(n)]
    return ", ".join(f"{n}: {then.get(n)} -> {now.get(n)}" for n in names)


def _forget_rows_after(path: Path, step: int) -> None:
    """Drop log rows of steps that were taken after the last save."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        header, *rows = list(csv.reader(file)) or [COLUMNS]
    # a row cut short by a kill has too few columns or no number in front
    kept = [r for r in rows if len(r) == len(header) and int(r[0]) <= step]
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    os.replace(beside, path)
