"""The numbers of chapter 9: rows that a command made, and what its page counts."""

import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import generation_page as page  # noqa: E402
import generation_speed as measured  # noqa: E402

from minidsv3.config import MINI, TINY, V3  # noqa: E402
from minidsv3.generation.torch_port import ModuleDecoder  # noqa: E402
from minidsv3.model.torch_port import DeepSeekV3  # noqa: E402
from minidsv3.mtp.numpy_ref import accept  # noqa: E402

TABLES = ("generation_speed", "draft_costs", "speculation")


# --- the rows -------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_where_they_come_from(table: str) -> None:
    head = (measured.RESULTS / f"{table}.csv").read_text().splitlines()[:2]
    assert head[0].startswith("# python book/generation_speed.py --threads ")
    assert "torch 2." in head[1] and "transformers 5." in head[1]


def test_every_case_was_measured_once() -> None:
    token = [(r["context"], r["arm"]) for r in measured.read("generation_speed")]
    assert token == [(n, arm) for n in measured.CONTEXTS for arm in measured.ARMS]
    costs = [(r["engine"], r["layers"]) for r in measured.read("draft_costs")]
    assert costs == [(e, n) for e in measured.ENGINES for n in measured.DEPTHS]
    drafts = [
        (r["engine"], r["kind"], r["temperature"]) for r in measured.read("speculation")
    ]
    kinds = ("code", "documentation", "a list")
    assert drafts == [
        (e, kind, t)
        for e in measured.ENGINES
        for kind in kinds
        for t in measured.TEMPERATURES
    ]


def test_caches_hold_what_the_formula_says() -> None:
    c = measured.CONFIG
    width = 4 * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    for row in measured.read("generation_speed"):
        if row["arm"] not in measured.READING:
            assert row["cache_bytes"] == width * row["context"], row


def test_what_the_chapter_says_about_the_clock() -> None:
    """The signs, not the sizes: those are on the page."""
    ms = {(r["arm"], r["context"]): r["ms"] for r in measured.read("generation_speed")}
    for n in measured.CONTEXTS:
        assert ms["reading", n] < ms["compiled", n] < ms["modules", n]
        assert ms["compiled", n] < ms["transformers", n]
    longest = measured.CONTEXTS[-1]
    assert ms["modules", longest] < ms["modules, naive", longest]


def test_both_engines_kept_much_the_same_drafts() -> None:
    """They write the same texts, but for roundings."""
    rows = measured.read("speculation")
    kept = {(r["engine"], r["kind"], r["temperature"]): r["acceptance"] for r in rows}
    for (_, kind, t), share in kept.items():
        assert share == pytest.approx(kept["modules", kind, t], abs=0.08)
        assert 0.5 < share < 1
    for row in rows:
        assert row["tokens_per_pass"] == pytest.approx(1 + row["acceptance"], abs=0.05)


def test_a_draft_gets_cheaper_with_depth() -> None:
    for engine in measured.ENGINES:
        rows = [r for r in measured.read("draft_costs") if r["engine"] == engine]
        share = [r["draft"] / r["one"] for r in rows]
        assert share[0] > 2 * share[-1]
        assert all(r["two"] > 0 and r["draft"] < r["two"] for r in rows)


# --- what the page counts -------------------------------------------------------------


def test_weights_of_deepseek_v3() -> None:
    """36,625,618,432 parameters for a token, head included; a draft is 0.044 of it."""
    numbers = page.weights(V3)
    assert numbers.of_a_pass(V3, 1) == 36_625_618_432
    assert numbers.layers == 58
    assert numbers.expert == 3 * 7168 * 2048
    share = numbers.of_a_draft(V3, 1) / numbers.of_a_pass(V3, 1)
    assert share == pytest.approx(0.044, abs=5e-4)


def test_weights_agree_with_the_measured_models_count() -> None:
    c = measured.CONFIG
    embedding_row = c.hidden_size
    ours = 4 * (page.weights(c).of_a_pass(c, 1) + embedding_row)
    assert ours == pytest.approx(measured.active_bytes(c), rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 22])
