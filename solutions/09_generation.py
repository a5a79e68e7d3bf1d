# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 9 · Generating text
#
# Five functions between a model and somebody who reads along: the law that a token is
# drawn from, the mask of a cache that texts of all lengths share, a round of drafts in
# which no row waits for another, what may be shown while it is not yet clear whether
# the text has ended, and the bill. None needs another, and none needs a model.
#
# B counts texts, T the new tokens of each, S the places of a cache, V the tokens there
# are, D the numbers of a state. Places count from 0.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## gen.1 · The one that crosses the line stays
#
# Between logits and a draw stand two settings, in this order. The *temperature* $\tau$
# divides the logits of a row:
#
# $$ p_i = \frac{e^{z_i / \tau}}{\sum_j e^{z_j / \tau}} . $$
#
# At $\tau = 0$ all is on the largest logit, the first among equals. Then *top-p* cuts
# the tail: thousands of tokens, each of them next to impossible, are together drawn
# every few words. Rank the tokens from the most probable on, and keep the shortest
# beginning whose sum reaches `top_p`. The token with which it gets there is kept. The
# others get 0, and what was kept is scaled until it sums to 1 again.
#
# Of equally probable tokens the lower id ranks first. Logits may be as large as 1000
# and temperatures as small as 0.001, and nothing may overflow. `top_p` is above 0 and
# at most 1, where it keeps everything.


