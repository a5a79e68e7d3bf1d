"""Chapter 9: judges of the exercises on generating text.

The library and a definition for the law, torch's attention for the mask, whole texts
for a round of drafts, every way to go on for the stops, every draw for the experts.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.generation import numpy_ref as library

from ..judging import FORWARD, Rng, agree, sizes

# --- the draw ---------------------------------------------------------------------


def logits_of_all_kinds(rng: Rng, B: int, V: int) -> list[np.ndarray]:
    """Ordinary ones, huge ones, and few different ones, in eighths where it matters."""
    z = rng.normal(0, 2, (B, V))
    far = z / 1000 + rng.permutation(np.linspace(-900, 900, B))[:, None]
    alike = np.where(rng.permuted(np.arange(16) < 8)[None], 0.0, -5000.0)
    return [z, far, rng.integers(0, 3, (B, V)).astype(float), alike.repeat(B, axis=0)]


def next_token_law(f: Callable, rng: Rng) -> None:
    """The library's law, torch's where nothing is cut, and what top-p promises."""
    B, V = sizes(rng, 2, low=3, high=8)
    for z in logits_of_all_kinds(rng, B, V):
        hot, p = float(rng.uniform(1.2, 4)), float(rng.uniform(0.3, 0.9))
        for temperature, top_p in product((0.0, 0.002, 0.7, hot), (p, 0.5, 1.0)):
            law = f(z.copy(), temperature, top_p)
            np.testing.assert_allclose(law.sum(axis=1), 1, rtol=1e-12)
            if temperature == 0:
                first = [row.tolist().index(max(row)) for row in z]
                agree(law, np.eye(z.shape[1])[first], FORWARD)
                continue
            below = torch.tensor(z - z.max(axis=1, keepdims=True))
            whole = F.softmax(below / temperature, dim=1).numpy()
            for row, mine, full in zip(z, law, whole, strict=True):
                order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
                shortest_beginning(order, mine, full, top_p)
            agree(law, library.next_token_law(z, temperature, top_p), 1e-11)


def shortest_beginning(
    order: list[int], law: np.ndarray, full: np.ndarray, top_p: float
) -> None:
    """What is kept reaches top_p and does so with its last token only."""
    kept = np.flatnonzero(law)
    if top_p == 1:  # what is lost in rounding may be cut
        np.testing.assert_allclose(law, full, atol=1e-15, rtol=1e-11)
        return
    assert sorted(order[: len(kept)]) == kept.tolist()
    sums = np.cumsum(full[order])[: len(kept)]
    assert sums[-1] >= top_p - 1e-12 and (sums[:-1] < top_p - 1e-12).all()
    np.testing.assert_allclose(law[kept], full[kept] / sums[-1], rtol=1e-11)


# --- one cache, many texts ----------------------------------------------------------


def visible(f: Callable, rng: Rng) -> None:
    """Attention under the mask is that of each text by itself."""
    B, T, D, spare = sizes(rng, 4)
    lengths = rng.integers(0, 9, B)
    S = int(lengths.max()) + T + spare
    q, k, v = (torch.tensor(rng.normal(size=(B, n, D))) for n in (T, S, S))
    mask = f(lengths.copy(), T, S)
    assert mask.dtype == bool and mask.shape == (B, T, S)
    ours = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(mask))
    for b, n in enumerate(lengths.tolist()):
        for t in range(T):
            own = [x[b, : n + t + 1] for x in (k, v)]
            alone = F.scaled_dot_product_attention(q[b, t : t + 1], *own)
            agree(ours[b, t].numpy(), alone[0].numpy(), FORWARD)


# --- a round of drafts --------------------------------------------------------------


def favourite(text: Sequence[int], V: int) -> int:
    """What a trunk would say after a text: it depends on every token."""
    return sum((i + 3) * (token + 1) ** 2 for i, token in enumerate(text)) % V


def settle(f: Callable, rng: Rng) -> None:
    """Round after round: greedy texts, honest caches, every pair once and in order."""
    B, V, skill = *sizes(rng, 2, low=3, high=7), float(rng.uniform(0.2, 0.9))
    texts = [rng.integers(0, V, n).tolist() for n in rng.integers(1, 6, B)]
    starts = [len(text) for text in texts]
    caches, fed = [text[:-1] for text in texts], [[] for _ in texts]
    for _ in range(8):
        true = np.array([favourite(text, V) for text in texts])
        wrong = (true + rng.integers(1, V, B)) % V
        draft = np.where(rng.random(B) < skill, true, wrong)
        best, h = np.zeros((B, 2), int), np.zeros((B, 2, 1))
        lengths = np.array([len(cache) for cache in caches])
        for b, text in enumerate(texts):
            assert caches[b] == text[:-1]
            for j, token in enumerate([text[-1], draft[b]]):
                caches[b].append(int(token))
                best[b, j] = favourite(caches[b], V)
                h[b, j] = code(caches[b])
        given = [x.copy() for x in (draft, best, h, lengths)]
        settled, after, row, states, tokens = f(*given)
        assert settled.shape == (B, 2) and after.shape == (B,)
        assert states.shape == (len(row), 1) and len(tokens) == len(row)
        assert list(row) == sorted(row)
        for b, text in enumerate(texts):
            assert len(new := [int(t) for t in settled[b] if t >= 0]) > 0
            assert len(new) == 1 + (draft[b] == true[b])
            text += new
            del caches[b][after[b] :]
        for b, state, token in zip(row, states, tokens, strict=True):
            fed[b].append((state[0], int(token)))
    for text, start, pairs in zip(texts, starts, fed, strict=True):
        places = range(start, len(text))
        assert all(text[n] == favourite(text[:n], V) for n in places)
        assert pairs == [(code(text[:n]), text[n]) for n in places]


def code(text: Sequence[int]) -> float:
    """A state: a number that no other text has."""
    return float(
        sum(8**i * (token + 1) for i, token in enumerate(text[-12:])) + len(text)
    )


# --- stops --------------------------------------------------------------------------


def end(text: bytes, stops: Sequence[bytes]) -> int:
    """Where a text ends that is all there."""
    for at in range(len(text)):
        if any(text[at : at + len(stop)] == stop for stop in stops):
            return at
    return len(text)


def some_stops(rng: Rng, letters: bytes) -> list[bytes]:
    """Up to three, none inside another."""
    stops: list[bytes] = []
    for _ in range(int(rng.integers(1, 6))):
        new = bytes(rng.choice([*letters], int(rng.integers(1, 5))).tolist())
        if not any(new in stop or stop in new for stop in stops):
            stops.append(new)
    return stops[:3]


def shown(f: Callable, rng: Rng) -> None:
    """What may be seen is what every way to go on leaves standing."""
    for number in range(12):
        a, b, c = alphabet = b"abc" if number % 2 else "é".encode() + b"c"
        stops = some_stops(rng, alphabet[:2])
        whole = bytes(rng.choice([a, a, b, b, c], 12).tolist())
        cuts = sorted(rng.integers(0, 13, 5).tolist())
        places = [*cuts, 12]
        pieces = [whole[i:j] for i, j in zip([0, *cuts], places, strict=True)]
        more = [bytes(m) for n in range(4) for m in product(alphabet, repeat=n)]
        counts = list(f([*pieces], [*stops]))
        assert len(counts) == len(pieces) + 1
        for n, count in zip(places, counts, strict=False):
            futures = [end(whole[:n] + m, stops) for m in more]
            assert count == min(n, *futures), (pieces, stops, counts)
        assert counts[-1] == end(whole, stops), (pieces, stops, counts)


# --- the bill -----------------------------------------------------------------------


def visited(E: int, K: int, tokens: int) -> Fraction:
    """The mean number of experts, by the law of how many there are after each token."""
    law = {0: Fraction(1)}
    for _ in range(tokens):
        after: dict[int, Fraction] = {}
        for known, share in law.items():
            for new in range(min(K, E - known) + 1):
                ways = comb(E - known, new) * comb(known, K - new)
                way = share * Fraction(ways, comb(E, K))
                after[known + new] = after.get(known + new, 0) + way
        law = after
    return sum(number * share for number, share in law.items())


def gain(f: Callable, rng: Rng) -> None:
    """Bytes by the exact law of visits; the gain by a thousand rounds of each kind."""
    E, N = sizes(rng, 2, low=2, high=9)
    K, a = int(rng.integers(1, E + 1)), float(rng.uniform(0.1, 0.9))
    dense, expert, cache, draft = (float(x) for x in rng.uniform(1, 9, 4))
    one, two, faster = f(E, K, dense, expert, cache, draft, a, N)
    mine = [
        dense + float(visited(E, K, tokens)) * expert + sum([cache] * N)
        for tokens in (N, 2 * N)
    ]
    agree(np.array([one, two]), np.array(mine), FORWARD)
    rounds = 1000
    plain = rounds * N / (rounds * mine[0])
    drafted = rounds * N * (1 + a) / (rounds * (mine[1] + draft))
    agree(np.array(faster), np.array(drafted / plain), FORWARD)


JUDGES = {
    "gen.1": next_token_law,
    "gen.2": visible,
    "gen.3": settle,
    "gen.4": shown,
    "gen.5": gain,
}
