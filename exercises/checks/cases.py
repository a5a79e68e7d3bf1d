"""Cases of chapter 9's draw and stops, too many for the files of their checks."""

import numpy as np
from grader.spec import Case

from checks.draws import normal, rng

# --- the draw -----------------------------------------------------------------------


def drawn(B: int, V: int, temperature: float, top_p: float, seed: int) -> Case:
    """Logits of no particular kind."""
    label = f"{B} rows of {V} tokens, temperature {temperature}, top_p {top_p}"
    return Case(label, (normal(B, V, seed=seed, scale=2.0), temperature, top_p))


def far_apart(*rows: float, V: int, seed: int) -> np.ndarray:
    """Rows of logits around numbers that are far from each other, exact in float32."""
    steps = np.round(normal(len(rows), V, seed=seed, scale=6.0))
    return np.array(rows)[:, None] + steps / 2**12


# Sums of quarters and eighths are exact: here a sum meets top_p, or tokens are equal.
QUARTERS = np.array([[3.0, 3.0, -2000.0, 3.0, 3.0], [-9.0, 0.0, 0.0, -2000.0, -2000.0]])
EQUALS = np.array([[0.0] * 8, [5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0]])
MANY = np.where(np.arange(60) * 7 % 15 < 8, 0.0, -2000.0)[None]
# In floating point the sum of ten tenths is a little less than 1, of six sixths too.
TENTHS = np.array([[0.0] * 10, [-3000.0, 2.0, 2.0, 2.0, -3000.0] * 2])


def law_cases() -> list[Case]:
    """Of gen.1: logits, temperature and top-p."""
    return [
        Case(
            "the third most probable token crosses the line",
            (np.log([[0.1, 0.4, 0.2, 0.3]]), 1.0, 0.8),
        ),
        drawn(B=3, V=6, temperature=2.0, top_p=0.6, seed=1),
        drawn(B=4, V=9, temperature=0.5, top_p=0.9, seed=2),
        drawn(B=2, V=7, temperature=1.3, top_p=1.0, seed=3),
        drawn(B=5, V=4, temperature=0.8, top_p=0.01, seed=4),
        Case(
            "greedy; in two rows several are the largest",
            (np.array([[0.0, 2, -1, 2], [-5, -7, -6, -8], [1, 1, 1, 1]]), 0.0, 0.5),
        ),
        Case(
            "logits around 800, 0 and -800, of a temperature of 0.001",
            (far_apart(800, 0, -800, V=5, seed=5), 0.001, 0.85),
        ),
        Case("sums that meet top_p exactly", (QUARTERS, 1.0, 0.75)),
        Case("all equal, and four alike", (EQUALS, 0.25, 0.6)),
        Case("thirty-two of sixty equal, the others impossible", (MANY, 1.0, 0.52)),
        Case(
            "a sure row, a row that is not, and float32",
            (
                np.array([[9, 1, 0, 1, 2], [0.2, 0, 0.3, 0.1, 0.4]], np.float32),
                0.9,
                0.7,
            ),
        ),
        Case(
            "three tokens a thousand apart",
            (np.array([[-1000.0, 0.0, 1000.0]]), 1.0, 0.95),
        ),
        Case("tenths and sixths, which add up to less than 1", (TENTHS, 1.0, 1.0)),
        Case(
            "two that nearly agree, where the line is crossed",
            (np.log([[0.0155, 0.4, 0.0165, 0.568]]), 1.0, 0.98),
        ),
    ]


# --- stops ----------------------------------------------------------------------------


def told(text: str, *stops: str) -> Case:
    """A text whose pieces are separated by |."""
    return raw(text.encode(), *(stop.encode() for stop in stops))


def raw(joined: bytes, *stops: bytes) -> Case:
    """Bytes, of which some may be half a character; the label can be pasted."""
    ends = [*stops]
    label = f"pieces {joined}.split(b'|'), stops {ends}"
    return Case(label, (joined.split(b"|"), ends))


def babble(letters: str, size: int, stops: tuple[str, ...], seed: int) -> Case:
    """Few letters in pieces of all lengths, so that stops nearly come all the time."""
    return told("".join(rng(seed).choice([*letters, "|"], size)), *stops)


def stop_cases() -> list[Case]:
    """Of gen.4: pieces and stops."""
    return [
        told("ab|c\n|\nd|e", "\n\n"),
        told("so|me |text|\n|more\n", "\n\n"),
        told("x|END|OF", "END"),
        told("x|E|N|D|y|z", "END"),
        told("xE|NE|NDE|ND", "END"),
        told("a|a|a|b|c", "aab"),
        told("ab|abab|abac|x", "ababac"),
        told("one|#two;|three", ";", "#"),
        told("one;two#|three", "#", ";"),
        told("a.b,c;d|e", ",", ".", ";"),
        told("<|/|s>|go on|<", "</s>", "\nQ:"),
        told("if\n| Q|:\n|Q|:A", "</s>", "\nQ:"),
        told("a|b|||cd", "bcx", "cde"),
        told("||", "x"),
        told("no |stop|\n"),
        told("the very end|.\n", ".\n\n"),
        raw(b"caf\xc3|\xa9 cr|\xc3|\xa8me\n|\nand", b"\n\n"),
        raw(b"\xe2\x80|\x9cyes\xe2|\x80\x9d, he said\xe2\x80|\xa6 no", b"\xe2\x80\xa6"),
        told("STOP|it", "STOP"),
        told("it|STOP", "STOP"),
        told("aSTOPbSTOPc|d|STOP", "STOP"),
        Case("no piece at all", ([], [b"x"])),
        babble("ab", 30, ("aabb", "babab"), seed=1),
        babble("abc", 48, ("abcabc", "cbaab", "bbbb"), seed=2),
        babble("ab", 24, ("aaaaaa", "bbbbb"), seed=3),
    ]
