"""What is not loaded. A refusal names file and tensor, what was found, what to do.

All of them come when a model is opened, before any number is read; only a copy that
differs from its original cannot be seen earlier than when that is read.
"""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minidsv3 import checkpoints, safetensors_files
from minidsv3.checkpoints import CheckpointError
from minidsv3.config import ConfigError
from tests.test_checkpoints import MOONLIGHT, WIDE, fresh
from tests.test_config import RELEASED

UP = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
KV = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
COPY = "model.layers.2.shared_head.head.weight"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a folder's only file."""
    tensors, notes = checkpoints.read_tensors(folder / checkpoints.WEIGHTS)
    change(tensors)
    checkpoints.write_tensors(folder / checkpoints.WEIGHTS, tensors, notes)


def words(folder: Path, **changes: object) -> None:
    """Change the config; None takes a word out."""
    path = folder / "config.json"
    told = json.loads(path.read_text()) | changes
    told = {name: value for name, value in told.items() if value is not None}
    path.write_text(json.dumps(told))


def into(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    return lambda folder: edit(folder, lambda t: t.update({name: function(t[name])}))


def without(name: str) -> Callable:
    return lambda folder: edit(folder, lambda t: t.pop(name))


def with_more(name: str) -> Callable:
    return lambda folder: edit(folder, lambda t: t.update({name: np.ones(3, "f4")}))


def quantisation(**changes: object) -> Callable:
    told = RELEASED["quantization_config"] | changes
    return lambda folder: words(folder, quantization_config=told)


def cut(folder: Path, n: int = 10) -> None:
    path = folder / checkpoints.WEIGHTS
    path.write_bytes(path.read_bytes()[:-n])


def overwritten(content: bytes) -> Callable:
    return lambda folder: (folder / checkpoints.WEIGHTS).write_bytes(content)


def pickled(name: str) -> Callable:
    def change(folder: Path) -> None:
        (folder / checkpoints.WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps({"lm_head.weight": [1.0]}))

    return change


def unknown_type(folder: Path) -> None:
    """A header with a type of the library's that NumPy does not have."""
    path = folder / checkpoints.WEIGHTS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head[BIAS]["dtype"] = "F4"
    head[BIAS]["shape"] = [2 * 4 * 8]  # two of them a byte
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


ROWS = 10 + 6  # of the matrix to the latent and the shared key
REFUSALS = {  # what is done to the folder -> words of the refusal
    "cut short": (cut, ["model.safetensors", "cut short", "download it again"]),
    "cut to its header": (lambda f: cut(f, 10**6), ["model.safetensors", "cut short"]),
    "empty": (overwritten(b""), ["model.safetensors", "cut short"]),
    "no safetensors": (overwritten(b"PK\3\4" * 99), ["not a readable safetensors"]),
    "a header of terabytes": (overwritten(b"\xff" * 99), ["model.safetensors"]),
    "a pickle": (pickled("pytorch_model.bin"),
                 ["pytorch_model.bin is a pickle", "runs whatever", "Convert it"]),
    "a pickle of torch": (pickled("consolidated.00.pth"), ["consolidated.00.pth is a"]),
    "another pickle": (pickled("weights.pt"), ["weights.pt is a pickle"]),
    "no weights": (lambda f: (f / checkpoints.WEIGHTS).unlink(),
                   ["holds no model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no file", "config.json"]),
    "one file and an index": (
        lambda f: (f / checkpoints.INDEX).write_text('{"weight_map": {"a": "b"}}'),
        ["model.safetensors and model.safetensors.index.json", "Remove the older"]),
    "a weight of another shape": (
        into(UP, lambda a: a[:-1]),
        ["model.safetensors", UP, "(199, 131)", "asks for (200, 131)"]),
    "a weight transposed": (into(UP, lambda a: a.T), [UP, "(131, 200)"]),
    "a vector as a column": (into(BIAS, lambda a: a[:, None]), [BIAS, "(8, 1)"]),
    "an expert of another shape": (into(EXPERT, lambda a: a.T), [EXPERT, "(130, 131)"]),
    "a weight missing": (without(UP), [UP, "(200, 131)", "incomplete"]),
    "an expert missing": (without(EXPERT), [EXPERT]),
    "a bias missing": (without(BIAS), [BIAS]),
    "a copy missing": (without(COPY), [COPY, "whole or absent"]),
    "the last norm of a module missing": (
        without("model.layers.2.shared_head.norm.weight"), ["2.shared_head.norm"]),
    "a weight too many": (with_more("lm_head.bias"), ["lm_head.bias", "not ask for"]),
    "an expert too many": (
        with_more(EXPERT.replace("5", "8")), ["experts.8.down_proj", "not ask for"]),
    "a layer too many": (with_more("model.layers.7.enorm.weight"), ["layers.7.enorm"]),
    "scales of nothing": (with_more(f"{UP}_scale_inv"), [f"{UP}_scale_inv"]),
    "whole numbers": (into(UP, lambda a: a.astype(np.int8)), [UP, "int8", "bfloat16"]),
    "E5M2": (into(UP, lambda a: a.astype(ml_dtypes.float8_e5m2)), [UP, "float8_e5m2"]),
    "FP8 without a word in the config": (
        into(UP, lambda a: a.astype(ml_dtypes.float8_e4m3fn)),
        [UP, "no quantization_config"]),
    "a type that NumPy does not have": (unknown_type, [BIAS, "F4", "known are"]),
    "another architecture": (
        lambda f: words(f, model_type="llama"), ["model_type = 'llama'", "seek_v3"]),
    "V2-Lite": (
        lambda f: words(f, model_type="deepseek_v2", scoring_func="softmax"),
        ["model_type = 'deepseek_v2'"]),
    "softmax routing": (
        lambda f: words(f, scoring_func="softmax"), ["scoring_func = 'softmax'"]),
    "another size in the config": (
        lambda f: words(f, intermediate_size=201), ["mlp.gate_proj", "(201, 131)"]),
    "fewer layers in the config": (
        lambda f: words(f, num_hidden_layers=1, first_k_dense_replace=1),
        ["model.layers.1."]),
    "fewer experts in the config": (
        lambda f: words(f, n_routed_experts=4, n_group=2, num_experts_per_tok=2),
        ["mlp.gate.weight", "(8, 131)", "(4, 131)"]),
    "no latent of the queries in the config": (
        lambda f: words(f, q_lora_rank=None) or (f / "config.json").write_text(
            json.dumps(json.loads((f / "config.json").read_text())
                       | {"q_lora_rank": None})), ["self_attn.q_proj.weight"]),
    "int8": (quantisation(quant_method="bitsandbytes"),
             ["quant_method = 'bitsandbytes'", "must be 'fp8'"]),
    "int4 of Kimi": (quantisation(quant_method="compressed-tensors"),
                     ["config.json", "compressed-tensors"]),
    "another FP8": (quantisation(fmt="e5m2"), ["fmt = 'e5m2'", "'e4m3'"]),
    "blocks that are none": (quantisation(weight_block_size=128),
                             ["weight_block_size = 128", "[128, 128]"]),
    "no blocks": (quantisation(weight_block_size=None), ["weight_block_size = None"]),
    "blocks of nothing": (quantisation(weight_block_size=[0, 128]), ["[0, 128]"]),
    "blocks of truth": (quantisation(weight_block_size=[True, 128]), ["[True, 128]"]),
    "a quantisation that is none": (
        lambda f: words(f, quantization_config="fp8"), ["quantization_config = 'fp8'"]),
}  # fmt: skip
IN_FP8 = {
    "scales missing": (without(f"{UP}_scale_inv"), [UP, f"no {UP}_scale_inv"]),
    "scales transposed": (
        into(f"{UP}_scale_inv", lambda a: a.repeat(2, axis=0).T),
        [f"{UP}_scale_inv", "(2, 4)", "shape (2, 2)"]),
    "a ragged edge without a scale": (
        into(f"{EXPERT}_scale_inv", lambda a: a[:1]), [EXPERT, "(1, 2)", "(2, 2)"]),
    "scales in another type": (
        into(f"{UP}_scale_inv", lambda a: a.astype(np.int32)), [UP, "int32"]),
    "no quantization_config": (
        lambda f: words(f, quantization_config=None), ["no quantization_config"]),
    "blocks of another size": (
        quantisation(weight_block_size=[64, 64]), ["_scale_inv", "blocks of (64, 64)"]),
    "a vector in FP8": (
        lambda f: edit(f, lambda t: t.update({
            BIAS: t[BIAS].astype(ml_dtypes.float8_e4m3fn),
            f"{BIAS}_scale_inv": np.ones(1, np.float32)})), [BIAS, "no matrix"]),
    "scales of activations": (with_more(f"{UP[:-6]}input_scale"), ["input_scale"]),
}  # fmt: skip


def refusal_of(call: Callable) -> str:
    """The message of a refusal."""
    try:
        call()
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return "nothing is refused"


def refusal(folder: Path) -> str:
    """The message; opening must refuse, and read no number before."""
    mapped = []

    def read(stored: safetensors_files.Stored) -> np.ndarray:
        mapped.append(stored)
        raise AssertionError("a number is read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files.Stored, "mapped", read)
        return refusal_of(lambda: checkpoints.open_lazily(folder))


def check_refused(folder: Path, what: tuple, dtype: str | None = None) -> None:
    change, said = what
    checkpoints.save(folder, WIDE, fresh(), dtype)
    change(folder)
    message = refusal(folder)
    for word in said:
        assert word in message, message
    assert str(folder) in message


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_by_name(tmp_path, what: str) -> None:
    check_refused(tmp_path, REFUSALS[what])


@pytest.mark.parametrize("what", IN_FP8)
def test_fp8_refused_by_name(tmp_path, what: str) -> None:
    check_refused(tmp_path, IN_FP8[what], "float8_e4m3fn")


def test_a_file_in_place_of_a_folder(tmp_path) -> None:
    checkpoints.save(tmp_path, WIDE, fresh())
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        checkpoints.load(tmp_path / checkpoints.WEIGHTS)


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path) -> None:
    """Many downloads have both."""
    checkpoints.save(tmp_path, WIDE, fresh())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert checkpoints.load(tmp_path)[0] == WIDE


def check_copies(folder: Path, dtype: str | None = None) -> None:
    """One number of a copy differs: seen when the original is read, and by `load`."""
    for name, first in checkpoints.COPIES.items():
        copy = f"model.layers.2.{name}"
        for row in (0, 100, 255, 256):  # in the first band of rows, and in the last
            checkpoints.save(folder, WIDE, fresh(), dtype)

            def change(tensors: dict, copy: str = copy, row: int = row) -> None:
                tensors[copy][row, 0] += 1

            edit(folder, change)
            _, lazy = checkpoints.open_lazily(folder)
            for name in lazy.keys() - {first}:
                lazy[name]
            for read in (lambda lazy=lazy, first=first: lazy[first],
                         lambda: checkpoints.load(folder)):  # fmt: skip
                message = refusal_of(read)
                assert f"{copy} differs from {first}" in message, row


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_copy_that_differs_is_refused(tmp_path, dtype) -> None:
    check_copies(tmp_path, dtype)


def test_without_modules_a_notice_and_no_more(tmp_path) -> None:
    checkpoints.save(tmp_path, WIDE, fresh())
    edit(tmp_path, lambda t: [t.pop(k) for k in list(t) if ".layers.2." in k])
    with pytest.warns(checkpoints.CheckpointNotice, match="no MTP weights.* is 1"):
        config, loaded = checkpoints.load(tmp_path)
    assert config.num_nextn_predict_layers == 0
    assert not [name for name in loaded if ".layers.2." in name]


# --- several files --------------------------------------------------------------------

SECOND = "model-00002-of-"


def index(folder: Path) -> dict:
    return json.loads((folder / checkpoints.INDEX).read_text())["weight_map"]


def indexed(folder: Path, homes: object) -> None:
    (folder / checkpoints.INDEX).write_text(json.dumps({"weight_map": homes}))


def file_of(folder: Path, start: str = SECOND) -> Path:
    [path] = folder.glob(f"{start}*")
    return path


def emptied(folder: Path) -> None:
    checkpoints.write_tensors(file_of(folder), {"x": np.ones(1)}, {})


def swapped(folder: Path) -> None:
    one, other = file_of(folder), file_of(folder, "model-00003-of-")
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def led_out(folder: Path) -> None:
    path = file_of(folder)
    path.rename(folder.parent / path.name)
    homes = index(folder)
    indexed(folder, {k: f"../{v}" if v == path.name else v for k, v in homes.items()})


IN_FILES = {
    "a file missing": (lambda f: file_of(f).unlink(),
                       [SECOND, "lacks 1 of the", "complete the download"]),
    "a file cut short": (lambda f: file_of(f).write_bytes(
        file_of(f).read_bytes()[:-1]), [SECOND, "cut short"]),
    "a file of another model": (emptied, [SECOND, INDEX := checkpoints.INDEX]),
    "two files exchanged": (swapped, [SECOND, "different downloads"]),
    "a tensor that the index leaves out": (
        lambda f: indexed(f, {k: v for k, v in index(f).items() if k != KV}),
        [KV, "has a model", "says it has no"]),
    "a tensor that only the index has": (
        lambda f: indexed(f, index(f) | {"x": file_of(f).name}), ["has no x", SECOND]),
    "an index that leads out": (led_out, ["../model-0000", "not beside it"]),
    "half an index": (lambda f: (f / INDEX).write_text("{"), ["is no index of"]),
    "a list": (lambda f: (f / INDEX).write_text("[]"), ["is no index of weights"]),
    "no map": (lambda f: (f / INDEX).write_text("{}"), ["is no index of weights"]),
    "a map that is none": (lambda f: indexed(f, []), ["is no index of weights"]),
    "a map to numbers": (lambda f: indexed(f, {"a": 3}), ["is no index of weights"]),
    "a map of nothing": (lambda f: indexed(f, {}), ["is no index", "empty"]),
}  # fmt: skip


def check_refused_in_files(folder: Path, what: tuple) -> None:
    change, said = what
    folder = folder / "model"
    checkpoints.save(folder, WIDE, fresh(), "bfloat16", max_shard_bytes=60_000)
    change(folder)
    message = refusal(folder)
    for word in said:
        assert word in message, message


@pytest.mark.parametrize("what", IN_FILES)
def test_several_files_refused_by_name(tmp_path, what: str) -> None:
    check_refused_in_files(tmp_path, IN_FILES[what])


def test_the_message_of_a_training_run(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="give the folder that training wrote"):
        checkpoints.load(tmp_path / "nowhere")


def test_a_save_that_was_cut_off_is_explained(tmp_path) -> None:
    checkpoints.save(tmp_path, MOONLIGHT, fresh(MOONLIGHT))
    (tmp_path / "config.json").rename(tmp_path / "config.json.old")
    with pytest.raises(CheckpointError, match=re.escape("rename config.json.old to")):
        checkpoints.load(tmp_path)
    (tmp_path / "config.json.old").rename(tmp_path / "config.json")
    assert checkpoints.load(tmp_path)[0] == MOONLIGHT
