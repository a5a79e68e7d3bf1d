"""Training in PyTorch: step for step the NumPy loop, and runs that are killed.

In float64 both loops must agree to rounding; in the precisions that are used, a run
must be the same run after a kill, bit for bit.
"""

import copy
import dataclasses
import errno
import os
import random
import re
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, parameters, safetensors_files
from minidsv3.__main__ import main
from minidsv3.checkpoints import CheckpointError
from minidsv3.config import TINY, Config, TrainConfig
from minidsv3.corpus import batch
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.training import command, processor, run_folder
from minidsv3.training import numpy_ref as reference
from minidsv3.training import torch_port as training
from tests import test_training
from tests.oracles import relative_error
from tests.test_cli import text, wait_for_log  # noqa: F401, a fixture
from tests.test_moe_model import fresh, is_bias
from tests.test_primitives import normal
from tests.test_training import TEXT, same
from tests.test_whole_run import check_same_run, start
from tests.torch_ports import gradients, port

RECIPE = TrainConfig(
    steps=6,
    batch_size=4,
    sequence_length=14,
    warmup_steps=2,
    learning_rate=3e-3,
    clip_norm=0.3,
    seed=3,
    adam_eps=1e-3,  # or noise in gradients near 0 becomes whole steps
    bias_update_speed=0.01,
    balance_weight=0.1,
    weight_decay=0.3,
)
# relative, float64: rounding, carried on by six steps; 1e-12 was seen
SIX_STEPS = 1e-10


def new_start(config: Config = TINY, dtype: type = np.float64) -> reference.TrainState:
    """Weights that matter, and biases of the routers."""
    params = {name: array.astype(dtype) for name, array in fresh(config).items()}
    return reference.new_state(params)


def new_state(
    config: Config = TINY, recipe: TrainConfig = RECIPE, dtype: type = np.float64
) -> training.TrainState:
    return training.TrainState(config, recipe, new_start(config, dtype))


# --- step for step --------------------------------------------------------------------


def check_same_training(
    config: Config = TINY, recipe: TrainConfig = RECIPE, dtype: type = np.float64
) -> None:
    """Weights, both moments, biases, records: all that NumPy's loop leaves."""
    tolerance = SIX_STEPS if dtype == np.float64 else 1e-4
    ours, expected = new_state(config, recipe, dtype), new_start(config, dtype)
    records = training.train(ours, config, recipe, TEXT)
    peers = reference.train(expected, config, recipe, TEXT)
    for one, other in zip(records, peers, strict=True):
        assert one.step == ours.step == other.step
        assert list(one.losses) == list(other.losses)
        assert one.losses == pytest.approx(other.losses, rel=tolerance)
        assert one.learning_rate == other.learning_rate and one.seconds > 0
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
        assert one.stats.keys() == other.stats.keys()
        if dtype == np.float64:
            assert same(one.stats.get("load", {}), other.stats.get("load", {}))
    for part in ("params", "m", "v"):
        table, theirs = getattr(ours, part), getattr(expected, part)
        assert table.keys() == theirs.keys()
        for name, array in theirs.items():
            assert table[name].dtype == dtype
            assert relative_error(table[name], array) <= tolerance, (part, name)


