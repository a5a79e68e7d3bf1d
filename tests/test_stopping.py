"""Stops: where a text ends, what is shown of it, and what its neighbours notice."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minidsv3.config import TINY
from minidsv3.corpus import BOUNDARY
from minidsv3.generation import NOTHING, decoder_for, generate, stream
from minidsv3.generation.stopping import StopStrings, endings
from tests.test_decoding import (
    PLAIN,
    decoders,
    drafting,
    each_decoder,
    last,
    prompts,
    shipped,
)

MINI_PROMPT = list(b"def main():\n    ")


# --- strings, piece by piece ----------------------------------------------------------


def shown(strings: list[bytes], pieces: list[bytes]) -> tuple[list[bytes], bytes]:
    watch = StopStrings(strings)
    return [watch.feed(piece) for piece in pieces], watch.rest()


def cut(text: bytes, strings: list[bytes]) -> bytes | None:
    """Up to the stop that is complete first, of two the longer; None without one."""
    for end in range(len(text) + 1):
        for s in sorted(strings, key=len, reverse=True):
            if text[:end].endswith(s):
                return text[: end - len(s)]
    return None


letters = st.text("ab", max_size=4).map(str.encode)
some_strings = st.lists(letters.filter(len), max_size=3)


@example(strings=[b"aab"], pieces=[b"aa", b"b"])
@example(strings=[b"aab"], pieces=[b"ab", b"aa"])
@example(strings=[b"aba", b"b"], pieces=[b"aba"])
@given(strings=some_strings, pieces=st.lists(letters, max_size=12))
def check_pieces(strings: list[bytes], pieces: list[bytes]) -> None:
    """Against a look at the whole text: what is shown, and when."""
    answers, rest = shown(strings, pieces)
    for i in range(len(pieces)):
        text, so_far = b"".join(pieces[: i + 1]), b"".join(answers[: i + 1])
        if (up_to := cut(text, strings)) is not None:
            assert so_far == up_to
            continue
        assert text.startswith(so_far)
        held = text[len(so_far) :]  # may become a stop, and nothing longer may
        begun = [s[:n] for s in strings for n in range(len(s))]
        assert held == max((x for x in begun if text.endswith(x)), key=len, default=b"")
    whole = b"".join(pieces)
    up_to = cut(whole, strings)
    assert b"".join(answers) + rest == (whole if up_to is None else up_to)


def test_what_is_shown_of_a_text() -> None:
    check_pieces()


def test_a_string_in_pieces() -> None:
    assert shown([b"\n\n"], [b"a", b"\n", b"b", b"\n", b"\n", b"c"]) == (
        [b"a", b"", b"\nb", b"", b"", b""], b""
    )  # fmt: skip
    assert shown(["é"], ["é".encode()[:1]]) == ([b""], "é".encode()[:1])


def test_the_first_to_be_complete_ends_the_text_however_it_is_cut() -> None:
    for pieces in ([b"xabc"], [b"xab", b"c"], [b"x", b"a", b"b", b"c"]):
        answers, rest = shown([b"abc", b"b"], pieces)
        assert (b"".join(answers), rest) == (b"xa", b"")
    assert shown([b"b", b"ab"], [b"xab"]) == ([b"x"], b"")


# --- through the loop -----------------------------------------------------------------


def texts_of(steps) -> tuple[list[list[int]], list[list[int]]]:
    """Each text, and how many tokens came at a time."""
    steps = list(steps)
    B = len(steps[0].tokens)
    return (
        [sum((step.tokens[b] for step in steps), []) for b in range(B)],
        [[len(step.tokens[b]) for step in steps] for b in range(B)],
    )


def ended(text: list[int], stops: set[int]) -> list[int]:
    """Up to the first of the ids, and that one."""
    at = [i for i, token in enumerate(text) if token in stops]
    return text[: at[0] + 1] if at else text


def check_ids(kind: str, n: int = 20) -> None:
    """Many a token of the batch as a stop: it ends there, the others do not notice."""
    decoder, given = decoders(drafting(), TINY)[kind], prompts(4)
    for sampling in ({}, {"temperature": 1.0, "seed": 4}):
        whole = generate(decoder, given, n, **sampling).tolist()
        for stop in {token for text in whole for token in text[::4]}:
            new = generate(decoder, given, n, **sampling, stop=[stop])
            wanted = [ended(text, {stop}) for text in whole]
            longest = max(map(len, wanted))
            assert new.shape == (4, longest)
            for text, want in zip(new.tolist(), wanted, strict=True):
                assert text == want + [NOTHING] * (longest - len(want))


@each_decoder
def test_a_text_ends_at_an_id_and_the_others_go_on(kind: str) -> None:
    check_ids(kind)


def check_dropped_second() -> None:
    """A stop in the first token of a pair: the second is not given, nor counted."""
    decoder, given, n = decoder_for((drafting(), TINY)), prompts(6), 20
    found = 0
    for prompt in given:
        [text], [sizes] = texts_of(stream(decoder, [prompt], n))
        for i, size in enumerate(sizes):
            done = sum(sizes[:i])
            if size < 2 or text[done] in text[:done] + text[done + 1 : done + 2]:
                continue
            found += 1
            stop = text[done]
            [new], [ours] = texts_of(stream(decoder, [prompt], n, stop=[stop]))
            assert new == text[: done + 1] and ours == [*sizes[:i], 1]
            counts = last(stream(decoder, [prompt], n, stop=[stop]))
            assert counts.trunk_passes == i + 1 and counts.tokens == done + 1
            assert counts.accepted == 1 + sizes[:i].count(2)
    assert found > 3


def test_a_stop_in_the_first_token_of_a_pair() -> None:
    check_dropped_second()


def test_several_stops() -> None:
    decoder, given = decoder_for((drafting(), TINY)), prompts(3)
    whole = generate(decoder, given, 20).tolist()
    stops = {whole[0][9], whole[0][4], whole[1][7]}
    new = generate(decoder, given, 20, stop=[*stops]).tolist()
    for text, full in zip(new, whole, strict=True):
        assert [i for i in text if i != NOTHING] == ended(full, stops)
    mixed = generate(decoder, given[:1], 20, stop=["\0never", whole[0][4]])
    assert mixed[0].tolist() == ended(whole[0], {whole[0][4]})
    ids = [np.int64(whole[0][4])]  # as they come out of an array
    assert generate(decoder, given[:1], 20, stop=ids)[0].tolist() == mixed[0].tolist()


def check_strings() -> None:
    """Strings over several tokens, in texts of the shipped model."""
    decoder, other = decoder_for(shipped()), list(b"class A")
    whole = generate(decoder, [MINI_PROMPT, other], 40)
    first = bytes(i for i in whole[0].tolist() if i < BOUNDARY)
    for stop in (first[10:13], first[20:21], first[5:12]):
        end = first.index(stop) + len(stop)
        for speculative in (True, False):
            new = generate(
                decoder, [MINI_PROMPT, other], 40, speculative=speculative,
                stop=[stop.decode(), "\0never"],
            )  # fmt: skip
            assert bytes(new[0, :end].tolist()) == first[:end]
            assert (new[0, end:] == NOTHING).all()
            alone = generate(decoder, [other], 40, stop=[stop])  # bytes are taken too
            kept = new[1][new[1] != NOTHING]
            np.testing.assert_array_equal(kept, alone[0])


def test_a_text_ends_with_a_string() -> None:
    check_strings()


class Words:
    """Each id is a word, and some have two letters."""

    size, start = 23, None

    def decode(self, ids) -> bytes:
        return b"".join(b"%c%c" % (97 + i // 5, 65 + i % 5) for i in ids)


def test_another_tokenizer() -> None:
    params = drafting(PLAIN)
    whole = generate((params, PLAIN), [[1, 2, 3]], 12)[0].tolist()
    text = Words().decode(whole)
    stop = text[7:10].decode()  # begins in the middle of a token
    new = generate((params, PLAIN), [[1, 2, 3]], 12, stop=[stop], tokenizer=Words())
    end = -(-(text.index(stop.encode()) + 3) // 2)
    assert new[0].tolist() == whole[:end]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("abc", r"stop is 'abc': give a list, \['abc'\]"),
        (b"abc", r"stop is b'abc': give a list"),
        (10, r"stop is 10: give a list, \[10\]"),
        ([""], "a stop string is empty"),
        (["a", b""], "a stop string is empty"),
    ],
)
def test_bad_stops(stop, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream((drafting(), TINY), [[1, 2]], 3, stop=stop)


def test_strings_need_a_tokenizer_ids_do_not() -> None:
    model = (drafting(PLAIN), PLAIN)
    with pytest.raises(ValueError, match="the model's 23 ids are no bytes"):
        stream(model, [[1, 2]], 3, stop=["a"])
    wide = dataclasses.replace(TINY, vocab_size=300)
    with pytest.raises(ValueError, match="give its tokenizer"):
        endings(["a"], None, wide, 1)
    assert generate(model, [[1, 2]], 3, stop=[22]).size
