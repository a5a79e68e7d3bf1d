"""Files of a model: bfloat16, and weights spread over several files."""

import json

import ml_dtypes
import numpy as np
import pytest

from minidsv3 import checkpoints, parameters
from minidsv3.checkpoints import CheckpointError
from minidsv3.config import TINY

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    """TINY with biases as training leaves them."""
    params = parameters.initialise(TINY, 0, 0.1)
    params[BIAS] += np.linspace(-0.0123, 0.0321, 8, dtype=np.float32)
    return params


def test_bfloat16_halves_the_file_and_spares_the_biases(tmp_path, params) -> None:
    checkpoints.save(tmp_path / "full", TINY, params)
    checkpoints.save(tmp_path / "half", TINY, params, dtype="bfloat16")
    sizes = [(tmp_path / n / checkpoints.WEIGHTS).stat().st_size for n in
             ("full", "half")]  # fmt: skip
    assert sizes[1] < 0.6 * sizes[0]
    tensors, _ = checkpoints.read_tensors(tmp_path / "half" / checkpoints.WEIGHTS)
    for name, array in tensors.items():
        wanted = np.float32 if name.endswith("bias") else ml_dtypes.bfloat16
        assert array.dtype == wanted, name
    _, loaded = checkpoints.load(tmp_path / "half")
    np.testing.assert_array_equal(loaded[BIAS], params[BIAS])
    for name, array in loaded.items():
        assert array.dtype == np.float32
        # 7 bits behind the leading one: half of the last is 2^-8
        np.testing.assert_allclose(array, params[name], rtol=2**-8, atol=1e-30)


def test_what_overflows_in_the_rounding_is_not_written(tmp_path, params) -> None:
    params["lm_head.weight"][0, 0] = 3.4e38  # beyond the largest bfloat16
    with pytest.raises(parameters.ParameterError, match=r"lm_head\.weight"):
        checkpoints.save(tmp_path, TINY, params, dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def split(folder) -> list[str]:
    """Spread the weights over three files with an index, as large models are."""
    tensors, metadata = checkpoints.read_tensors(folder / checkpoints.WEIGHTS)
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    where = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        part = {k: a for k, a in tensors.items() if where[k] == name}
        checkpoints.write_tensors(folder / name, part, metadata)
    (folder / checkpoints.WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": where}
    (folder / checkpoints.INDEX).write_text(json.dumps(index))
    return names


def test_weights_in_several_files(tmp_path, params) -> None:
    checkpoints.save(tmp_path, TINY, params)
    split(tmp_path)
    config, loaded = checkpoints.load(tmp_path)
    assert config == TINY and loaded.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_a_file_that_is_not_there_is_named(tmp_path, params) -> None:
    checkpoints.save(tmp_path, TINY, params)
    names = split(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_named(tmp_path, params, text: str) -> None:
    checkpoints.save(tmp_path, TINY, params)
    split(tmp_path)
    (tmp_path / checkpoints.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is no index of weights"):
        checkpoints.load(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path, params) -> None:
    inside = tmp_path / "model"
    checkpoints.save(inside, TINY, params)
    names = split(inside)
    (inside / names[0]).rename(tmp_path / names[0])
    index = json.loads((inside / checkpoints.INDEX).read_text())
    moved = {
        k: f"../{v}" if v == names[0] else v for k, v in index["weight_map"].items()
    }
    (inside / checkpoints.INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=names[0]):
        checkpoints.load(inside)