CONFIGS = {
    "TINY": TINY,
    "plain": test_training.SMALL,
    "two modules": dataclasses.replace(TINY, num_nextn_predict_layers=2),
    "K = 1": dataclasses.replace(TINY, num_experts_per_tok=1),
}
RECIPES = {
    "clipped": RECIPE,
    "not clipped": dataclasses.replace(RECIPE, clip_norm=1e4),
    "no decay": dataclasses.replace(RECIPE, weight_decay=0.0),
    "in two parts": dataclasses.replace(RECIPE, accumulate=2),
    "in four parts": dataclasses.replace(RECIPE, accumulate=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_is_numpys(config: Config) -> None:
    check_same_training(config)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_is_numpys_by_every_recipe(recipe: TrainConfig) -> None:
    check_same_training(recipe=recipe)


def test_training_is_numpys_in_float32() -> None:
    """To 1e-4 of each weight: 6e-8 a rounding, enlarged where Adam divides by ε."""
    check_same_training(dtype=np.float32)


def test_training_goes_on_in_the_middle() -> None:
    """From any step of NumPy's: its moments and its count of steps are taken over."""
    half = new_start()
    for record in reference.train(half, TINY, RECIPE, TEXT):
        if record.step == 3:
            break
    ours = training.TrainState(TINY, RECIPE, copy.deepcopy(half))
    assert ours.step == 3
    for part in ("params", "m", "v"):
        assert same(getattr(ours, part), getattr(half, part))
    for state, train in ((ours, training.train), (half, reference.train)):
        assert [r.step for r in train(state, TINY, RECIPE, TEXT)] == [4, 5, 6]
    for name, array in half.params.items():
        assert relative_error(ours.params[name], array) <= SIX_STEPS, name


def check_the_optimisers_steps_lie_with_the_weights() -> None:
    """The fused optimiser reads them where it computes."""
    state = training.TrainState(TINY, RECIPE, new_start(), "meta")
    for weight, kept in state.optimiser.state.items():
        assert weight.is_meta and all(tensor.is_meta for tensor in kept.values())


def test_everything_is_moved_to_the_device() -> None:
    check_the_optimisers_steps_lie_with_the_weights()


def check_accumulation() -> None:
    """Parts of a batch: its gradient, its losses, and its loads added up."""
    ids = torch.tensor(batch(TEXT, 4, 14, 0, 0))
    results = []
    for parts in (1, 2, 4):
        model = port(fresh(TINY), TINY)
        recipe = dataclasses.replace(RECIPE, accumulate=parts)
        losses, loads = training._gradients(model, ids, recipe)
        loads = {name: counts.numpy() for name, counts in loads.items()}
        results.append((losses, gradients(model), loads))
    for losses, grads, loads in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-12)
        for name, grad in results[0][1].items():
            assert relative_error(grads[name], grad) <= 1e-10, name
        assert same(loads, results[0][2]) and len(loads) == 2


def test_accumulation_is_the_whole_batch() -> None:
    check_accumulation()


def check_lambda() -> None:
    state = new_state()
    for record in training.train(state, TINY, RECIPE, TEXT):
        losses = record.losses
        rest = losses["total"] - losses["main"] - 0.1 * losses["balance"]
        expected = 0.3 if record.step <= 5 else 0.1
        assert rest / losses["mtp_1"] == pytest.approx(expected)


def test_training_uses_the_weight_of_its_step() -> None:
    check_lambda()


def check_biases() -> None:
    """Each moves by γ after a step, against the load that the step reports."""
    state = new_state()
    before = {k: a.copy() for k, a in state.params.items() if is_bias(k)}
    for record in training.train(state, TINY, RECIPE, TEXT):
        for name, counts in record.stats["load"].items():
            moved = state.params[name] - before[name]
            expected = 0.01 * np.sign(counts.mean() - counts)
            np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-15)
            before[name] = state.params[name].copy()
    assert not any(state.m[name].any() or state.v[name].any() for name in before)


def test_the_biases_move_by_the_load_of_the_step() -> None:
    check_biases()


def check_evaluation_changes_nothing() -> None:
    state = new_state()
    before = {name: array.copy() for name, array in state.params.items()}
    training.evaluate(state.model, TEXT[:200], 14)
    assert same(state.params, before)
    assert all(weight.grad is None for weight in state.model.parameters())


def test_evaluation_changes_nothing() -> None:
    check_evaluation_changes_nothing()


def check_decay_groups() -> None:
    """As `decays` says: not norms and the embedding, and no router's bias at all."""
    state = new_state()
    names = {id(w): name for name, w in state.model.named_parameters()}
    for group in state.optimiser.param_groups:
        for weight in group["params"]:
            decays = reference.decays(names.pop(id(weight)))
            assert group["weight_decay"] == (0.3 if decays else 0.0)
    assert not names


