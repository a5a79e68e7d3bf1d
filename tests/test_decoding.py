"""The loop that writes text, through every decoder: is it the text of the model?

Judges are the model without caches, a loop without caches, and transformers. What a
caller may ask and what is refused is in `test_requests`, stops in `test_stopping`.
"""

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from minidsv3 import checkpoints, corpus
from minidsv3.config import TINY, Config
from minidsv3.generation import decoder_for, generate, stream
from minidsv3.generation.compiled import CompiledDecoder
from minidsv3.generation.decoding import Decoder
from minidsv3.generation.numpy_decoder import NumpyDecoder
from minidsv3.generation.numpy_ref import Speculation
from minidsv3.generation.torch_port import ModuleDecoder
from minidsv3.model import numpy_ref as model
from minidsv3.shipped import MINI_FOLDER
from tests.oracles import relative_error
from tests.test_moe_model import fresh
from tests.test_speculation import CONFIG as PLAIN
from tests.test_speculation import deviation, draft_logits, naive
from tests.test_whole_model import MODELS, as_float32, from_file
from tests.torch_ports import port

Params = dict[str, np.ndarray]
Prompts = Sequence[Sequence[int]]
ROUNDING = 1e-5  # of the largest logit, float32: two orders of the same sums


# --- models and prompts -------------------------------------------------------------


@cache
def drafting(config: Config = TINY, seed: int = 0, depth: float = 0.1) -> Params:
    """Random, but for a module that often guesses what the trunk will say.

    Both see the last token above all: layers add little to the stream (depth), and the
    module passes the embedding on.
    """
    params = fresh(config, seed)
    for name, array in params.items():
        if name.endswith("o_proj.weight"):
            array *= depth
        if name.endswith("down_proj.weight"):
            array *= depth / 4
    module = f"model.layers.{config.num_hidden_layers}."
    D = config.hidden_size
    params["model.embed_tokens.weight"] /= 0.4  # as wide as the module's norm of it
    params[module + "enorm.weight"][:] = 1
    params[module + "eh_proj.weight"] *= depth / 2
    params[module + "eh_proj.weight"][:, :D] += np.eye(D)
    params[module + "shared_head.norm.weight"][:] = params["model.norm.weight"]
    return params


def decoders(params: Params, config: Config) -> dict[str, Decoder]:
    """Everything that can decode this model."""
    found = {
        "NumPy": NumpyDecoder(params, config),
        "modules": ModuleDecoder(port(params, config)),
    }
    if config.uses_mla:
        found["compiled"] = CompiledDecoder(params, config)
        found["compiled, of modules"] = decoder_for(port(params, config))
        assert isinstance(found["compiled, of modules"], CompiledDecoder)
    return found


KINDS = ["NumPy", "modules", "compiled", "compiled, of modules"]
each_decoder = pytest.mark.parametrize("kind", KINDS)


def prompts(B: int, config: Config = TINY, longest: int = 9, seed: int = 0) -> Prompts:
    """Of 1 to longest tokens, each of another length than its neighbours."""
    rng = np.random.default_rng(seed)
    lengths = [1 + (5 * b + seed) % longest for b in range(B)]
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


# --- judges -------------------------------------------------------------------------


def ties(
    params: Params, config: Config, given: Prompts, texts: Sequence, others: Sequence
) -> int:
    """How many texts differ. Each must do so first where two logits are equal but for
    rounding, by the model without caches in float64."""
    count = 0
    for prompt, text, other in zip(given, texts, others, strict=True):
        apart = np.flatnonzero(np.asarray(text) != np.asarray(other))
        if not apart.size:
            continue
        count, at = count + 1, apart[0]
        exact = {name: array.astype(np.float64) for name, array in params.items()}
        before = [*prompt, *np.asarray(text)[:at].tolist()]
        logits = model.forward(exact, config, np.array([before]))[0][0, -1]
        gap = logits.max() - logits[[text[at], other[at]]].min()
        assert gap <= ROUNDING * np.abs(logits).max(), f"{before}: {gap} apart"
    return count


def uncached(params: Params, config: Config, given: Prompts, n: int) -> list[list[int]]:
    """Greedy texts, each token from the whole text before it."""
    texts = []
    for prompt in given:
        text = list(prompt)
        for _ in range(n):
            logits = model.forward(params, config, np.array([text]))[0]
            text.append(int(logits[0, -1].argmax()))
        texts.append(text[len(prompt) :])
    return texts


def last(steps) -> Speculation:
    *_, step = steps
    return step.statistics


# --- greedy -------------------------------------------------------------------------


