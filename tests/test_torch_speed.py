"""The numbers of chapter 7 that a command made, and its short trainings."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import torch_runs  # noqa: E402
import torch_speed as speed  # noqa: E402

from minidsv3.config import TINY, TrainConfig  # noqa: E402
from minidsv3.corpus import load_corpus  # noqa: E402
from minidsv3.model.torch_port import DeepSeekV3  # noqa: E402
from minidsv3.moe import torch_port as moe  # noqa: E402
from minidsv3.training import processor  # noqa: E402


def test_rows_say_where_they_come_from() -> None:
    head = (speed.RESULTS / "torch_speed.csv").read_text().splitlines()[:3]
    assert head[0].startswith("# python book/torch_speed.py --threads ")
    assert "torch 2." in head[1] and "transformers 5." in head[1]
    rows = speed.read("torch_speed")
    assert [row["arm"] for row in rows] == list(speed.ARMS)


def test_every_arm_computed_the_same() -> None:
    """The first loss of each process; rounding apart, and bfloat16's."""
    rows = {row["arm"]: row["loss"] for row in speed.read("torch_speed")}
    for arm, loss in rows.items():
        tolerance = 1e-2 if arm == "bfloat16" else 1e-4
        assert loss == pytest.approx(rows["transformers"], rel=tolerance), arm


def test_an_arm_has_the_changes_up_to_its_own(monkeypatch) -> None:
    """On a small model: one loss and one gradient, whatever is undone."""
    monkeypatch.setattr(speed, "CONFIG", TINY)
    seen, gradients = [], {}
    for arm in speed.OURS[:-1]:
        with ExitStack() as stack:
            for patch in speed.undo(arm):
                stack.enter_context(patch)
            model = DeepSeekV3(TINY, init_std=0.2)
            ids = torch.arange(40).view(2, 20) % TINY.vocab_size
            model.loss(ids).losses["total"].backward()
            here = (moe.RoutedExperts.forward, moe.top)
            seen.append(here)
        gradients[arm] = torch.cat([w.grad.flatten() for w in model.parameters()])
    assert seen[0][0] is speed.by_loop and seen[1][0] is speed.by_grouped_mm
    assert seen[4][1] is moe.top_anywhere and seen[5][1] is moe.top
    for arm, gradient in gradients.items():
        gap = (gradient - gradients["oneDNN"]).norm() / gradient.norm()
        assert gap < 1e-5, arm


def test_products_of_a_step_against_torchs_own_counter() -> None:
    """torch counts what it multiplies; chunks of attention stop at the diagonal."""
    T = 256
    model = DeepSeekV3(replace(TINY, max_position_embeddings=T, hidden_size=64))
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        for patch in speed.undo("loop over experts"):
            stack.enter_context(patch)
        model(torch.zeros(1, T, dtype=torch.int64))
    config = replace(model.config, num_nextn_predict_layers=0)
    ours = 2 * T * torch_runs.multiplications(config, T)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.35)
    assert ours < counter.get_total_flops(), "the counter sees the masked half too"


def test_oneDNN_stays_only_if_it_is_exact(monkeypatch) -> None:  # noqa: N802
    home = torch.backends.mkldnn.matmul
    before = home.fp32_precision
    try:
        monkeypatch.setattr(processor, "_is_float32", lambda *_: False)
        assert not processor.float32_through_onednn()
        assert home.fp32_precision == before
        monkeypatch.setattr(processor, "_is_float32", lambda *_: True)
        assert (
            processor.float32_through_onednn() == torch.backends.mkldnn.is_available()
        )
    finally:
        home.fp32_precision = before


def test_a_rounded_product_is_noticed(monkeypatch) -> None:
    assert processor._is_float32(32, 64, 32)
    plain = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not processor._is_float32(32, 64, 32)


def test_a_branch_goes_on_as_its_trunk_would() -> None:
    text = load_corpus()
    recipe = TrainConfig(steps=8, batch_size=2, sequence_length=16, warmup_steps=2)
    whole = torch_runs.short(torch_runs.fresh(TINY, recipe), recipe, text)
    trunk = torch_runs.short(torch_runs.fresh(TINY, recipe), recipe, text, until=5)
    copy = torch_runs.branch(trunk.state, recipe)
    rest = torch_runs.short(copy, recipe, text)
    np.testing.assert_array_equal(np.append(trunk.main, rest.main), whole.main)
    assert trunk.state.step == 5, "the trunk stays where it was"


def test_weights_kept_in_bfloat16_are() -> None:
    text = load_corpus()
    recipe = TrainConfig(steps=3, batch_size=2, sequence_length=16, warmup_steps=1)
    end = torch_runs.short(torch_runs.fresh(TINY, recipe), recipe, text, rounded=True)
    for weight in end.state.model.parameters():
        assert torch.equal(weight, weight.bfloat16().float())


def test_smooth_is_the_mean_of_whole_groups() -> None:
    np.testing.assert_array_equal(torch_runs.smooth(np.arange(7.0), 3), [1.0, 4.0])
