"""Models on disk in DeepSeek's layout: ``config.json`` and ``model.safetensors``.

The file is where NumPy, PyTorch and Hugging Face transformers meet. Weights of the
plain transformer have the same names in memory and in the file.
"""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401, it teaches NumPy the name of bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidsv3.config import Config
from minidsv3.files import replacing
from minidsv3.parameters import ParameterError, check, first_not_finite

WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A file that is missing, broken, or does not belong to its config."""


def save(folder: str | Path, params: Mapping[str, np.ndarray], config: Config) -> None:
    """Write the model to ``folder``, which is made if it is not there.

    Each file is written beside its place and renamed, so an interruption leaves the old
    one whole. Raises ParameterError if the parameters do not fit the config or hold
    NaN or infinity: nothing is written then.
    """
    check(params, config)
    culprit = first_not_finite(params)
    if culprit:
        raise ParameterError(f"not saved: {culprit} holds NaN or infinity")
    if config.n_routed_experts is not None:
        raise NotImplementedError(
            f"n_routed_experts={config.n_routed_experts}: only models without experts "
            "are written so far"
        )
    folder = Path(folder)
    config.to_json(folder)
    write_tensors(folder / WEIGHTS, params, {"format": "np"})


def load(
    folder: str | Path, dtype: type = np.float32
) -> tuple[dict[str, np.ndarray], Config]:
    """Read a model: its parameters, converted to ``dtype``, and its config.

    Raises CheckpointError for a missing or broken file, ParameterError for tensors
    that do not fit the config.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS}; give the folder that training wrote"
        )
    config = Config.from_json(folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    params = {name: a.astype(dtype, copy=False) for name, a in tensors.items()}
    check(params, config)
    return params, config


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises CheckpointError, with the path, if there is no room for it.
    """
    whole = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    try:
        with replacing(path) as beside:
            save_file(whole, beside, dict(metadata))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file and its metadata.

    Raises CheckpointError, with the path, for a file that is broken or cut short.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short"
        ) from error
