"""Models on disk in DeepSeek's layout: ``config.json`` and ``model.safetensors``.

The file is where NumPy, PyTorch and Hugging Face transformers meet. Weights have the
same names in memory and in the file, with two differences. The experts of a layer are
one stacked array in memory, (E, out, in), and one array an expert in the file. And the
file has, in each MTP module, copies of embedding and head, which are written on saving
and compared on loading. A large model may lie in several files beside an index, as
released; we write one.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401, it teaches NumPy the name of bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidsv3.config import Config
from minidsv3.files import replacing
from minidsv3.parameters import ParameterError, check, first_not_finite, shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIAS = "e_score_correction_bias"
EXPERTS = "mlp.experts."


# Copies in an MTP module: name in the module -> the parameter that it repeats.
COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


class CheckpointError(ValueError):
    """A file that is missing, broken, or does not belong to its config."""


class CheckpointNotice(UserWarning):
    """Something about a file that its user should know, though it can be read."""


def save(
    folder: str | Path,
    params: Mapping[str, np.ndarray],
    config: Config,
    dtype: str | None = None,
) -> None:
    """Write the model to ``folder``, which is made if it is not there.

    dtype is that of the file, "float32" or "bfloat16"; None keeps what each array has.
    The biases of the routers are never rounded: they move in steps of 0.001, and are
    float32 in the released files too. Each file is written beside its place and
    renamed, so an interruption leaves the old one whole. Raises ParameterError if the
    parameters do not fit the config or hold NaN or infinity (after rounding, too):
    nothing is written then.
    """
    check(params, config)
    if dtype is not None:
        params = {
            k: a if k.endswith(BIAS) else a.astype(dtype) for k, a in params.items()
        }
    culprit = first_not_finite(params)
    if culprit:
        raise ParameterError(f"not saved: {culprit} holds NaN or infinity")
    folder = Path(folder)
    config.to_json(folder)
    copies = {name: params[first] for name, first in _copies(config).items()}
    tensors = _unstacked({**params, **copies})
    write_tensors(folder / WEIGHTS, tensors, {"format": "np"})


def load(
    folder: str | Path, dtype: type = np.float32
) -> tuple[dict[str, np.ndarray], Config]:
    """Read a model: its parameters, converted to ``dtype``, and its config.

    A file that has none of the MTP weights is read as a model without MTP modules, with
    a `CheckpointNotice`. Raises CheckpointError for a missing or broken file, or one
    whose MTP modules have other embeddings or heads than the model; ParameterError for
    tensors that do not fit the config.
    """
    folder = Path(folder)
    files = _files(folder)
    config = Config.from_json(folder)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    config = _without_absent_modules(tensors, config, folder)
    _drop_copies(tensors, config, folder)
    tensors = _stacked(tensors, config)
    params = {name: a.astype(dtype, copy=False) for name, a in tensors.items()}
    check(params, config)
    return params, config


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS}; give the folder that training wrote"
        )
    try:
        words = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(words["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is no index of weights ({error!r}); it needs a "
            "weight_map from names of weights to names of files"
        ) from error
    files = [folder / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}, one of {len(missing)} of the {len(files)} "
            "files that its index names; complete the download"
        )
    return files


def _unstacked(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array an expert, as in the file: ``….experts.7.up_proj.weight``."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in params.items():
        before, stacked, after = name.partition(EXPERTS)
        one = {f"{before}{EXPERTS}{i}.{after}": a for i, a in enumerate(array)}
        tensors |= one if stacked else {name: array}
    return tensors


def _stacked(
    tensors: Mapping[str, np.ndarray], config: Config
) -> dict[str, np.ndarray]:
    """The experts of each layer as one array (E, out, in), as in memory.

    Raises ParameterError naming the first expert that is missing or misshapen.
    """
    params = dict(tensors)
    for name, (count, *shape) in shapes(config).items():
        before, stacked, after = name.partition(EXPERTS)
        if not stacked:
            continue
        ones = [f"{before}{EXPERTS}{i}.{after}" for i in range(count)]
        for one in ones:
            if one not in params:
                raise ParameterError(
                    f"{one} is missing; the config asks for {count} experts a layer"
                )
            if params[one].shape != tuple(shape):
                raise ParameterError(
                    f"{one} has shape {params[one].shape}, the config asks for "
                    f"{tuple(shape)}"
                )
        params[name] = np.stack([params.pop(one) for one in ones])
    return params


def _module_prefixes(config: Config) -> list[str]:
    L, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    return [f"model.layers.{L + depth}." for depth in range(depths)]


def _copies(config: Config) -> dict[str, str]:
    """Name in the file -> the parameter it repeats, for every MTP module."""
    prefixes = _module_prefixes(config)
    return {p + name: first for p in prefixes for name, first in COPIES.items()}


def _without_absent_modules(
    tensors: Mapping[str, np.ndarray], config: Config, folder: Path
) -> Config:
    """The config of what is there: some files leave all MTP modules out."""
    prefixes = tuple(_module_prefixes(config))
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return config
    warnings.warn(
        f"{folder / WEIGHTS} holds no MTP weights, though num_nextn_predict_layers is "
        f"{len(prefixes)}: it is read as a model without MTP modules",
        CheckpointNotice,
        stacklevel=3,
    )
    return replace(config, num_nextn_predict_layers=0)


def _drop_copies(tensors: dict[str, np.ndarray], config: Config, folder: Path) -> None:
    """Take the modules' copies out, having compared them: there is one embedding."""
    for name, first in _copies(config).items():
        if name not in tensors or first not in tensors:
            missing = first if name in tensors else name
            raise CheckpointError(
                f"{folder / WEIGHTS} has MTP weights but no {missing}; a file must "
                "have every MTP weight or none"
            )
        if not np.array_equal(tensors.pop(name), tensors[first]):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} differs from {first}, but MTP modules "
                "share embedding and head with the model"
            )


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