def test_visited_against_drawing(tokens: int) -> None:
    rng = np.random.default_rng(0)
    draws = [
        len({e for _ in range(tokens) for e in rng.permutation(256)[:8].tolist()})
        for _ in range(400)
    ]
    assert np.mean(draws) == pytest.approx(page.visited(V3, tokens), rel=0.01)


def test_gain_by_bytes_has_its_ends() -> None:
    """Few texts wake experts; many find them awake, and only the draft costs."""
    gains = [page.gain_by_bytes(V3, 0.875, n) for n in (1, 4, 1e6)]
    assert gains[1] < gains[0] < gains[2]
    numbers = page.weights(V3)
    whole = numbers.of_a_pass(V3, 1e6)
    everything = 1.875 * whole / (whole + numbers.of_a_draft(V3, 1e6))
    assert gains[2] == pytest.approx(everything)


def test_experts_visited_counts_each_once() -> None:
    model = DeepSeekV3(TINY, init_std=0.2)
    ids = np.arange(24).reshape(2, 12) % TINY.vocab_size
    *_, routings = page.both_logits(model, ids)
    rows = np.array([[0, 1, 2], [20, 5, 5]])
    each = [
        len({e for i in row for e in r.experts.reshape(24, -1)[i].tolist()})
        for r in routings
        for row in rows
    ]
    assert page.experts_visited(routings, rows) == pytest.approx(np.mean(each))


def test_both_logits_are_of_the_same_token() -> None:
    """The trunk's after t_{i+1}, the module's at i: against the loss of each."""
    import torch

    model = DeepSeekV3(TINY, init_std=0.2)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))
    p, q, _ = page.both_logits(model, ids)
    target = torch.from_numpy(ids[:, 2:].reshape(-1))
    with torch.no_grad():
        losses = model.loss(torch.from_numpy(ids)).losses
        logits = model(torch.from_numpy(ids))[:, 1:-1].flatten(0, 1)
    np.testing.assert_allclose(p, logits.numpy(), atol=1e-5)
    module = torch.nn.functional.cross_entropy(torch.from_numpy(q), target)
    assert float(module) == pytest.approx(float(losses["mtp_1"]), rel=0.1)


def laws(rng: np.random.Generator, rows: int, V: int = 6) -> np.ndarray:
    return rng.dirichlet(np.ones(V), rows)


def test_what_is_written_is_p_if_the_verdict_knows_q() -> None:
    rng = np.random.default_rng(0)
    p, q = laws(rng, 50), laws(rng, 50)
    out, kept = page.written(p, q, q)
    np.testing.assert_allclose(out, p, atol=1e-12)
    assert kept == pytest.approx(page.overlap(p, q))
    assert page.distance(p, q) == pytest.approx(abs(p - q).sum(-1).mean() / 2)


def test_what_is_written_against_drawing() -> None:
    """With the wrong q in the verdict, too: the library's own `accept` decides."""
    rng, n = np.random.default_rng(1), 200_000
    p, q, drawn = laws(rng, 1), laws(rng, 1), laws(rng, 1)
    draft = rng.choice(6, n, p=drawn[0])
    accepted, token = accept(np.repeat(p, n, 0), np.repeat(q, n, 0), draft, rng)
    out, kept = page.written(p, q, drawn)
    np.testing.assert_allclose(np.bincount(token, minlength=6) / n, out[0], atol=5e-3)
    assert accepted.mean() == pytest.approx(kept, abs=5e-3)
    assert page.distance(out, p) > 0.02, "or the test does not look"


def test_a_step_is_hundreds_of_calls_and_few_products() -> None:
    session = ModuleDecoder(DeepSeekV3(MINI)).session(1, 16, False, 8)
    session.prefill(np.array([[1, 2]]), np.array([2]))
    calls = page.library_calls(lambda: session.step(np.array([[3]])))
    assert calls.products < calls.asked < calls.inside


def test_step_seconds_and_cold_products_measure_something() -> None:
    session = ModuleDecoder(DeepSeekV3(TINY)).session(1, 16, False, 8)
    session.prefill(np.array([[1, 2]]), np.array([2]))
    assert page.step_seconds(session, np.arange(8)[None], 2, 4) > 0
    assert page.cold_products(np.matmul, 1, size=8) > 0
