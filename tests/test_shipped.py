"""The trained MINI that comes with the package, and how it says it was made."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minidsv3 import checkpoints, corpus, yardsticks
from minidsv3.__main__ import main
from minidsv3.config import MINI
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.options import configs, parser
from minidsv3.safetensors_files import open_tensors
from minidsv3.shipped import MINI_FOLDER
from minidsv3.training import run_folder
from minidsv3.training.torch_port import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))

import ship_mini  # noqa: E402


def card() -> dict:
    return json.loads((MINI_FOLDER / "run.json").read_text(encoding="utf-8"))


def recipe():
    """What the command on the card asks for."""
    words = shlex.split(card()["command"])
    assert words[:3] == ["python", "-m", "minidsv3"]
    return configs(parser().parse_args(words[3:]))


def test_it_is_small_and_in_the_released_layout() -> None:
    size = sum(path.stat().st_size for path in MINI_FOLDER.iterdir())
    assert size <= 16e6
    config, _ = checkpoints.open_lazily(MINI_FOLDER)
    assert config == MINI
    tensors, _ = open_tensors(MINI_FOLDER / checkpoints.WEIGHTS)
    types = {name: tensor.dtype.name for name, tensor in tensors.items()}
    expert = "model.layers.1.mlp.experts.255.down_proj.weight"
    assert types[expert] == "float8_e4m3fn"
    assert types[expert + "_scale_inv"] == "float32"
    assert types["lm_head.weight"] == "bfloat16"
    assert types["model.layers.3.mlp.gate.e_score_correction_bias"] == "float32"


def test_the_command_on_the_card_is_one_that_train_takes() -> None:
    model, train = recipe()
    assert model == MINI
    tokens = train.steps * train.batch_size * train.sequence_length
    assert card()["training_tokens"] == tokens


def test_the_log_is_that_of_the_command() -> None:
    _, train = recipe()
    with open(MINI_FOLDER / run_folder.LOG, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(10, train.steps + 1, 10))
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) == pytest.approx(train.learning_rate, rel=1e-3)
    assert rates[-1] == pytest.approx(train.min_learning_rate)
    with open(MINI_FOLDER / run_folder.HELD_OUT, newline="") as file:
        curve = [float(row["bits_per_byte"]) for row in csv.DictReader(file)]
    assert curve == sorted(curve, reverse=True)


def same_text() -> corpus.Corpus:
    text = corpus.load_corpus()
    if text.sha256 not in card()["text"]:
        pytest.skip("this Python's library is not the text that it was trained on")
    return text


@pytest.mark.slow
def test_bits_per_byte_are_as_the_card_says() -> None:
    text, (_, train) = same_text(), recipe()
    model = DeepSeekV3.from_pretrained(MINI_FOLDER)
    bits = evaluate(model, text.held_out, train.sequence_length)
    said = card()["held_out_bits_per_byte"]
    assert bits == pytest.approx(said["in FP8"], abs=2e-3)
    assert said["in FP8"] == pytest.approx(said["as trained"], abs=0.01)
    assert bits < yardsticks.xz(text.held_out), "a compressor without a weight"


def test_text_right_after_install(capfdbinary) -> None:
    given = ["generate", "--prompt", "def ", "--seed", "1", "--temperature", "0.6"]
    assert main([*given, "--max-new-tokens", "120"]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert text.startswith("def ") and "):\n" in text and "\n    " in text


def test_a_function_is_cut_at_its_end() -> None:
    whole = "def f(x):\n\n    # a\n    return x\n"
    assert ship_mini.of_one_function(whole + "\nclass A:\n    pass\n") == whole + "\n"
    assert ship_mini.of_one_function(whole + "    y =") == whole
    assert ship_mini.parses(whole) and not ship_mini.parses("def f(x):\n")
    assert not ship_mini.parses("# nothing to read\n")


def test_headers_are_of_held_out_functions() -> None:
    found = ship_mini.headers(50)
    assert len(set(found)) == 50
    ids = corpus.load_corpus().held_out
    text = bytes(np.where(ids == corpus.BOUNDARY, 0, ids).astype(np.uint8))
    assert all(b"\n" + header.encode() in text for header in found)


def test_git_has_it() -> None:
    """Model files are ignored, but for this one: a clone must have it."""
    root = MINI_FOLDER.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not in a clone")
    words = ["git", "-C", str(root), "ls-files", "minidsv3/mini"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    names = {Path(line).name for line in listed.split()}
    assert names == {path.name for path in MINI_FOLDER.iterdir()}