@cache
def shipped() -> tuple[Params, Config]:
    config, params = checkpoints.load(MINI_FOLDER)
    return dict(params), config


def held_out(how_many: int) -> Prompts:
    """Pieces of 5 to 44 bytes from the held-out text, evenly spread."""
    text = corpus.load_corpus().held_out.astype(int)
    starts = np.linspace(0, len(text) - 64, how_many).astype(int)
    return [text[at : at + 5 + i % 40].tolist() for i, at in enumerate(starts)]


def test_the_shipped_model_writes_the_same_with_and_without_speculation() -> None:
    """208 prompts, one by one and in batches of different lengths."""
    decoder, n = decoder_for(shipped()), 12
    given = held_out(208)
    batches = [given[i : i + 16] for i in range(0, len(given), 16)]
    plain = [t for b in batches for t in generate(decoder, b, n, speculative=False)]
    batched, counts = [], []
    for batch in batches:
        batched += list(generate(decoder, batch, n))
        counts.append(last(stream(decoder, batch, n)))
    single = [generate(decoder, [prompt], n)[0] for prompt in given]
    assert ties(*shipped(), given, plain, batched) <= 1
    assert ties(*shipped(), given, plain, single) <= 1
    drafts, kept = (sum(getattr(c, k) for c in counts) for k in ("drafts", "accepted"))
    assert 0.6 < kept / drafts < 0.95


FEW = ["TINY", "YaRN, no latent of the queries", "odd sizes", "no layer dense"]


@pytest.mark.parametrize("name", [*FEW, "plain attention"])
def test_greedy_is_argmax_of_the_uncached_model(name: str) -> None:
    check_greedy(name)


def check_greedy(name: str) -> None:
    """Plain and speculative, in batches; drafts are kept, and drafts are dropped."""
    config = MODELS.get(name, PLAIN)
    drafts = accepted = 0
    for seed, depth in ((0, 0.1), (1, 0.1), (2, 1.0)):
        params, given = drafting(config, seed, depth), prompts(7, config, seed=seed)
        texts, decoder = (
            uncached(params, config, given, 14),
            decoder_for((params, config)),
        )
        for speculative in (True, False):
            new = generate(decoder, given, 14, speculative=speculative)
            np.testing.assert_array_equal(new, texts)
        counts = last(stream(decoder, given, 14))
        drafts, accepted = drafts + counts.drafts, accepted + counts.accepted
    assert drafts > 150 and 0.1 < accepted / drafts < 0.9


def check_equals(kind: str) -> None:
    """Of equal logits the first wins, and so does the draft that says so."""
    params = drafting() | {"lm_head.weight": np.zeros((257, 32))}
    decoder = decoders(params, TINY)[kind]
    assert (generate(decoder, [[1, 2], [3]], 9) == 0).all()
    counts = last(stream(decoder, [[1, 2], [3]], 9))
    assert counts.accepted == counts.drafts == 8


@each_decoder
def test_of_equal_logits_the_first_wins(kind: str) -> None:
    check_equals(kind)


@pytest.mark.parametrize("name", ["TINY", "YaRN", "V3's routing"])
def test_transformers_generates_the_same(name: str, tmp_path) -> None:
    params, config = as_float32(drafting(MODELS[name])), MODELS[name]
    port(params, config).save_pretrained(tmp_path)
    peer = from_file(tmp_path)
    given, n = prompts(6, config), 16
    theirs = []
    for prompt in given:
        whole = peer.generate(
            (asked := torch.tensor([prompt])),
            attention_mask=torch.ones_like(asked),  # or it would leave out id 0
            max_new_tokens=n,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        theirs.append(whole[0, len(prompt) :].numpy())
    assert {len(text) for text in theirs} == {n}
    for decoder in decoders(params, config).values():
        assert ties(params, config, given, generate(decoder, given, n), theirs) == 0


# --- decoders, batches, seeds -------------------------------------------------------

GREEDY = {"temperature": 0.0}
WARM = {"temperature": 0.9, "top_p": 0.8}


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["MLA", "plain attention"])
@pytest.mark.parametrize("speculative", [True, False])
def test_every_decoder_writes_the_same_texts(config: Config, speculative: bool) -> None:
    given, seeds = prompts(5, config), [3, 1, 4, 1, 5]
    for sampling in (GREEDY, WARM):
        asked = {**sampling, "speculative": speculative, "seed": seeds}
        found = {
            name: generate(decoder, given, 18, **asked)
            for name, decoder in decoders(drafting(config), config).items()
        }
        first = found.pop("NumPy")
        for new in found.values():
            np.testing.assert_array_equal(new, first)


