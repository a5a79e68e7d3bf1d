"""Models on disk: what lies in the files, and what comes back from them.

Reading one tensor at a time is in `test_checkpoint_lazy`, what is refused in
`test_checkpoint_refusals`, what an interruption leaves in `test_checkpoint_crashes`,
and transformers' opinion in `test_checkpoint_peers`.
"""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from minidsv3 import (
    checkpoints,
    config_json,
    fp8,
    parameters,
    shards,
)
from minidsv3.config import TINY, V3, Config
from tests.test_config import RELEASED

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
# Wider than a block, so that there are edges: 200 × 131, 131 × 200, 130 × 131, …
WIDE = dataclasses.replace(
    TINY, hidden_size=131, intermediate_size=200, moe_intermediate_size=130
)
MOONLIGHT = dataclasses.replace(
    TINY, q_lora_rank=None, n_group=1, topk_group=1, num_nextn_predict_layers=0
)
SHAPES = parameters.shapes(WIDE)


def fresh(config: Config = WIDE) -> dict[str, np.ndarray]:
    """Parameters with biases as training leaves them, and matrices of many sizes."""
    params = parameters.initialise(config, 0, 0.1)
    rng = np.random.default_rng(1)
    for name, array in params.items():
        if name.endswith("bias"):
            array += np.linspace(-0.0123, 0.0321, len(array), dtype=np.float32)
        elif array.ndim > 1:
            array *= 10 ** rng.uniform(-1, 1, (*array.shape[:-1], 1)).astype("f4")
        else:
            array += rng.normal(0, 0.1, array.shape).astype("f4")
    return params


@pytest.fixture
def params() -> dict[str, np.ndarray]:
    return fresh()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the folder's files, read by the library, with torch."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.offset_keys()}
    return found


def by_torch(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A tensor of the file in float32; FP8 by a loop over its blocks, in torch."""
    array = tensors[name].float()
    if f"{name}_scale_inv" in tensors:
        assert tensors[name].dtype == torch.float8_e4m3fn
        scales = tensors[f"{name}_scale_inv"]
        assert scales.shape == tuple(-(-n // 128) for n in array.shape)
        for i, row in enumerate(scales):
            for j, scale in enumerate(row):
                array[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128] *= scale
    return array.numpy()


def of_parameter(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A parameter as the file has it, experts stacked."""
    before, stacked, after = name.partition(".experts.")
    if not stacked:
        return by_torch(tensors, name)
    count = SHAPES[name][0]
    ones = [f"{before}.experts.{i}.{after}" for i in range(count)]
    return np.stack([by_torch(tensors, one) for one in ones])


# --- types ----------------------------------------------------------------------------


def check_types(folder: Path, dtype: str) -> None:
    """The file holds what dtype says; the biases whole, the copies as the originals."""
    params = fresh()
    checkpoints.save(folder, WIDE, params, dtype)
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        wanted = getattr(torch, dtype)
        if dtype == "float8_e4m3fn" and f"{name}_scale_inv" not in tensors:
            wanted = torch.bfloat16
        if name.endswith(("bias", "_scale_inv")):
            wanted = torch.float32
        assert tensor.dtype == wanted, name
    scaled = {n.removesuffix("_scale_inv") for n in tensors if n.endswith("_scale_inv")}
    quantised = {n for n in tensors if fp8.is_quantised(n)}
    assert scaled == (quantised if dtype == "float8_e4m3fn" else set())
    for copy, first in checkpoints.COPIES.items():
        assert f"model.layers.2.{copy}" in tensors
        assert torch.equal(tensors[f"model.layers.2.{copy}"], tensors[first])

    config, loaded = checkpoints.load(folder)
    assert config == WIDE and list(loaded) == list(params)
    np.testing.assert_array_equal(loaded[BIAS], params[BIAS])
    half = {"float32": 0, "bfloat16": 2**-8, "float8_e4m3fn": 2**-4}[dtype]
    for name, array in loaded.items():
        assert array.dtype == np.float32 and array.flags.writeable
        np.testing.assert_array_equal(array, of_parameter(tensors, name), name)
        error = np.linalg.norm(array - params[name])
        assert error <= half * np.linalg.norm(params[name]), name


@pytest.mark.parametrize("dtype", checkpoints.SAVED_AS)
def test_each_type_is_written_and_read(tmp_path, dtype: str) -> None:
    check_types(tmp_path, dtype)


def test_the_config_tells_the_type(tmp_path, params) -> None:
    """As the released file does; and transformers' form is read, which has no fmt."""
    released = RELEASED["quantization_config"]
    for dtype, told in (("float32", None), ("bfloat16", None),
                        ("float8_e4m3fn", released)):  # fmt: skip
        checkpoints.save(tmp_path, WIDE, params, dtype)
        words = json.loads((tmp_path / "config.json").read_text())
        assert words.get("quantization_config") == told
        assert words["torch_dtype"] == ("bfloat16" if told else dtype)
        assert Config.from_json(tmp_path) == WIDE
    words["quantization_config"] = {
        **{"activation_scheme": "dynamic", "quant_method": "fp8", "dequantize": False},
        **{"weight_block_size": [128, 128], "modules_to_not_convert": None},
    }
    (tmp_path / "config.json").write_text(json.dumps(words))
    assert checkpoints.load(tmp_path)[0] == WIDE


def test_bytes_on_disk(tmp_path, params) -> None:
    """FP8 takes a byte a number, four a block, and two or four for what is kept."""
    checkpoints.save(tmp_path, WIDE, params, "float8_e4m3fn")
    expected = 0
    for name, shape in {
        **parameters.shapes(WIDE),
        **dict.fromkeys(checkpoints.COPIES, SHAPES["lm_head.weight"]),
    }.items():
        count = math.prod(shape)
        if name.endswith("_proj.weight") and "eh" not in name or "mqa" in name:
            experts, (out, width) = math.prod(shape[:-2]), shape[-2:]
            scales = experts * math.ceil(out / 128) * math.ceil(width / 128)
            expected += count + 4 * scales
        else:
            expected += count * (4 if "bias" in name else 2)
    size = (tmp_path / shards.WEIGHTS).stat().st_size
    header = int.from_bytes((tmp_path / shards.WEIGHTS).read_bytes()[:8], "little")
    assert size == expected + 8 + header


def check_wishes(folder: Path) -> None:
    """`load` converts, but gives the biases float32 at least; None keeps the types."""
    params = fresh()
    for saved in checkpoints.SAVED_AS:
        checkpoints.save(folder, WIDE, params, saved)
        _, exact = checkpoints.load(folder, np.float64)
        for wish in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16, None):
            kept = "bfloat16" if saved == "float8_e4m3fn" else saved
            wanted = np.dtype(kept if wish is None else wish)
            for name, array in checkpoints.load(folder, wish)[1].items():
                whole = name.endswith("bias") and wanted.itemsize < 4
                assert array.dtype == (np.float32 if whole else wanted), (name, wish)
                expected = exact[name].astype("f4").astype(array.dtype)
                np.testing.assert_array_equal(array, expected)


