"""Plausible mistakes of the loop, its rules, prompts and stops: a test must see each.

A row names the mistake, the file, the lines that make it, and the check that fails on
it. The same checks pass on the right code, here as in the other files.
"""

from functools import partial

import pytest

from minidsv3.generation import (
    decoding,
    numpy_decoder,
    prefill,
    prompts,
    rules,
    stopping,
)
from tests import test_decoding as texts
from tests import test_requests as requests
from tests import test_stopping as stops
from tests.planting import plant, plant_methods

# What a user would see: another text, an error, or none.
SEEN = (AssertionError, pytest.fail.Exception, ValueError, IndexError)

greedy = partial(texts.check_greedy, "TINY")
single = partial(texts.check_batch_is_single, "compiled", n=9)
law = partial(texts.check_sampled_law, "compiled", draws=1500)
cold_law = partial(texts.check_sampled_law, "compiled", 0.8, 0.9, draws=1500)
chunks = partial(texts.check_chunks, "compiled")
of_modules = partial(texts.check_chunks, "modules")  # compiled, it would leave memory
of_numpy = partial(texts.check_chunks, "NumPy")
session = partial(texts.check_session, "compiled", 2)
session_of_numpy = partial(texts.check_session, "NumPy", 2)
ids = partial(stops.check_ids, "compiled", 12)
ids_of_numpy = partial(stops.check_ids, "NumPy", 12)
counts = partial(texts.check_counts, "compiled")
full = partial(requests.check_full_context, "NumPy")


def refused(**given) -> partial:
    return partial(requests.check_refused, given, ".")


SPOKEN = 'without speculation",\n            '
WARN = '        warnings.warn(\n            "the model has no'

LOOP = {
    "the token after a draft from the law before it": (
        decoding, [("self.rule.draw(after, self.uniforms)",
                    "self.rule.draw(p, self.uniforms)")], greedy),
    "the token after a draft from the law before it, sampled": (
        decoding, [("self.rule.draw(after, self.uniforms)",
                    "self.rule.draw(p, self.uniforms)")], law),
    "every draft is kept": (
        decoding, [("kept, token = self.rule.judge(p, q, draft, self.uniforms)",
                    "kept, token = draft >= 0, draft")], greedy),
    "judged by the draft's law": (
        decoding, [("self.rule.judge(p, q,", "self.rule.judge(q, q,")], law),
    "a draft is judged by the number that drew it": (
        decoding, [("self.rule.judge(p, q, draft, self.uniforms)",
                    "self.rule.judge(p, q, draft, first)")], law),
    "two tokens where one was missing": (
        decoding, [("kept = kept & ~single", "pass")], single),
    "a single last token by other random numbers": (
        decoding, [("self.rule.draw(p, first)", "self.rule.draw(p, self.uniforms)")],
        single),
    "a dropped draft stays in the caches": (
        decoding, [("session.keep(counts)", "session.keep(0 * counts + new.shape[1])")],
        of_modules),
    "speculation that nobody asked for": (
        decoding, [("drafts = self.speculative and", "drafts =")], counts),
    "the token behind a stop": (
        decoding, [("                    self.left[at] = 0\n                    break",
                    "                    self.left[at] = 0")],
        stops.check_dropped_second),
    "the caches of the texts in front go on": (
        decoding, [("session.select(going)", "session.select(np.arange(len(going)))")],
        ids),
    "the random numbers of the texts in front go on": (
        decoding, [("self.uniforms.select(going)",
                    "self.uniforms.select(np.arange(len(going)))")], ids),
    "the new tokens of the texts in front go on": (
        decoding, [("new, counts = new[going], counts[going]",
                    "new, counts = new[: len(going)], counts[: len(going)]")], ids),
    "tokens are given to the texts in front": (
        decoding, [("self.alive[going], self",
                    "self.alive[: len(going)], self")], ids),
    "stops of the texts in front": (
        decoding, [("if self.endings[b].after", "if self.endings[at].after")],
        stops.check_strings),
    "passes of a whole batch": (
        decoding, [("len(self.alive)", "len(self.endings)")], counts),
    "sampling values are checked at the first step": (
        decoding, [("    check_sampling(temperature, top_p)\n", "")],
        refused(temperature=-0.1)),
    "everything is checked at the first step": (
        decoding, [("return loop.run()", "yield from loop.run()")],
        refused(max_new_tokens=0)),
    "a warning of our own line": (
        decoding, [(SPOKEN + "stacklevel=3", SPOKEN + "stacklevel=2")],
        requests.check_warning),
    "no warning": (
        decoding, [(WARN, WARN.replace("warnings.warn(", "dict(text="))],
        requests.check_warning),
}  # fmt: skip

RULES = {
    "one stream of random numbers for all": (
        rules, [("[_spawned(seed, b) for", "[_spawned(seed, 0) for")],
        texts.check_seeds),
    "the streams of other texts": (
        rules, [("[self._streams[b] for b in texts]",
                 "self._streams[: len(texts)]")], ids),
    "the seeds are forgotten": (
        rules, [("np.random.default_rng(root)", "np.random.default_rng()")],
        texts.check_seeds),
    "of equals the last": (
        rules, [("        return law.argmax(axis=-1)",
                 "        return law.shape[-1] - 1 - law[..., ::-1].argmax(axis=-1)")],
        partial(texts.check_equals, "compiled")),
    "a dropped draft is what is written": (
        rules, [("return token == draft, token", "return token == draft, draft")],
        greedy),
    "model and draft exchanged": (
        rules, [("staticmethod(accept)",
                 "staticmethod(lambda p, q, d, u: accept(q, p, d, u))")], law),
    "no top-p": (
        rules, [("(logits, *self._sampling)", "(logits, self._sampling[0])")],
        cold_law),
    "no temperature": (
        rules, [("(logits, *self._sampling)", "(logits, 1.0, self._sampling[1])")],
        cold_law),
}  # fmt: skip