def check_batch_is_single(kind: str, B: int = 5, n: int = 18) -> None:
    """Text b of a batch is the text of its own call, whoever its neighbours are."""
    decoder = decoders(drafting(), TINY)[kind]
    given, seeds = prompts(B), list(range(30, 30 + B))
    for sampling in (GREEDY, WARM):
        for speculative in (True, False):
            asked = {**sampling, "speculative": speculative}
            batch = generate(decoder, given, n, **asked, seed=seeds)
            for b, prompt in enumerate(given):
                single = generate(decoder, [prompt], n, **asked, seed=seeds[b])
                np.testing.assert_array_equal(batch[b], single[0])


@each_decoder
def test_a_batch_gives_the_texts_of_single_calls(kind: str) -> None:
    check_batch_is_single(kind)


def check_seeds() -> None:
    decoder, given = decoders(drafting(), TINY)["compiled"], prompts(3)
    asked = {**WARM, "max_new_tokens": 15}
    batch = generate(decoder, given, seed=5, **asked)
    np.testing.assert_array_equal(batch, generate(decoder, given, seed=5, **asked))
    assert (batch != generate(decoder, given, seed=6, **asked)).any()
    single = generate(decoder, given[:1], seed=5, **asked)
    np.testing.assert_array_equal(single, batch[:1])
    for b in range(3):  # each has a stream of its own
        own = np.random.SeedSequence(5, spawn_key=(b,)) if b else 5
        alone = generate(decoder, [given[b]], seed=[own], **asked)
        np.testing.assert_array_equal(alone[0], batch[b])
    same = generate(decoder, given[:1] * 3, seed=5, **asked)
    assert len({tuple(text) for text in same.tolist()}) == 3
    unseeded = [generate(decoder, given, **asked) for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


def test_seeds() -> None:
    check_seeds()


# --- the law ------------------------------------------------------------------------

FOUR = dataclasses.replace(
    TINY, vocab_size=4, hidden_size=8, intermediate_size=8, moe_intermediate_size=8
)
TEXTS = [[1], [2, 2], [0, 0, 0, 0]]  # drafts are kept differently often


def joint_law(prompt: list[int], n: int, temperature: float, top_p: float):
    """Of the next n tokens, by the chain rule, each law written out, without caches."""
    V, params = FOUR.vocab_size, drafting(FOUR, 3, 0.2)
    joint, contexts = np.ones(()), np.array([prompt])
    for _ in range(n):
        logits = model.forward(params, FOUR, contexts)[0][:, -1]
        w = np.exp(logits / temperature)
        w /= w.sum(-1, keepdims=True)
        for row in w:
            total = 0.0
            for i in sorted(range(V), key=lambda i: -row[i]):
                row[i], total = row[i] * (total < top_p), total + row[i]
        w /= w.sum(-1, keepdims=True)
        joint = joint[..., None] * w.reshape(*joint.shape, V)
        contexts = np.repeat(contexts, V, axis=0)
        following = np.tile(np.arange(V), len(contexts) // V)
        contexts = np.append(contexts, following[:, None], axis=1)
    return joint


def check_sampled_law(
    kind: str, temperature: float = 1.0, top_p: float = 1.0, draws: int = 6000
) -> None:
    """χ² of four tokens in a batch of three prompts: one plain, then draft, verdict and
    bonus; where that was dropped another round, where it was kept a single token."""
    decoder = decoders(drafting(FOUR, 3, 0.2), FOUR)[kind]
    kept = np.zeros(3)
    steps = list(stream(decoder, TEXTS * draws, 4, temperature, top_p, seed=11))
    texts: list[list[int]] = [[] for _ in range(3 * draws)]
    for step in steps:
        for b, new in enumerate(step.tokens):
            texts[b] += new
            kept[b % 3] += len(new) == 2 and len(texts[b]) == 3
    for i, prompt in enumerate(TEXTS):
        assert 0.2 < kept[i] / draws < 0.9
        counts = np.zeros((4, 4, 4, 4))
        np.add.at(counts, tuple(np.array(texts[i::3]).T), 1)
        for some in (counts, counts.sum(3)):
            law = joint_law(prompt, some.ndim, temperature, top_p)
            assert abs(deviation(some, law)) < 4
    assert np.ptp(kept / draws) > 0.2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_sampled_tokens_follow_the_joint_law(temperature: float, top_p: float) -> None:
    check_sampled_law("compiled", temperature, top_p)


def test_sampled_tokens_of_the_modules_follow_the_joint_law() -> None:
    check_sampled_law("modules", 0.8, 0.9, draws=3000)


# --- prompts in chunks, the caches --------------------------------------------------


def check_chunks(kind: str, n: int = 9) -> None:
    """Logits, drafts and counts are those of a loop without caches, for every chunk."""
    params, given = (
        drafting(),
        [*prompts(3, longest=6, seed=2), [7], [9, 8, 7, 6, 5, 4, 3]],
    )
    decoder = decoders(params, TINY)[kind]
    loops = [naive(params, np.array([prompt]), n, TINY) for prompt in given]
    texts = [text[-n:] for text, *_ in loops]
    passes, drafts, kept = (sum(loop[i] for loop in loops) for i in (1, 2, 3))
    counts = Speculation(passes, n * len(given), drafts, kept)
    assert 0 < kept < drafts
    for chunk in range(1, 9):
        steps = list(stream(decoder, given, n, chunk=chunk))
        assert steps[-1].statistics == counts, f"chunk {chunk}"
        new = [sum((step.tokens[b] for step in steps), []) for b in range(len(given))]
        assert new == texts, f"chunk {chunk}"


@each_decoder
def test_prompts_in_chunks(kind: str) -> None:
    check_chunks(kind)


def check_session(kind: str, chunk: int) -> None:
    """The logits of each part of a round, to rounding: the module's tell whether its
    own cache is right, which the texts cannot."""
    params, given = drafting(), prompts(4, longest=6)
    lengths = np.array([len(prompt) for prompt in given])
    ids = np.array([prompt + [0] * (6 - len(prompt)) for prompt in given])
    session = decoders(params, TINY)[kind].session(4, 20, True, chunk)
    first = session.prefill(ids, lengths)
    new = np.array([[11], [12], [13], [14]])
    drafted = session.draft(new, np.ones(4, int))
    pair, counts = np.append(new, new + 30, axis=1), np.array([1, 2, 2, 1])
    after = session.step(pair)
    session.keep(counts)
    settled = np.where(counts[:, None] == 2, new + [30, 60], new + [90, 0])
    again = session.draft(settled, counts)
    for b, prompt in enumerate(given):
        text, n = [*prompt, *pair[b].tolist()], len(prompt)
        logits, saved = model.forward(params, TINY, np.array([text]))
        h = model.hidden_states(saved)
        known = [*text[: n + 1], *settled[b, : counts[b]].tolist()]
        for ours, theirs in (
            (first[b], logits[0, n - 1]),
            (drafted[b], draft_logits(params, TINY, h[:, :n], text[: n + 1])),
            (after[b], logits[0, n:]),
            (again[b], draft_logits(params, TINY, h[:, : n + counts[b]], known)),
        ):
            assert relative_error(ours, theirs) <= 1e-12


@each_decoder
@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7])
def test_the_logits_of_a_session_are_the_models(kind: str, chunk: int) -> None:
    check_session(kind, chunk)