def test_weight_decay_leaves_out_what_numpys_does() -> None:
    check_decay_groups()


def check_not_finite(bad: float = np.nan, name: str = "model.norm.weight") -> None:
    """Raised before a weight, a moment, a bias or the count changes, with the name."""
    state, right = new_state(), training._gradients
    before = copy.deepcopy([state.params, state.m, state.v])

    def overflowing(model: DeepSeekV3, *given) -> tuple:
        result = right(model, *given)
        model.get_parameter(name).grad.view(-1)[3] = bad
        return result

    message = f"step 1: the gradient of {name} is not finite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.train.__globals__, "_gradients", overflowing)
        with pytest.raises(FloatingPointError) as raised:
            next(training.train(state, TINY, RECIPE, TEXT))
    assert message in str(raised.value)
    after = [state.params, state.m, state.v]
    assert all(same(one, other) for one, other in zip(before, after, strict=True))
    assert state.step == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.2.mlp.experts.up_proj.weight"]
)
def test_a_gradient_that_is_not_finite(bad: float, name: str) -> None:
    check_not_finite(bad, name)


def test_a_norm_beyond_float32_is_told_apart() -> None:
    """NumPy clips it: its norm is summed up in float64."""
    model = port({k: a.astype(np.float32) for k, a in fresh(TINY).items()}, TINY)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e25)
    training._clip(model, 1.0)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e25)
    assert training._first_not_finite(model).startswith("all together")


# --- precision ------------------------------------------------------------------------


def check_half_training() -> None:
    """A few steps in bfloat16: the losses of float32 to 1e-3; weights float32.

    From small weights, as training starts: logits that an error of 0.4 % hardly moves.
    """
    losses = []
    for precision in ("float32", "bfloat16"):
        recipe = dataclasses.replace(RECIPE, precision=precision)
        begin = reference.new_state(parameters.initialise(TINY, 0, 0.02))
        state = training.TrainState(TINY, recipe, begin)
        records = list(training.train(state, TINY, recipe, TEXT))
        losses.append([record.losses["main"] for record in records])
        for part in (state.params, state.m, state.v):
            assert {array.dtype for array in part.values()} == {np.dtype(np.float32)}
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] != losses[1]


def test_training_in_bfloat16() -> None:
    check_half_training()


def check_evaluate(tokens: np.ndarray | None = None) -> None:
    """Every token after the first counts once; what is left over and boundaries too."""
    if tokens is None:
        tokens = np.concatenate([TEXT[:40], [256], TEXT[:30]]).astype(np.uint16)
    params = fresh(TINY)
    model = port(params, TINY)
    for length, size, n_bytes in ((7, 2, None), (64, 1, None), (5, 16, 50), (1, 3, 9)):
        expected = reference.evaluate(params, TINY, tokens, length, size, n_bytes)
        ours = training.evaluate(model, tokens, length, size, n_bytes=n_bytes)
        assert ours == pytest.approx(expected, rel=1e-12)
    half = training.evaluate(model.float(), tokens, 7, precision="bfloat16")
    exact = training.evaluate(model, tokens, 7)
    assert half == pytest.approx(exact, rel=1e-2) and half != exact


def test_evaluation_is_numpys() -> None:
    check_evaluate()


@pytest.mark.parametrize(
    ("tokens", "length", "size"), [([65], 8, 1), ([65, 256], 8, 1), ([65, 66], 0, 1)]
)
def test_evaluation_refuses(tokens: list, length: int, size: int) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        training.evaluate(port(fresh(TINY), TINY), np.array(tokens), length, size)


def check_evaluation_is_finite() -> None:
    params = {name: array.astype(np.float32) for name, array in fresh(TINY).items()}
    params["lm_head.weight"][:] = 3e38
    with pytest.raises(FloatingPointError, match="the loss on the text is not finite"):
        training.evaluate(port(params, TINY), TEXT[:50], 7)


def test_evaluation_that_overflows_is_no_number() -> None:
    check_evaluation_is_finite()