def test_whoever_loads_names_the_type(tmp_path) -> None:
    check_wishes(tmp_path)


def test_float64_is_kept_or_rounded(tmp_path) -> None:
    params = parameters.initialise(TINY, 0, 0.1, np.float64)
    checkpoints.save(tmp_path, TINY, params)
    _, again = checkpoints.load(tmp_path, None)
    for name, array in params.items():
        assert again[name].dtype == np.float64
        np.testing.assert_array_equal(again[name], array)
    checkpoints.save(tmp_path, TINY, params, "float32")
    assert {a.dtype for a in checkpoints.load(tmp_path, None)[1].values()} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_what_overflows_in_the_rounding_is_not_written(
    tmp_path, params, dtype: str
) -> None:
    params["lm_head.weight"][0, 0] = 3.4e38  # beyond the largest bfloat16
    with pytest.raises(parameters.ParameterError, match=r"lm_head\.weight"):
        checkpoints.save(tmp_path, WIDE, params, dtype, max_shard_bytes=10_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"dtype": "int8"}, "dtype = 'int8': must be one of float32, bfloat16, float8"),
     ({"max_shard_bytes": 0}, "max_shard_bytes = 0: must be at least 1")],
)  # fmt: skip
def test_unknown_wishes_are_refused(tmp_path, params, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoints.save(tmp_path, WIDE, params, **given)
    assert not list(tmp_path.iterdir())


# --- several files --------------------------------------------------------------------


def check_shards(
    folder: Path, dtype: str = "float8_e4m3fn", most: int = 60_000
) -> None:
    """Each file within its size unless one tensor is larger; scales beside their q."""
    params = fresh()
    checkpoints.save(folder, WIDE, params, dtype, max_shard_bytes=most)
    words = json.loads((folder / checkpoints.INDEX).read_text())
    homes, total = words["weight_map"], 0
    files = sorted(set(homes.values()))
    count = len(files)
    assert count > 5 and not (folder / checkpoints.WEIGHTS).exists()
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors"
                     for i in range(1, count + 1)]  # fmt: skip
    for name in files:
        with safe_open(folder / name, "pt") as opened:
            held = {k: opened.get_tensor(k) for k in opened.offset_keys()}
        assert held.keys() == {k for k, home in homes.items() if home == name}
        size = sum(t.nbytes for t in held.values())
        total += size
        wholes = [k for k in held if not k.endswith("_scale_inv")]
        assert size <= most or len(wholes) == 1
        for k in held.keys() - set(wholes):
            assert k.removesuffix("_scale_inv") in wholes
    assert total == words["metadata"]["total_size"]
    config, loaded = checkpoints.load(folder)
    tensors = tensors_of(folder)
    assert config == WIDE and list(loaded) == list(params)
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, of_parameter(tensors, name))