# --- what is counted ----------------------------------------------------------------


def check_counts(kind: str) -> None:
    """A pass gives each text that is left one token, and one more for a kept draft."""
    decoder, given = decoders(drafting(), TINY)[kind], prompts(4)
    for sampling in (GREEDY, WARM | {"seed": 2}):
        done, passes = np.zeros(4, int), 0
        for step in stream(decoder, given, 20, **sampling):
            counts, new = step.statistics, np.array(list(map(len, step.tokens)))
            assert ((new > 0) == (done < 20)).all() and new.max() <= 2
            passes, done = passes + (done < 20).sum(), done + new
            assert counts.tokens == done.sum() == counts.trunk_passes + counts.accepted
            assert counts.trunk_passes == passes
        assert (done == 20).all() and 0 < counts.accepted < counts.drafts
        assert counts.acceptance == counts.accepted / counts.drafts
        assert counts.tokens_per_pass == 80 / counts.trunk_passes > 1
    plain = last(stream(decoder, given, 20, speculative=False))
    assert plain == Speculation(80, 80) and np.isnan(plain.acceptance)


@each_decoder
def test_counts_add_up(kind: str) -> None:
    check_counts(kind)


@each_decoder
def test_a_reader_that_stops_early_breaks_nothing(kind: str) -> None:
    decoder, given = decoders(drafting(), TINY)[kind], prompts(3)
    whole = generate(decoder, given, 12)
    steps = stream(decoder, given, 12)
    some = [next(steps), next(steps)]
    np.testing.assert_array_equal(generate(decoder, given, 12), whole)  # in between
    some += [next(steps)]
    steps.close()
    for b, text in enumerate(whole.tolist()):
        seen = sum((step.tokens[b] for step in some), [])
        assert seen == text[: len(seen)] and len(seen) >= 3
    np.testing.assert_array_equal(generate(decoder, given, 12), whole)
