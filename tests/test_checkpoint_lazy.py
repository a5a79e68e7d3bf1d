"""One tensor at a time: what is read, when, how much memory it takes, whose it is."""

import dataclasses
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, parameters, safetensors_files
from minidsv3.config import TINY
from tests.test_checkpoints import BIAS, WIDE, fresh, tensors_of


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    return fresh()


def check_lazily(folder: Path) -> None:
    """As `load`, tensor by tensor; the arrays are the reader's own."""
    checkpoints.save(folder, WIDE, fresh(), "float8_e4m3fn", max_shard_bytes=60_000)
    config, lazy = checkpoints.open_lazily(folder)
    _, loaded = checkpoints.load(folder)
    assert config == WIDE and list(lazy) == list(loaded) and len(lazy) == len(loaded)
    parameters.check(lazy, config)
    for name in reversed(list(lazy)):
        first = lazy[name]
        np.testing.assert_array_equal(first, loaded[name])
        first[:] = 7
        np.testing.assert_array_equal(lazy[name], loaded[name])
    assert "model.layers.1.mlp.experts.0.up_proj.weight" not in lazy
    with pytest.raises(KeyError):
        lazy["model.layers.9.mlp.up_proj.weight"]


def test_a_model_can_be_read_tensor_by_tensor(tmp_path) -> None:
    check_lazily(tmp_path)


def check_unread(folder: Path) -> None:
    """Opening reads no number, and an access those of one parameter and its copies."""
    checkpoints.save(folder, WIDE, fresh(), "float8_e4m3fn", max_shard_bytes=60_000)
    read = []
    mapped = safetensors_files.Stored.mapped
    with pytest.MonkeyPatch.context() as patch:
        noted = lambda one: (read.append(one.shape), mapped(one))[1]  # noqa: E731
        patch.setattr(safetensors_files.Stored, "mapped", noted)
        _, lazy = checkpoints.open_lazily(folder)
        assert not read
        lazy["model.layers.0.mlp.up_proj.weight"]
        assert sorted(read) == [(2, 2), (200, 131)]
        read.clear()
        lazy["lm_head.weight"]
        assert read == [(257, 131)] * 3


def test_opening_reads_nothing(tmp_path) -> None:
    check_unread(tmp_path)


def test_opened_it_stays_one_model(tmp_path, params) -> None:
    """Another is saved in its place, and even the folder removed: it is still whole."""
    checkpoints.save(tmp_path / "run", WIDE, params, max_shard_bytes=60_000)
    _, lazy = checkpoints.open_lazily(tmp_path / "run")
    other = {name: 2 * array for name, array in params.items()}
    checkpoints.save(tmp_path / "run", WIDE, other, max_shard_bytes=50_000)
    for name, array in params.items():
        np.testing.assert_array_equal(lazy[name], array)
    shutil.rmtree(tmp_path / "run")
    np.testing.assert_array_equal(dict(lazy)[BIAS], params[BIAS])


def test_torch_takes_the_arrays_as_they_are(tmp_path, params) -> None:
    """Without a copy; bfloat16, which torch does not take, by way of its bits."""
    checkpoints.save(tmp_path, WIDE, params, "bfloat16")
    _, lazy = checkpoints.open_lazily(tmp_path, None)
    tensors = tensors_of(tmp_path)
    for name in ("lm_head.weight", BIAS):
        array = lazy[name]
        half = array.dtype == ml_dtypes.bfloat16
        tensor = torch.from_numpy(array.view(np.uint16) if half else array)
        tensor = tensor.view(torch.bfloat16) if half else tensor
        assert torch.equal(tensor, tensors[name])
        assert tensor.data_ptr() == array.ctypes.data


BIG = dataclasses.replace(
    TINY, vocab_size=2_000, hidden_size=512, moe_intermediate_size=1_024,
    n_routed_experts=16, num_hidden_layers=3,
)  # fmt: skip


def peak_of(call: Callable) -> tuple[int, object]:
    """The most bytes that NumPy and Python held at once, beyond those before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


def check_memory(folder: Path) -> None:
    """Loading takes the model's size and one tensor's; opening next to nothing."""
    params = parameters.initialise(BIG, 0, 0.1)
    total = sum(a.nbytes for a in params.values())
    largest = max(math.prod(s[-2:]) for s in parameters.shapes(BIG).values()) * 4
    assert total > 200e6
    for saved in (None, "float8_e4m3fn"):
        checkpoints.save(folder, BIG, params, saved)
        peak, loaded = peak_of(lambda: checkpoints.load(folder))
        assert peak <= total + largest + 1e6
        del loaded
        peak, (_, lazy) = peak_of(lambda: checkpoints.open_lazily(folder, None))
        assert peak < 2e6
        peak, one = peak_of(lambda lazy=lazy: lazy["lm_head.weight"])
        assert peak <= one.nbytes + 1e6


def test_loading_takes_the_models_own_size(tmp_path) -> None:
    check_memory(tmp_path)


def check_memory_of_saving(folder: Path) -> None:
    """One file is in memory at a time, and one matrix in float32 on its way."""
    params = parameters.initialise(BIG, 0, 0.1)
    most = 20_000_000
    for dtype in ("bfloat16", "float8_e4m3fn"):
        peak, _ = peak_of(
            lambda dtype=dtype: checkpoints.save(folder, BIG, params, dtype, most)
        )
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert peak <= most + 5 * params["lm_head.weight"].nbytes


def test_saving_holds_a_file_at_a_time(tmp_path) -> None:
    check_memory_of_saving(tmp_path)
