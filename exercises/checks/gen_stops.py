"""Chapter 9, a text that is shown while it is written, up to a stop."""

from collections.abc import Callable

import numpy as np
from grader.compare import WrongForm
from grader.spec import Check, Wrong

from checks.cases import stop_cases


def as_counts(function: Callable, *args: object) -> object:
    """A list of numbers becomes an array. Raises WrongForm for bytes."""
    counts = function(*args)
    if isinstance(counts, list | tuple):
        if any(isinstance(count, bytes | str) for count in counts):
            raise WrongForm(
                "Your function returns the text itself. How many bytes of it may be "
                "seen is asked for, after each piece and at the end."
            )
        counts = np.array(counts)
    return counts


FOUND = "[text.find(stop) for stop in stops if stop in text]"
HELD = "[n for s in stops for n in range(len(s)) if text.endswith(s[:n])]"
STOPPED = "return counts + [min(found)] * (len(pieces) + 1 - len(counts))"
COUNT = "counts.append(len(text) - max(held, default=0))"
END = "return [*counts, len(text)]"

SHOWN = Check(
    "gen.4",
    returns=("counts",),
    call=as_counts,
    cases=stop_cases,
    hints=(
        "Keep the whole text and ask it two questions after each piece. Is a stop in "
        "it? If not: what is the longest end of it that is also a beginning of some "
        "stop? That much is held back.",
        "`text.find(stop)` is where a stop begins, -1 if it is not there; of several "
        "take the least. `text.endswith(stop[:n])` asks whether the text ends in the "
        "stop's first n bytes. A whole stop is no beginning, so n < len(stop).",
        "After each piece: `text += piece`; `found = [text.find(s) for s in stops if s "
        "in text]`. If there is one, every number from here to the end is "
        "`min(found)`. Else `held = [n for s in stops for n in range(len(s)) if "
        "text.endswith(s[:n])]`, and `len(text) - max(held, default=0)` may be seen; "
        "at the end, `len(text)`.",
    ),
    wrong=(
        Wrong(
            "nothing held back",
            COUNT,
            "counts.append(len(text) - 0 * len(held))",
            "Then the first bytes of a stop are on the screen before the last ones "
            "come. Hold back what may be its beginning.",
        ),
        Wrong(
            "as much held back as a stop is long, less one",
            HELD,
            "[min(len(s) - 1, len(text)) for s in stops]",
            "Safe, but too late: hold back only an end of the text that is a beginning "
            "of a stop.",
        ),
        Wrong(
            "the last piece held back whole",
            COUNT,
            "counts.append(len(text) - len(piece) * any(held))",
            "A stop may begin in the middle of a piece, or in an earlier one. Count "
            "bytes, not pieces.",
        ),
        Wrong(
            "always a piece behind",
            COUNT,
            "counts.append(len(text) - len(piece) + 0 * len(held))",
            "A stop may come in three pieces, and mostly none comes. Hold back what "
            "may be a stop's beginning, and nothing else.",
        ),
        Wrong(
            "what was held back is never shown",
            END,
            "return [*counts, *(counts or [0])[-1:]]",
            "When all pieces are there and no stop was, the rest belongs to the text.",
        ),
        Wrong(
            "the stop looked for in each piece alone",
            FOUND,
            "[len(text) - len(piece) + piece.find(s) for s in stops if s in piece]",
            "A stop may be spread over several pieces. Look for it in the text.",
        ),
        Wrong(
            "the stop looked for at the end alone",
            FOUND,
            "[len(text) - len(s) for s in stops if text.endswith(s)]",
            "A piece may bring bytes behind the stop: then the text contains it and "
            "does not end in it.",
        ),
        Wrong(
            "the beginning looked for in the last piece alone",
            "text.endswith(s[:n])",
            "piece.endswith(s[:n])",
            "A stop's beginning may be spread over several pieces as well. Ask the "
            "text how it ends.",
        ),
        Wrong(
            "the stop shown too",
            FOUND,
            "[text.find(stop) + len(stop) for stop in stops if stop in text]",
            "The text ends where the stop begins.",
        ),
        Wrong(
            "the first stop of the list",
            "[min(found)]",
            "found[:1]",
            "Of two stops in the text the one that begins first counts, wherever it "
            "stands in the list.",
        ),
        Wrong(
            "the last of several stops",
            "[min(found)]",
            "[max(found)]",
            "The text ends at the first stop. What comes behind it does not count, "
            "another stop neither.",
        ),
        Wrong(
            "a stop's last occurrence",
            "text.find(stop)",
            "text.rfind(stop)",
            "One piece may hold a stop twice. The text ends at the first.",
        ),
        Wrong(
            "the shortest beginning held back",
            "max(held, default=0)",
            "min(filter(None, held), default=0)",
            "The text may end in a short beginning of a stop and in a longer one. Only "
            "the longest is safe.",
        ),
        Wrong(
            "the beginnings of the first stop alone",
            "for s in stops for n",
            "for s in stops[:1] for n",
            "Any of the stops may have begun.",
        ),
        Wrong(
            "everything held back from a stop's first byte on",
            COUNT,
            "ends = [text.find(s[:1]) for s in stops if s[:1] in text]\n"
            "        counts.append(min(ends, default=len(text)) + 0 * len(held))",
            "Most of what begins like a stop goes on in another way. Once it cannot "
            "become one any more it is shown.",
        ),
        Wrong(
            "begun anew after a mismatch",
            HELD,
            "[machine(s)[0] for s in stops]",
            "After `aa` of the stop `aab` another `a` still leaves `aa`. A byte that "
            "does not fit ends the longest beginning; a shorter one may go on.",
            (
                (
                    'text, counts = b"", []',
                    'text, counts = b"", []\n\n'
                    "    def machine(stop):\n"
                    "        n = 0\n"
                    "        for at, byte in enumerate(text, start=1):\n"
                    "            fits = byte == stop[n]\n"
                    "            n = n + 1 if fits else int(byte == stop[0])\n"
                    "            if n == len(stop):\n"
                    "                return n, [at - n]\n"
                    "        return n, []\n",
                ),
                (FOUND, "[at for s in stops for at in machine(s)[1]]"),
            ),
        ),
        Wrong(
            "a single byte never held back",
            "for n in range(len(s))",
            "for n in range(2, len(s))",
            "One byte may be a stop's beginning too.",
        ),
        Wrong(
            "all of a stop but its last byte",
            "for n in range(len(s))",
            "for n in range(len(s) - 1)",
            "A text may end in all of a stop but the last byte: n = len(stop) - 1 is "
            "among them.",
        ),
        Wrong(
            "the stop cut out, and the text goes on",
            STOPPED,
            "for stop in stops:\n                text = text.replace(stop, b'')",
            "A stop ends the text: what comes behind it is not shown, now or later.",
        ),
        Wrong(
            "a stop stops nothing at the end",
            STOPPED,
            "counts += [min(found)] * (len(pieces) - len(counts))\n            break",
            "What was held back is shown at the end only if no stop came.",
            ((END, "return [*counts, sum(map(len, pieces))]"),),
        ),
        Wrong(
            "no number for the end",
            STOPPED,
            "return counts + [min(found)] * (len(pieces) - len(counts))",
            "One number more than there are pieces: the last is for the end, when "
            "nothing is held back any longer.",
            ((END, "return counts"),),
        ),
        Wrong(
            "the bytes that each piece adds",
            STOPPED,
            "counts += [min(found)] * (len(pieces) + 1 - len(counts))\n"
            "            return np.diff(counts, prepend=0)",
            "That is how many are written each time. Asked for is how many are on the "
            "screen, counted from the text's beginning.",
            ((END, "return np.diff([*counts, len(text)], prepend=0)"),),
        ),
        Wrong(
            "characters counted, not bytes",
            COUNT,
            "counts.append(size(len(text) - max(held, default=0)))",
            "Outside of ASCII a character is two, three or four bytes, and a piece may "
            "end in the middle of one. Nothing need be decoded to count bytes.",
            (
                (
                    'text, counts = b"", []',
                    'text, counts = b"", []\n\n'
                    "    def size(n):\n"
                    "        return len(text[:n].decode(errors='ignore'))\n",
                ),
                (STOPPED, STOPPED.replace("min(found)", "size(min(found))")),
                (END, "return [*counts, size(None)]"),
            ),
        ),
        Wrong(
            "only whole characters shown",
            COUNT,
            "whole = text[: len(text) - max(held, default=0)].decode(errors='ignore')\n"
            "        counts.append(len(whole.encode()))",
            "What is held back is what may become a stop, and no more: half a "
            "character that begins no stop is shown at once.",
        ),
        Wrong(
            "numbers up to the stop only",
            STOPPED,
            "return [*counts, min(found)]",
            "There are len(pieces) + 1 numbers in any case. After the stop they stay "
            "what they are.",
        ),
    ),
    right=(
        "def shown(pieces, stops):\n"
        "    text, seen, ended, out = b'', 0, False, []\n"
        "    for piece in pieces:\n"
        "        for byte in piece:\n"
        "            if ended:\n"
        "                break\n"
        "            text += bytes([byte])\n"
        "            full = [s for s in stops if text.endswith(s)]\n"
        "            if full:\n"
        "                seen, ended = len(text) - max(map(len, full)), True\n"
        "                break\n"
        "            at = seen\n"
        "            while not any(s.startswith(text[at:]) for s in stops):\n"
        "                if at == len(text):\n"
        "                    break\n"
        "                at += 1\n"
        "            seen = at\n"
        "        out.append(seen)\n"
        "    return out + [seen if ended else len(text)]\n",
        "def shown(pieces, stops):\n"
        "    import re\n"
        "    whole = b''.join(pieces)\n"
        "    hit = re.search(b'|'.join(map(re.escape, stops)), whole) if stops else 0\n"
        "    ends = np.cumsum([len(p) for p in pieces], dtype=int)\n"
        "    counts = []\n"
        "    for end in ends:\n"
        "        for at in range(end + 1):\n"
        "            now = whole[at:end]\n"
        "            if now and any(s[: end - at] == now for s in stops):\n"
        "                break\n"
        "        counts.append(at)\n"
        "    last = hit.start() if hit else len(whole)\n"
        "    return np.minimum(counts + [len(whole)], last).astype(np.int32)\n",
        "def shown(pieces, stops):\n"
        "    held, done, stopped = b'', 0, False\n"
        "    def release(tail):\n"
        "        for cut in range(len(tail)):\n"
        "            for stop in stops:\n"
        "                if tail[cut:].startswith(stop):\n"
        "                    return cut, True\n"
        "                if stop.startswith(tail[cut:]):\n"
        "                    return cut, False\n"
        "        return len(tail), False\n"
        "    counts = []\n"
        "    for piece in pieces:\n"
        "        if not stopped:\n"
        "            held += piece\n"
        "            n, stopped = release(held)\n"
        "            held, done = held[n:], done + n\n"
        "        counts.append(done)\n"
        "    counts.append(done if stopped else done + len(held))\n"
        "    return tuple(counts)\n",
    ),
)

CHECKS = [SHOWN]