def check_onednn() -> None:
    """Whoever computes float32 products afterwards, they are as exact as before."""
    home = torch.backends.mkldnn.matmul
    before = home.fp32_precision
    try:
        stays = processor.float32_through_onednn()
        assert stays or home.fp32_precision == before
        a, b = torch.tensor(normal(2, 300, 300), dtype=torch.float32)
        error = relative_error((a @ b).numpy(), (a.double() @ b.double()).numpy())
        assert error < 1e-6
        home.fp32_precision = before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processor, "_is_float32", lambda *shape: False)
            assert not processor.float32_through_onednn()
        assert home.fp32_precision == before
    finally:
        home.fp32_precision = before


def test_float32_stays_float32_on_every_processor() -> None:
    check_onednn()


# --- the command ----------------------------------------------------------------------

TRAIN = ["train", "--backend", "torch", "--device", "cpu", "--preset", "tiny",
         "--batch-size", "4", "--sequence-length", "24",
         "--set", "bias_update_speed=0.01"]  # fmt: skip
HALF = ["--precision", "bfloat16", "--accumulate", "2"]


def asked(text: Path, out: Path, steps: int, *more: str) -> list[str]:  # noqa: F811
    return [*TRAIN, "--text", str(text), "--out", str(out), "--steps", str(steps),
            *more]  # fmt: skip


@pytest.mark.parametrize("more", [[], HALF], ids=["float32", "bfloat16, in two parts"])
def test_a_run_survives_kills_bit_for_bit(
    tmp_path: Path,
    text: Path,  # noqa: F811
    more: list,
) -> None:
    """Killed while it saves each step, and between two saves, when nobody chose."""
    steps = 45
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(asked(text, whole, steps, *more)) == 0
    dice, reached, resume = random.Random(), 0, []
    for often in ("1", "7"):
        reached += dice.randrange(3, 14)
        given = asked(text, killed, steps, "--save-every", often, *more, *resume)
        process = start(*given)
        wait_for_log(killed / run_folder.LOG, reached)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        assert process.wait() != 0, "it ended before it was killed"
        resume = ["--resume"]
    assert main(asked(text, killed, steps, *more, "--resume")) == 0
    check_same_run(whole, killed)
    tensors, _ = run_folder.read_tensors(whole / run_folder.STATE)
    biases = [a for k, a in tensors.items() if is_bias(k) and k.startswith("params/")]
    assert len(biases) == 2 and all(np.abs(b).max() > 0.05 for b in biases)


def check_refused_resumption(tmp_path: Path, text: Path, capsys) -> None:  # noqa: F811
    out = tmp_path / "run"
    assert main(asked(text, out, 2)) == 0
    state = (out / run_folder.STATE).read_bytes()
    for change, message in (
        (["--backend", "numpy"], "another backend: torch -> numpy"),
        (["--precision", "bfloat16"], "recipe: precision: float32 -> bfloat16"),
        (["--accumulate", "2"], "another recipe: accumulate: 1 -> 2"),
        (["--seed", "1"], "another recipe: seed: 0 -> 1"),
    ):
        capsys.readouterr()
        assert main(asked(text, out, 2, "--resume", *change)) == 2
        assert message in capsys.readouterr().err
    assert (out / run_folder.STATE).read_bytes() == state


def test_another_run_is_not_resumed(tmp_path, text, capsys) -> None:  # noqa: F811
    check_refused_resumption(tmp_path, text, capsys)


def test_numpys_run_is_not_resumed_by_torch(tmp_path: Path) -> None:
    run_folder.save(tmp_path, new_state(), TINY, RECIPE, "text", "numpy")
    with pytest.raises(CheckpointError, match="another backend: numpy -> torch"):
        run_folder.resume(tmp_path, TINY, RECIPE, "text", "torch")