# %%
# exercise: gen.1
def next_token_law(logits, temperature, top_p):
    """The law that the next token is drawn from, row by row: logits (B, V) -> (B, V).

    temperature and top_p are numbers.
    """
    ### BEGIN SOLUTION
    if temperature == 0:
        return np.eye(logits.shape[1])[logits.argmax(axis=1)]
    z = (logits - logits.max(axis=1, keepdims=True)) / temperature  # (B, V)
    law = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    order = np.argsort(-law, axis=1, kind="stable")  # (B, V)
    ranked = np.take_along_axis(law, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked  # what the more probable ones have
    kept = np.zeros(law.shape)
    np.put_along_axis(kept, order, np.where(before < top_p, ranked, 0.0), axis=1)
    return kept / kept.sum(axis=1, keepdims=True)
    ### END SOLUTION


# %% [markdown]
# ## gen.2 · Every text ends somewhere else
#
# B texts share one cache, with S places a row. Of text $b$ it has kept `lengths[b]`
# tokens, in the places from 0 on. The T new ones have just been written behind them, at
# `lengths[b]` to `lengths[b]` + T - 1. What lies further back is rubbish: drafts that
# fell, or what the last user of the row left there. It gets a score like everything
# else, and only a mask keeps it from being read.
#
# A new token sees what was kept, the new ones before it, and itself. Return that as
# truth values: `True` where it may look. A text may be empty so far.


# %%
# exercise: gen.2
def visible(lengths, T, S):
    """Which places new token t of row b may see: lengths (B,) -> (B, T, S), bool."""
    ### BEGIN SOLUTION
    place = lengths[:, None] + np.arange(T)  # (B, T), of the new tokens themselves
    return np.arange(S) <= place[:, :, None]
    ### END SOLUTION


# %% [markdown]
# ## gen.3 · No row waits for another
#
# Greedy drafts, for B texts at a time. In each row $x_1 \dots x_n$ are settled, with an
# $n$ of its own, and the trunk's cache holds the $n - 1$ tokens before $x_n$: that is
# `lengths`. The module has drafted $d$. In one pass the trunk has read $x_n$ and $d$,
# so that for the moment its cache holds $n + 1$. The pass left two states a row,
# $h_n$ and $h_{n+1}$, and in `best` the trunk's favourites after $x_n$ and after $d$.
#
# If $d$ is the trunk's own favourite, it is settled, and so is the favourite that comes
# after it: two tokens. If not, that row's favourite after $x_n$ is settled in place of
# $d$, the cache forgets $d$, and what the pass found out behind $d$ is worth nothing.
# Return
#
# * `settled`, the new tokens of each row, with -1 where there is no second;
# * `lengths`, how many tokens the trunk's cache then keeps;
# * what the module reads next: M pairs of a state and the settled token after it, one
#   row's behind the other's, in order. `row` says whose they are, `states` and `tokens`
#   what they are. A row whose draft was kept has two of them.


# %%
# exercise: gen.3
def settle(draft, best, h, lengths):
    """One round: draft, lengths (B,), best (B, 2), h (B, 2, D).

    -> settled (B, 2), lengths (B,), row (M,), states (M, D), tokens (M,).
    """
    ### BEGIN SOLUTION
    kept = draft == best[:, 0]  # (B,)
    settled = np.stack([best[:, 0], np.where(kept, best[:, 1], -1)], axis=1)
    row, which = np.nonzero(settled >= 0)  # (M,), (M,)
    return settled, lengths + 1 + kept, row, h[row, which], settled[row, which]
    ### END SOLUTION


# %% [markdown]
# ## gen.4 · Not a byte too many, not a byte too late
#
# A text is shown while it is being written, and ends where one of `stops` begins: at a
# blank line, say, `b"\n\n"`. Neither the stop nor anything behind it may be seen, for
# what was shown cannot be taken back. But tokens bring their bytes in `pieces` as they
# please. A stop may come in three of them, and one may hold a stop's end and the
# beginning of something else.
#
# So after each piece hold back as much of the text's end as may turn out to be the
# beginning of a stop, and no more: whatever can no longer become one is shown at once.
# When all pieces are there and no stop was, the rest is shown too.
#
# Return how many bytes of the text are on the screen after each piece, counted from
# its beginning, and one number more for the end. What comes after a stop changes
# nothing. Of two stops the one that begins first counts. There may be no stops, no
# pieces, and pieces without a byte. No stop is empty, and none holds another inside.
#
# Bytes are not characters: `"é"` has two, and a piece may end between them. Half a
# character is shown like anything else.


# %%
# exercise: gen.4
def shown(pieces, stops):
    """How many bytes may be seen: two lists of bytes -> a list of len(pieces) + 1."""
    ### BEGIN SOLUTION
    text, counts = b"", []
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return counts + [min(found)] * (len(pieces) + 1 - len(counts))
        held = [n for s in stops for n in range(len(s)) if text.endswith(s[:n])]
        counts.append(len(text) - max(held, default=0))
    return [*counts, len(text)]
    ### END SOLUTION


# %% [markdown]
# ## gen.5 · What a second token costs
#
# Where a machine waits for its memory, a pass takes as long as its bytes take to be
# read. In mtp.6 two tokens cost no more than one. Of dense weights that is true, and of
# a text's cache: they are read once, however many tokens look at them. But an expert is
# read only if a token visits it, and a second token visits others.
#
# Let each token choose K of E experts at random. It leaves a given one alone with
# probability $1 - K/E$, and T tokens that do not know of each other all leave it alone
# with probability $(1 - K/E)^T$. So of the E experts
#
# $$ E \left( 1 - \Big( 1 - \frac{K}{E} \Big)^{T} \right) $$
#
# are read on average: K for one token, nearly 2K for two, all of them in the end.
#
# N texts are written at a time. A pass reads `dense` bytes whatever happens, `expert`
# bytes for each expert that is visited, and `cache` bytes for each text. Without
# drafts it takes one token of each text. With drafts it takes two of each, the module
# reads `draft` bytes a round besides, and a round yields $1 + a$ tokens of each text.
# Return the mean bytes of both kinds of pass, neither with the module's among them, and
# how many times as fast the texts come with drafts, the module's bytes included.


# %%
# exercise: gen.5
def gain(E, K, dense, expert, cache, draft, a, N):
    """Bytes of a pass over one token of each text, over two, and the gain in speed.

    All numbers; dense, expert, cache and draft are bytes. -> three numbers.
    """

    ### BEGIN SOLUTION
    def read(tokens):
        visited = E * (1 - (1 - K / E) ** tokens)  # of the E, on average
        return dense + visited * expert + N * cache

    one, two = read(N), read(2 * N)
    return one, two, (1 + a) * one / (two + draft)
    ### END SOLUTION


# %% [markdown]
# When gen.3 and gen.5 have passed, put DeepSeek-V3 in. Below, its weights are counted
# from its config, a byte each, as nearly all of them are released; the texts are 4096
# tokens long, and 85 of a hundred drafts are right, the least that the report says.
#
# **Predict** first. The report has 1.8 times the speed. Is that what you get for one
# text, alone on the machine? Is it more for four texts, or less? And if the rows of a
# batch wait for each other, so that a second token is taken only where every draft was
# right: at how many texts is nothing left of it?

# %%
import math

from grader import passed

from minidsv3.config import V3
from minidsv3.parameters import shapes


def weights(config):
    """Numbers that a pass reads: dense, one expert (all layers); the module's both."""
    sums, module = {}, f"model.layers.{config.num_hidden_layers}."
    for name, shape in shapes(config).items():
        kind = name.startswith(module), ".experts." in name
        if name != "model.embed_tokens.weight":  # a row of it, no more
            sums[kind] = sums.get(kind, 0) + math.prod(shape)
    E, head = config.n_routed_experts, config.vocab_size * config.hidden_size
    own = sums[True, False] + head, sums[True, True] / E  # it reads the head as well
    return sums[False, False], sums[False, True] / E, *own


def tokens_a_round(N, a, rounds=400):
    """Mean number of tokens a text, by your `settle`: alone, and all together."""
    rng = np.random.default_rng(0)
    alone = together = 0
    for _ in range(rounds):
        best, lengths = rng.integers(0, 9, (N, 2)), rng.integers(0, 99, N)
        draft = best[:, 0] + (rng.random(N) > a)
        more = settle(draft, best, np.zeros((N, 2, 1)), lengths)[1] - lengths
        alone, together = alone + more.mean(), together + more.min()
    return alone / rounds, together / rounds


def trial(config=V3, length=4096, a=0.85):
    """One text, and more and more of them."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    dense, expert, own, its_expert = weights(config)
    latent = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * length  # bfloat16
    cache = latent * config.num_hidden_layers
    print("          GB read for          times      tokens a round")
    print("texts   one     two each     as fast     alone   waiting")
    for N in (1, 4, 16, 64, 256, 1024):
        draft, _, _ = gain(E, K, own, its_expert, latent, 0, a, N)
        one, two, faster = gain(E, K, dense, expert, cache, draft, a, N)
        alone, waiting = tokens_a_round(N, a)
        row = f"{N:5}{one / 1e9:7.1f}{two / 1e9:9.1f}{faster:12.2f}"
        print(f"{row}{alone:10.2f}{waiting:10.2f}")


if passed("gen.3") and passed("gen.5"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
