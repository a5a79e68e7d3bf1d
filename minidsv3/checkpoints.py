"""Models on disk in DeepSeek's layout: ``config.json`` and safetensors files.

The file is where NumPy, PyTorch and Hugging Face transformers meet. Weights have the
same names in memory and in the file, with three differences. The experts of a layer are
one stacked array in memory, (E, out, in), and one array an expert in the file. The file
has, in each MTP module, copies of embedding and head. And a matrix in FP8 has a
companion ``weight_scale_inv``, a scale for each of its blocks (see `minidsv3.fp8`).

`open_lazily` checks a model by the headers of its files, and reads a tensor when it is
asked for; `load` is all of them. So loading takes the memory of the model, and no more
than one tensor besides. A copy is compared with its original when that is read.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from minidsv3 import config_json, fp8
from minidsv3.config import Config
from minidsv3.parameters import ParameterError, check, prefixed, shapes
from minidsv3.safetensors_files import CheckpointError as CheckpointError
from minidsv3.safetensors_files import Stored
from minidsv3.safetensors_files import read_tensors as read_tensors
from minidsv3.safetensors_files import write_tensors as write_tensors
from minidsv3.shards import INDEX as INDEX
from minidsv3.shards import WEIGHTS as WEIGHTS
from minidsv3.shards import open_folder, packed, version, write_folder

BIAS = "e_score_correction_bias"
SCALE = "_scale_inv"  # behind the name of a matrix in FP8
EXPERTS = "mlp.experts."
# Angles of RoPE that some older files hold: they follow from rope_theta.
COMPUTED = "rotary_emb.inv_freq"
# Copies in an MTP module: name in the module -> the parameter that it repeats.
COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PLAIN_TYPES = [BFLOAT16, *map(np.dtype, ("f2", "f4", "f8"))]
SCALE_TYPES = [*PLAIN_TYPES, np.dtype(ml_dtypes.float8_e8m0fnu)]
SAVED_AS = ("float32", "bfloat16", fp8.FP8.name)
BAND = 256  # rows that are converted at a time, about


class CheckpointNotice(UserWarning):
    """Something about a file that its user should know, though it can be read."""


# --- names ------------------------------------------------------------------------


def _parts(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names in the file of a parameter: itself, or one an expert."""
    before, stacked, after = name.partition(EXPERTS)
    if not stacked:
        return [name]
    return [f"{before}{EXPERTS}{i}.{after}" for i in range(shape[0])]


def _module_prefixes(config: Config) -> list[str]:
    L, depths = config.num_hidden_layers, config.num_nextn_predict_layers
    return [f"model.layers.{L + depth}." for depth in range(depths)]


def _copies(config: Config) -> dict[str, str]:
    """Name in the file -> the parameter it repeats, for every MTP module."""
    modules = _module_prefixes(config)
    return {k: first for m in modules for k, first in prefixed(m, COPIES).items()}


# --- saving -----------------------------------------------------------------------