def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path,
    text: Path,  # noqa: F811
    capsys,
    monkeypatch,
) -> None:
    """The writer fails half-way, at the state's file and at the model's in turn."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(asked(text, whole, 9)) == 0
    right, left = safetensors_files.save_file, [0]

    def short_of_space(tensors: dict, path: Path, *more) -> None:
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        right(tensors, path, *more)

    resume = []
    for good, step in ((4, 2), (3, 3), (5, 5)):  # saves before it is full, steps saved
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_files, "save_file", short_of_space)
            left[0] = good
            assert main(asked(text, out, 9, "--save-every", "1", *resume)) == 2
        assert "No space left" in capsys.readouterr().err
        tensors, metadata = run_folder.read_tensors(out / run_folder.STATE)
        assert int(metadata["step"]) == step - 1
        assert all(np.isfinite(array).all() for array in tensors.values())
        checkpoints.load(out)
        resume = ["--resume"]
    assert main(asked(text, out, 9, "--resume")) == 0
    check_same_run(whole, out)


def check_held_out(tmp_path: Path, text: Path, capsys) -> None:  # noqa: F811
    """A curve of bits per byte; rows of steps that were lost are lost with them."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    every = ["--evaluate-every", "2", "--save-every", "3"]
    assert main(asked(text, whole, 8, *every)) == 0
    rows = (whole / run_folder.HELD_OUT).read_text().splitlines()
    assert rows[0] == "step,bits_per_byte"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "4", "6", "8"]
    said = re.search(r"held-out text: ([\d.]+) bits", capsys.readouterr().out)[1]
    assert f"{float(rows[-1].split(',')[1]):.4f}" == said

    def until_the_fifth(folder: Path, record: reference.StepRecord) -> None:
        if record.step == 5:
            raise KeyboardInterrupt
        append_log(folder, record)

    append_log = run_folder.append_log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.run_folder, "append_log", until_the_fifth)
        assert main(asked(text, out, 8, *every)) == 1
    held_out = out / run_folder.HELD_OUT
    assert len(held_out.read_text().splitlines()) == 3, "of steps 2 and 4"
    with open(held_out, "a") as file:
        file.write("6")  # and a row cut short
    recipe = TrainConfig(
        steps=8,
        batch_size=4,
        sequence_length=24,
        warmup_steps=8,
        bias_update_speed=0.01,
    )
    _, metadata = run_folder.read_tensors(out / run_folder.STATE)
    corpus = metadata["text"].strip('"')
    run_folder.resume(out, TINY, recipe, corpus, "torch")
    assert held_out.read_text().splitlines() == rows[:2]
    assert main(asked(text, out, 8, *every, "--resume")) == 0
    assert held_out.read_text().splitlines() == rows
    check_same_run(whole, out)


def test_the_curve_of_held_out_text(tmp_path, text, capsys) -> None:  # noqa: F811
    check_held_out(tmp_path, text, capsys)


def test_evaluation_in_between_does_not_change_the_run(
    tmp_path: Path,
    text: Path,  # noqa: F811
) -> None:
    for out, more in (("one", []), ("other", ["--evaluate-every", "1"])):
        assert main(asked(text, tmp_path / out, 4, *more)) == 0
    check_same_run(tmp_path / "one", tmp_path / "other")
    assert not (tmp_path / "one" / run_folder.HELD_OUT).exists()