PROMPTS = {
    "filled up in front": (
        prompts, [("text + text[-1:] * (longest - len(text))",
                   "text[-1:] * (longest - len(text)) + text")], single),
    "the last position is not used": (
        prompts, [("longest + new - 1 > most", "longest + new > most")], full),
    "one position too many": (
        prompts, [("longest + new - 1 > most", "longest + new - 2 > most")],
        refused(max_new_tokens=requests.LONGEST - 1)),
    "an id too many": (
        prompts, [("text >= config.vocab_size", "text > config.vocab_size")],
        refused(ids=[[257]])),
    "ids from behind": (
        prompts, [("(text < 0) | ", "")], refused(ids=[[-1]])),
    "of the shortest prompt": (
        prompts, [("longest, most = max(", "longest, most = min(")], single),
    "truth values as ids": (
        prompts, [("np.issubdtype(text.dtype, np.integer)",
                   "text.dtype.kind in 'iub'")], refused(ids=[[True]])),
}  # fmt: skip

STOPS = {
    "the stop that begins first": (
        stopping, [("text[: min(found)[1]]", "text[: min(at for _, at in found)]")],
        stops.check_pieces),
    "held back as little as possible": (
        stopping, [("range(longest, 0, -1)", "range(1, longest + 1)")],
        stops.check_pieces),
    "everything is held back that could be": (
        stopping, [("max((_overlap(text, s) for s in self._strings), default=0)",
                    "min(len(text), max(map(len, self._strings), default=1) - 1)")],
        stops.check_pieces),
    "nothing is held back": (
        stopping, [("keep = max((_overlap(text, s) for s in self._strings), default=0)",
                    "keep = 0")], stops.check_strings),
    "what was held is not shown in the end": (
        stopping, [("return held\n", "return b''\n")], stops.check_pieces),
    "the stop itself is shown": (
        stopping, [("text[: min(found)[1]]", "text[: min(found)[0]]")],
        stops.check_pieces),
    "all texts watched as one": (
        stopping, [("[Ending(ids, strings, tokenizer) for _ in range(B)]",
                    "[Ending(ids, strings, tokenizer)] * B")], stops.check_strings),
    "ids only without strings": (
        stopping, [("if self._strings.stopped:\n                return True",
                    "return self._strings.stopped")],
        stops.test_several_stops),
    "an empty string": (
        stopping, [('if b"" in self._strings:', "if False:")],
        partial(stops.test_bad_stops, [""], ".")),
    "letters of a bare string": (
        stopping, [("if not isinstance(stop, list | tuple | set):", "if False:")],
        partial(stops.test_bad_stops, "abc", ".")),
}  # fmt: skip

READING = {
    "the state behind the longest prompt": (
        prefill, [("h[b, length - 1 - start]", "h[b, -1]")], chunks),
    "the module reads each state with its own token": (
        prefill, [("after = ids[:, start + 1 : start + 1 + part.shape[1]]",
                   "after = ids[:, start : start + part.shape[1]]")], session),
    "the module reads the first chunk alone": (
        prefill, [("is not None and after.size", "is not None and not start")],
        session),
    "no pair over the border of two chunks": (
        prefill, [("after = ids[:, start + 1 : start + 1 + part.shape[1]]",
                   "after = part[:, 1:]")], session),
    "the lengths of the texts in front": (
        prefill, [("self.lengths[texts], self",
                   "self.lengths[: len(texts)], self")], ids),
    "the states of the texts in front": (
        prefill, [("self.h[texts]", "self.h[: len(texts)]")],
        partial(stops.check_ids, "modules", 12)),
    "NumPy: a dropped draft is not cropped": (
        numpy_decoder, [("cache.crop(self.length)", "pass")], of_numpy),
    "NumPy: the first state of the prompt": (
        numpy_decoder, [("self.h[:, -1:], ids", "self.h[:, :1], ids")],
        session_of_numpy),
    "NumPy: the state of a dropped draft": (
        numpy_decoder, [("h = self.h[:, : ids.shape[1]]",
                         "h = self.h[:, -ids.shape[1] :]")], of_numpy),
    "NumPy: pairs of the same place": (
        numpy_decoder, [("ids[:, start + 1 : start + 1 + self.chunk]",
                         "ids[:, start : start + self.chunk]")], of_numpy),
    "NumPy: a draft behind the context is read": (
        numpy_decoder, [("ids[:, : self.capacity - self.length]", "ids")], full),
    "NumPy: the caches of the texts in front": (
        numpy_decoder, [("[self.texts[b] for b in texts]",
                         "self.texts[: len(texts)]")], ids_of_numpy),
}  # fmt: skip

ALL = {
    f"{room}: {name}": row
    for room, rows in {
        "loop": LOOP, "rules": RULES, "prompts": PROMPTS, "stops": STOPS,
        "reading": READING,
    }.items()
    for name, row in rows.items()
}  # fmt: skip


@pytest.mark.parametrize("mistake", ALL)
def test_mistakes_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = ALL[mistake]
    plant_methods(monkeypatch, module, *lines)
    plant(monkeypatch, module, *lines)
    with pytest.raises(SEEN):
        check()


def named(check) -> str:
    inner = getattr(check, "func", check)
    return f"{inner.__name__} {getattr(check, 'args', '')}"


CHECKS = {id(check): check for *_, check in ALL.values()}.values()


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_the_checks_pass_on_the_right_code(check) -> None:
    """They are given less to do here than elsewhere."""
    check()