@pytest.mark.parametrize("dtype", checkpoints.SAVED_AS)
def test_weights_in_several_files(tmp_path, dtype: str) -> None:
    check_shards(tmp_path, dtype)


def test_a_size_that_all_fits_in_makes_one_file(tmp_path, params) -> None:
    checkpoints.save(tmp_path, WIDE, params, max_shard_bytes=10**9)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", checkpoints.WEIGHTS}


def test_the_same_model_makes_the_same_files(tmp_path, params) -> None:
    for name in ("one", "other"):
        checkpoints.save(tmp_path / name, WIDE, params, max_shard_bytes=200_000)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    for name in files:
        one, other = ((tmp_path / n / name).read_bytes() for n in ("one", "other"))
        assert one == other


# --- models of others -----------------------------------------------------------------


def test_moonlights_kind_opens(tmp_path) -> None:
    """No latent of the queries, one group, no module; words that say nothing here."""
    params = fresh(MOONLIGHT)
    checkpoints.save(tmp_path, MOONLIGHT, params, "bfloat16")
    words = json.loads((tmp_path / "config.json").read_text())
    words |= {
        **{"seq_aux": True, "ep_size": 1, "pretraining_tp": 1, "aux_loss_alpha": 0.001},
        **{"auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}},
        **{"num_nextn_predict_layers": 0, "attention_dropout": 0.0, "use_cache": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(words))
    config, loaded = checkpoints.load(tmp_path)
    assert config == MOONLIGHT and loaded.keys() == params.keys()
    assert "model.layers.0.self_attn.q_proj.weight" in loaded


def test_the_released_config_opens_as_v3(tmp_path) -> None:
    older = {"seq_aux": True, "pretraining_tp": 1, "num_key_value_heads": 128}
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | older))
    assert config_json.read_with_block(tmp_path) == (V3, (128, 128))


def test_angles_of_older_files_are_passed_over(tmp_path, params) -> None:
    """They follow from rope_theta, and no parameter has them."""
    checkpoints.save(tmp_path, WIDE, params)
    path = tmp_path / checkpoints.WEIGHTS
    tensors, notes = checkpoints.read_tensors(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    checkpoints.write_tensors(path, tensors, notes)
    assert checkpoints.load(tmp_path)[1].keys() == params.keys()


def in_other_blocks(folder: Path, block: tuple[int, int]) -> dict[str, np.ndarray]:
    """Quantise a saved model anew; returns what each tensor then means."""
    tensors, _ = checkpoints.read_tensors(folder / checkpoints.WEIGHTS)
    meant = dict(tensors)
    for name, array in list(tensors.items()):
        if fp8.is_quantised(name):
            tensors[name], scales = fp8.quantise(array, block)
            tensors[f"{name}_scale_inv"] = scales
            meant[name] = fp8.dequantise(tensors[name], scales, block=block)
    checkpoints.write_tensors(folder / checkpoints.WEIGHTS, tensors, {})
    words = json.loads((folder / "config.json").read_text())
    words["quantization_config"] = {
        **RELEASED["quantization_config"],
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(words))
    return meant


@pytest.mark.parametrize("block", [(64, 64), (32, 300), (1, 128)])
def test_blocks_of_other_sizes(tmp_path, params, block) -> None:
    checkpoints.save(tmp_path, WIDE, params)
    meant = in_other_blocks(tmp_path, block)
    name = "model.layers.2.mlp.experts.{}down_proj.weight"
    _, loaded = checkpoints.load(tmp_path)
    ones = [meant[name.format(f"{i}.")] for i in range(WIDE.n_routed_experts)]
    np.testing.assert_array_equal(loaded[name.format("")], np.stack(ones))


def test_scales_of_one_byte(tmp_path, params) -> None:
    """Powers of two as exponents alone (E8M0), which is how some later models are."""
    checkpoints.save(tmp_path, WIDE, params)
    tensors, notes = checkpoints.read_tensors(tmp_path / checkpoints.WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    q, scales = fp8.quantise(tensors[name], power_of_two=True)
    meant = fp8.dequantise(q, scales)
    one_byte = scales.astype(ml_dtypes.float8_e8m0fnu)
    tensors |= {name: q, f"{name}_scale_inv": one_byte}
    checkpoints.write_tensors(tmp_path / checkpoints.WEIGHTS, tensors, notes)
    config_json.write(WIDE, tmp_path, "float8_e4m3fn")
    np.testing.assert_array_equal(checkpoints.load(tmp_path)[1][name], meant)