def save(
    folder: str | Path,
    config: Config,
    params: Mapping[str, np.ndarray],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write the model to ``folder``, which is made if it is not there.

    dtype is that of the file, "float32", "bfloat16" or "float8_e4m3fn": the matrices
    that DeepSeek releases in FP8 get blocks of 128 × 128, all else is bfloat16; None
    keeps what each array has. The biases of the routers are never rounded: they move in
    steps of 0.001, and are float32 in the released files too. max_shard_bytes spreads
    the weights over several files of at most that size, with an index; only one of them
    is in memory at a time.

    An interruption leaves the old model or the new one, or, if both differ in their
    config or in the name of the first file, a folder that `load` refuses. Raises
    ParameterError if the parameters do not fit the config or hold NaN or infinity
    (after rounding, too), ValueError for another dtype or size; then nothing is
    written.
    """
    if dtype not in (None, *SAVED_AS):
        raise ValueError(f"dtype = {dtype!r}: must be one of {', '.join(SAVED_AS)}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes}: must be at least 1")
    check(params, config)
    arrays: dict[str, np.ndarray] = {}  # by their names in the file; views
    for name, array in params.items():
        ones = _parts(name, array.shape)
        arrays |= zip(ones, array if len(ones) > 1 else [array], strict=True)
    arrays |= {name: params[first] for name, first in _copies(config).items()}
    write_folder(
        Path(folder),
        config_json.to_text(config, dtype),
        packed({k: _size(k, a, dtype) for k, a in arrays.items()}, max_shard_bytes),
        lambda name: _encoded(name, arrays[name], dtype),
    )


def _type(name: str, array: np.ndarray, dtype: str | None) -> np.dtype:
    """The type of an array in the file."""
    if dtype is None:
        return array.dtype
    if name.endswith(BIAS):
        return np.dtype(np.float32)
    quantised = dtype == fp8.FP8.name
    if quantised and fp8.is_quantised(name):
        return fp8.FP8
    return BFLOAT16 if quantised else np.dtype(dtype)


def _size(name: str, array: np.ndarray, dtype: str | None) -> int:
    """Bytes in the file, with scales."""
    kind = _type(name, array, dtype)
    scales = math.prod(fp8.scale_shape(array.shape)) if kind == fp8.FP8 else 0
    return array.size * kind.itemsize + 4 * scales


def _encoded(name: str, array: np.ndarray, dtype: str | None) -> dict[str, np.ndarray]:
    """What the file holds of an array: itself, rounded, or FP8 and its scales."""
    kind = _type(name, array, dtype)
    rounded = array.astype(np.float32 if kind == fp8.FP8 else kind, copy=False)
    if not np.isfinite(rounded).all():
        raise ParameterError(f"not saved: {name} holds NaN or infinity")
    if kind != fp8.FP8:
        return {name: rounded}
    q, scale_inv = fp8.quantise(rounded)
    return {name: q, name + SCALE: scale_inv}


# --- loading ----------------------------------------------------------------------


def load(
    folder: str | Path, dtype: type | None = np.float32
) -> tuple[Config, dict[str, np.ndarray]]:
    """Read a model: its config, and its parameters, converted to ``dtype``.

    None keeps the types of the file (FP8 becomes bfloat16). The biases of the routers
    get float32 at least. Notices and errors are those of `open_lazily`; and a model
    whose MTP modules have another embedding or head raises CheckpointError, too.
    """
    config, params = open_lazily(folder, dtype)
    return config, dict(params)


def open_lazily(
    folder: str | Path, dtype: type | None = np.float32
) -> tuple[Config, "LazyParameters"]:
    """Check a model by its headers: its config, and parameters that are read on access.

    A file that has none of the MTP weights is opened as a model without MTP modules,
    with a `CheckpointNotice`. Raises CheckpointError, which names file and tensor, for
    a missing or broken file, a pickle, tensors that are missing, too many, of another
    shape or type, and a model that is replaced at this moment; ConfigError for a
    ``config.json`` that describes no model of ours.
    """
    folder = Path(folder)
    opened = version(folder)
    tensors = open_folder(folder)
    told, block = config_json.read_with_block(folder)
    if version(folder) != opened:  # then the config may be the next one's
        raise CheckpointError(f"{folder} was replaced while it was opened; try again")
    tensors = {k: t for k, t in tensors.items() if not k.endswith(COMPUTED)}
    config = _without_absent_modules(tensors, told, folder)
    weights = _checked(tensors, config, block, folder)
    return config, LazyParameters(config, weights, dtype)


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, with its scales if it is in FP8."""

    stored: Stored
    scales: Stored | None
    block: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        """The type that its numbers are meant in."""
        return BFLOAT16 if self.scales else self.stored.dtype

    def bands(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Some rows at a time, whole blocks of them: where they belong, and they."""
        rows = self.block[0]
        blocks = max(1, BAND // rows)
        whole = self.stored.mapped()
        scales = self.scales.mapped() if self.scales else None
        for i in range(0, len(whole), blocks * rows):
            band = slice(i, i + blocks * rows)
            values = whole[band]
            if self.scales:
                s = scales[i // rows : i // rows + blocks]
                values = fp8.dequantise(values, s, block=self.block)
            yield band, values


class LazyParameters(Mapping[str, np.ndarray]):
    """Parameters by their names in memory, each read from the file when asked for.

    Each access reads anew, and gives an array of its own that may be written to. The
    files stay open, and the parameters those of one model, even if another is saved in
    its place. Raises CheckpointError on access to an embedding or head that differs
    from its copy in an MTP module.
    """

    def __init__(
        self, config: Config, weights: dict[str, Weight], dtype: type | None
    ) -> None:
        self._shapes = shapes(config)
        self._copies = _copies(config)
        self._weights = weights
        self._dtype = dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        ones = [self._weights[one] for one in _parts(name, shape)]
        for copy, first in self._copies.items():
            if first == name:
                _compare(copy, self._weights[copy], name, ones[0])
        array = np.empty(shape, self._type(name, ones))
        for one, place in zip(ones, array if len(ones) > 1 else [array], strict=True):
            for band, values in one.bands():
                place[band] = values
        return array

    def _type(self, name: str, ones: list[Weight]) -> np.dtype:
        if self._dtype is None:
            return np.result_type(*{one.dtype for one in ones})
        return np.promote_types(
            self._dtype, "f4" if name.endswith(BIAS) else self._dtype
        )


def _compare(copy: str, its: Weight, name: str, first: Weight) -> None:
    """Raise CheckpointError unless a copy has the numbers of its original."""
    for (_, a), (_, b) in zip(first.bands(), its.bands(), strict=True):
        if not np.array_equal(a, b):
            raise CheckpointError(
                f"{its.stored.path}: {copy} differs from {name}, but MTP modules "
                "share embedding and head with the model"
            )


# --- what the headers tell --------------------------------------------------------


def _without_absent_modules(
    tensors: Mapping[str, Stored], config: Config, folder: Path
) -> Config:
    """The config of what is there: some files leave all MTP modules out."""
    modules = tuple(_module_prefixes(config))
    if not modules or any(name.startswith(modules) for name in tensors):
        return config
    warnings.warn(
        f"{folder} holds no MTP weights, though num_nextn_predict_layers is "
        f"{len(modules)}: it is read as a model without MTP modules",
        CheckpointNotice,
        stacklevel=4,
    )
    return replace(config, num_nextn_predict_layers=0)


def _checked(
    tensors: Mapping[str, Stored], config: Config, block: tuple | None, folder: Path
) -> dict[str, Weight]:
    """Each weight that the config asks for, by its name in the file, and no other."""
    table = shapes(config)
    expected = {
        one: shape[1:] if EXPERTS in name else shape
        for name, shape in table.items()
        for one in _parts(name, shape)
    }
    expected |= {copy: table[first] for copy, first in _copies(config).items()}
    weights = {
        name: _weight(name, tensors, shape, block, folder)
        for name, shape in expected.items()
    }
    used = {name + SCALE for name, weight in weights.items() if weight.scales}
    for name in sorted(tensors.keys() - expected.keys() - used):
        raise CheckpointError(
            f"{tensors[name].path} has {name}, which this config.json does not ask "
            "for: it is another model's, or its config is"
        )
    return weights


def _weight(
    name: str,
    tensors: Mapping[str, Stored],
    shape: tuple[int, ...],
    block: tuple | None,
    folder: Path,
) -> Weight:
    """One weight, which must be there, and as the config asks for it."""
    if name not in tensors:
        raise CheckpointError(
            f"{folder} has no {name} of shape {shape}, which its config.json asks for: "
            "it is incomplete, or of another model. (MTP modules, the layers from "
            "num_hidden_layers on, must be whole or absent)"
        )
    stored, scales = tensors[name], None
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.path}: {name} has shape {stored.shape}, config.json asks for "
            f"{shape}; they are not of one model"
        )
    if stored.dtype == fp8.FP8:
        scales = _scales(name, stored, tensors, block)
    elif stored.dtype not in PLAIN_TYPES:
        raise CheckpointError(
            f"{stored.path}: {name} is of type {stored.dtype}; give it in FP8 blocks, "
            "bfloat16 or float32"
        )
    return Weight(stored, scales, block or fp8.BLOCK)


def _scales(
    name: str, q: Stored, tensors: Mapping[str, Stored], block: tuple | None
) -> Stored:
    """The scales of a matrix in FP8, one a block."""
    if block is None:
        raise CheckpointError(
            f"{q.path}: {name} is in FP8, but config.json has no quantization_config "
            "to tell the size of its blocks; take that of the same download or save"
        )
    if name + SCALE not in tensors:
        raise CheckpointError(
            f"{q.path}: {name} is in FP8, but there is no {name}{SCALE}, without which "
            "its numbers mean nothing; complete the download"
        )
    if len(q.shape) != len(block):
        raise CheckpointError(f"{q.path}: {name} is in FP8, but it is no matrix")
    scales, shape = tensors[name + SCALE], fp8.scale_shape(q.shape, block)
    if scales.shape != shape or scales.dtype not in SCALE_TYPES:
        raise CheckpointError(
            f"{scales.path}: {name}{SCALE} has shape {scales.shape} and type "
            f"{scales.dtype}; a matrix {q.shape} in blocks of {block} asks for "
            f"floating-point numbers of shape {shape}"
        )
    return scales