REFUSED = [
    (["--device", "nonsense"], "--device nonsense: torch has no such device here"),
    (["--device", "meta"], "--device meta: torch has no such device here"),
    (["--device", "hpu"], "--device hpu: torch has no such device here"),
    (["--backend", "numpy", "--device", "cuda"], "--backend numpy computes on the cpu"),
    (
        ["--backend", "numpy", *HALF],
        "--precision bfloat16: --backend numpy has",
    ),
    (["--backend", "numpy", "--accumulate", "2"], "--accumulate 2: --backend numpy"),
    (["--accumulate", "3"], "accumulate = 3: must be a divisor of batch_size"),
    (["--precision", "float16"], "precision = 'float16': must be 'float32' or"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_impossible_options_are_explained(
    more: list,
    message: str,
    tmp_path: Path,
    text: Path,  # noqa: F811
    capsys,
) -> None:
    assert main(asked(text, tmp_path / "run", 2, *more)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def check_tensorboard_is_asked_first(tmp_path: Path, text: Path, capsys) -> None:  # noqa: F811
    """Without it nothing is computed, and nothing written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main(asked(text, tmp_path / "run", 2, "--tensorboard")) == 2
    said = capsys.readouterr()
    assert "install it with: pip install tensorboard" in said.err
    assert not said.out and not (tmp_path / "run").exists()


def test_tensorboard_that_is_missing(tmp_path, text, capsys) -> None:  # noqa: F811
    check_tensorboard_is_asked_first(tmp_path, text, capsys)


def check_curves(tmp_path: Path, text: Path) -> None:  # noqa: F811
    """Each loss, the rate, the norm and held-out bits, of every step once."""
    writers = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.scalars = folder, purge_step, {}
            writers.append(self)

        def add_scalar(self, name: str, number: float, step: int) -> None:
            self.scalars.setdefault(name, []).append((step, number))

        def flush(self) -> None:
            self.flushed = True

    out, stub = tmp_path / "run", types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", stub)
        more = ["--tensorboard", "--evaluate-every", "2"]
        assert main(asked(text, out, 4, *more)) == 0
        assert main(asked(text, out, 4, *more, "--resume")) == 0
    first, second = writers
    assert first.folder == str(out / "tensorboard") and first.flushed
    assert (first.purge_step, second.purge_step) == (1, 5) and not second.scalars
    losses = {f"loss/{name}" for name in ("main", "mtp_1", "balance", "total")}
    assert set(first.scalars) == losses | {
        *("rate", "gradient norm", "held-out bits per byte")
    }
    bits = first.scalars.pop("held-out bits per byte")
    assert [step for step, _ in bits] == [2, 4]
    rows = [row.split(",") for row in (out / run_folder.LOG).read_text().split()[1:]]
    assert first.scalars["loss/total"] == [(int(r[0]), float(r[1])) for r in rows]
    for curve in first.scalars.values():
        assert [step for step, _ in curve] == [1, 2, 3, 4]


def test_curves_for_tensorboard(tmp_path, text) -> None:  # noqa: F811
    check_curves(tmp_path, text)


def test_both_back_ends_say_the_same(tmp_path, text, capsys) -> None:  # noqa: F811
    """But for numbers that are measured; and the first loss is the same."""
    said = []
    for backend in ("torch", "numpy"):
        out = tmp_path / "run"
        given = asked(text, out, 3, "--backend", backend, "--evaluate-every", "3")
        assert main(given) == 0
        heard = capsys.readouterr()
        bar = heard.err.split("\r")[-1].strip()
        said.append([re.sub(r"[\d.?]+", "N", part) for part in (heard.out, bar)])
        log = (out / run_folder.LOG).read_text().splitlines()
        said[-1] += [log[0], len(log), (out / run_folder.HELD_OUT).read_text()[:20]]
        said[-1].append(f"{float(log[1].split(',')[1]):.4f}")
        for file in out.iterdir():
            file.unlink()
    said = [[re.sub(r"N(step/s|s/step)", "N", str(one)) for one in s] for s in said]
    assert said[0] == said[1]
    assert "held-out N" in said[0][1] and "mtp_N" in said[0][1]


def test_the_command_trains_as_the_library_does(tmp_path, text) -> None:  # noqa: F811
    """Seed, scale and recipe reach their places; the file holds what was trained."""
    more = ["--seed", "5", "--set", "init_std=0.3", "--warmup-steps", "1", *HALF]
    assert main(asked(text, tmp_path, 2, *more)) == 0
    recipe = TrainConfig(
        steps=2, batch_size=4, sequence_length=24, warmup_steps=1, seed=5, init_std=0.3,
        bias_update_speed=0.01, precision="bfloat16", accumulate=2,
    )  # fmt: skip
    params = parameters.initialise(TINY, 5, 0.3)
    state = training.TrainState(TINY, recipe, reference.new_state(params))
    words = command.corpus.load_corpus(text)
    list(training.train(state, TINY, recipe, words.train))
    assert same(checkpoints.load(tmp_path)[1], state.params)
