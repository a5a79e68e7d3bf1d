# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 2 · Multi-token prediction
#
# Seven functions: who predicts what, the module's entrance forwards and backwards, the
# gradients of what is shared, and then a draft: whether to keep it, what that buys, and
# the loop that does it. The loop runs on *your* verdict.
#
# `# needs: lm.6` on top of a cell says that the grader hands in a right
# `rmsnorm_backward`, that of chapter 1. It does so only while it judges: to call your
# function by hand, copy your answer to lm.6 into a cell of this notebook.
#
# B counts sequences, T positions, D the numbers of a state, V the tokens there are, and
# n the modules behind the trunk.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## mtp.1 · Everybody one place later
#
# Each sequence of `ids` holds T + 1 tokens, $t_1 \dots t_{T+1}$. The module of depth
# $k \ge 1$ takes the state that depth $k-1$ had at position $i$ and the token
# $t_{i+k}$, and is asked for $t_{i+k+1}$. It does so wherever there is something to be
# asked for: at $i = 1 \dots T-k$.
#
# Depth $k-1$ hands you `h`, its states at $1 \dots T-k+1$. Return the states that depth
# $k$ reads, the tokens it is given, and the targets it is asked for. Mind that the
# mathematics counts from 1.


# %%
# exercise: mtp.1
def shifted(h, ids, k):
    """What depth k reads and what it is asked for.

    h (B, T-k+1, D), ids (B, T+1)
    -> states (B, T-k, D), tokens (B, T-k), targets (B, T-k).
    """
    ### BEGIN SOLUTION
    return h[:, :-1], ids[:, k:-1], ids[:, k + 1 :]
    ### END SOLUTION


# %% [markdown]
# ## mtp.2 · The report says it the other way round
#
# State and embedding are each normalised, with a gain of their own, laid side by side
# and projected from 2D numbers to D. The report's equation (21) names the state first.
# The released weights have the embedding in front:
#
# $$
# h' = W\,\big[\,\mathrm{norm}(e;\, g_e)\,;\ \mathrm{norm}(h;\, g_h)\,\big],
# \qquad
# \mathrm{norm}(x;\, g) = \frac{g \odot x}{\sqrt{\overline{x^2} + \epsilon}} .
# $$
#
# With the halves exchanged everything has the right shape, and a module loaded from
# DeepSeek's file drafts noise. `W` lies in the file as all weights do, (outputs,
# inputs).


# %%
# exercise: mtp.2
def entrance(h, e, g_h, g_e, W, eps):
    """From state and embedding to the block: h, e (B, T, D) -> (B, T, D).

    g_h, g_e (D,), W (D, 2*D).
    """

    ### BEGIN SOLUTION
    def norm(x, g):
        return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5

    joined = np.concatenate([norm(e, g_e), norm(h, g_h)], axis=-1)  # (B, T, 2*D)
    return joined @ W.T
    ### END SOLUTION


# %% [markdown]
# ## mtp.3 · The trunk must hear of it
#
# The same lines backwards. `dh_prime` arrives at $h'$; five gradients leave. None of
# them is cut off: `dh` goes on through every layer of the trunk, which is what the
# module is there for, and `de` into the embedding. The grader hands in a right
# `rmsnorm_backward(dy, x, g, eps)`, which returns `dx, dg`.


# %%
# exercise: mtp.3
# needs: lm.6
def entrance_backward(dh_prime, h, e, g_h, g_e, W, eps):
    """Gradients of the entrance: dh_prime, h, e (B, T, D), g_h, g_e (D,), W (D, 2*D).

    -> dh, de, dg_h, dg_e, dW in the shapes of h, e, g_h, g_e, W.
    """

    ### BEGIN SOLUTION
    def norm(x, g):
        return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5

    joined = np.concatenate([norm(e, g_e), norm(h, g_h)], axis=-1)  # (B, T, 2*D)
    dW = np.einsum("btd,btj->dj", dh_prime, joined)
    de_hat, dh_hat = np.split(dh_prime @ W, 2, axis=-1)  # (B, T, D), (B, T, D)
    de, dg_e = rmsnorm_backward(de_hat, e, g_e, eps)
    dh, dg_h = rmsnorm_backward(dh_hat, h, g_h, eps)
    return dh, de, dg_h, dg_e, dW
    ### END SOLUTION


# %% [markdown]
# ## mtp.4 · One head, n + 1 bills
#
# Trunk and modules look their tokens up in one table and speak through one head. The
# loss is
#
# $$
# \mathcal L = \mathcal L^0 + \frac{\lambda}{n} \sum_{k=1}^{n} \mathcal L^k ,
# $$
#
# where $\mathcal L^k$ is the mean of $-\ln p$ over the $B\,(T-k)$ targets of depth $k$,
# $t_{i+k+1}$, and depth 0 is the trunk. The head made its logits at each depth, as
# `states[k] @ head.T`. The embedding was looked up at each depth too, for the tokens
# $t_{i+k}$; what came back to those rows is `de[k]`, a gradient of the whole
# $\mathcal L$, weights and all.
#
# Return the gradients of both tables. The grader hands in a right
# `cross_entropy_backward(logits, targets)` and `embedding_backward(dy, ids, V)`.


# %%
# exercise: mtp.4
# needs: lm.4, lm.5
def shared_gradients(head, ids, states, de, lam):
    """Gradients of head and embedding: head (V, D), ids (B, T+1), lam a number.

    states and de are lists of n + 1 arrays; those of depth k are (B, T-k, D).
    -> dhead (V, D), dembed (V, D).
    """
    ### BEGIN SOLUTION
    V, n = len(head), len(states) - 1
    dhead, dembed = np.zeros(head.shape), np.zeros(head.shape)
    for k, h in enumerate(states):
        weight = lam / n if k else 1.0
        dlogits = weight * cross_entropy_backward(h @ head.T, ids[:, k + 1 :])
        dhead += np.einsum("btv,btd->vd", dlogits, h)
        dembed += embedding_backward(de[k], ids[:, k:-1], V)
    return dhead, dembed
    ### END SOLUTION


# %% [markdown]
# ## mtp.5 · Keep it, or make up for it
#
# The module has drawn the token `d` from its law $q$. The trunk's law for that place is
# $p$. The draft is kept with probability $\min(1,\, p_d / q_d)$: you are handed a
# uniform number `u` from $[0, 1)$, and keep it if
#
# $$ u < p_d / q_d . $$
#
# If it is refused, another token is drawn, not from $p$: from what $p$ has beyond $q$,
#
# $$ r = \frac{(p - q)^+}{\sum_x (p_x - q_x)^+} . $$
#
# Return both, the verdict and $r$, whichever way the verdict goes. Where $p = q$,
# nothing is left to normalise; there, return $p$.


# %%
# exercise: mtp.5
def verdict(p, q, d, u):
    """Whether a draft is kept, and the law that makes up for it if it is not.

    p, q (V,), d an id with q[d] > 0, u a number -> kept (True or False), law (V,).
    """
    ### BEGIN SOLUTION
    kept = u * q[d] < p[d]
    beyond = np.maximum(p - q, 0.0)  # (V,)
    law = beyond / beyond.sum() if beyond.any() else p
    return kept, law
    ### END SOLUTION


# %% [markdown]
# ## mtp.6 · What a guess is worth
#
# DeepSeek-V3 keeps 85 to 90 of a hundred drafts and writes 1.8 times as fast. At one
# place, a draft from $q$ is kept with probability
#
# $$ \sum_x q_x \min(1,\, p_x / q_x), $$
#
# which can be written without a division. Its mean over the N places that you are given
# is $a$. A pass of the trunk then yields $1 + a$ tokens on average. It costs one pass,
# and the draft costs $c$ passes. (Two tokens take a pass no longer than one does, where
# reading the weights is what takes the time.) Return $a$, and how many times as fast as
# at one token a pass the text comes.


# %%
# exercise: mtp.6
def speed_up(p, q, c):
    """Share of drafts kept, and the gain in speed: p, q (N, V), c -> two numbers."""
    ### BEGIN SOLUTION
    a = np.minimum(p, q).sum(axis=-1).mean()
    return a, (1 + a) / (1 + c)
    ### END SOLUTION


# %% [markdown]
# ## mtp.7 · Draft, check, keep
#
# The loop, with *your* `verdict`. Trunk and module each have a cache, and all of the
# difficulty is to keep both honest.
#
# * `trunk(tokens)` reads some tokens behind those that it has read before and returns
#   `states, laws`, a row for each token; `laws[j]` is about the token *after*
#   `tokens[j]`. `trunk.length` counts what it holds; `trunk.crop(length)` forgets all
#   beyond.
# * `module(states, tokens)` reads pairs, a state and the token after it, and returns
#   laws, a row for each pair. It wants every settled pair once, in order, and forgets
#   nothing: never feed it a draft that may still fall.
# * `draw(law)` draws a token, `chance()` a uniform number.
#
# Each round, the module drafts `d`, the trunk reads the last settled token *and* `d`
# in one pass, and your verdict falls. A kept draft brings a second token with it; a
# refused one must leave no trace. Return exactly `n` tokens: draft as long as two are
# missing, and if one is missing at the end, let the trunk give it alone.


# %%
# exercise: mtp.7
# assembles: mtp.5
def write(trunk, module, prompt, n, draw, chance):
    """Continue a prompt by n tokens, with drafts: prompt (P,) -> list of n ids."""
    states, laws = trunk(prompt)  # (P, D), (P, V)
    text = [draw(laws[-1])]  # settled, but not read yet
    new = [*prompt[1:], *text]  # the tokens after those states
    ### BEGIN SOLUTION
    while len(text) + 1 < n:
        q = module(states, new)[-1]  # (V,)
        d = draw(q)
        states, laws = trunk([text[-1], d])  # (2, D), (2, V)
        kept, law = verdict(laws[0], q, d, chance())
        if kept:
            new = [d, draw(laws[1])]
        else:
            new = [draw(law)]
            states = states[:1]
            trunk.crop(trunk.length - 1)
        text += new
    if len(text) < n:
        states, laws = trunk(text[-1:])
        text.append(draw(laws[-1]))
    return text
    ### END SOLUTION


# %% [markdown]
# When that has passed, let it write. Below, the trunk is a table of counts that
# remembers three bytes; it stands for sixty-one layers. Its module remembers fewer.
# **Predict** first: how many of its drafts are kept if it remembers one byte? Two? And
# none at all?

# %%
from grader import passed

from minidsv3 import corpus


class Counts:
    """How often each byte followed the last few, mixed with shorter memories."""

    def __init__(self, text, memory):
        self.shorter = Counts(text, memory - 1) if memory else None
        self.powers = 257 ** np.arange(memory)
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], max(memory, 1))
        keys = windows[:, : len(self.powers)] @ self.powers
        order = np.argsort(keys, kind="stable")
        self.keys, self.after = keys[order], text[max(memory, 1) :][order]
        self.known = {}

    def law(self, before):
        """The law of the byte after these, (257,)."""
        key = np.array(before, dtype=int) @ self.powers
        if key not in self.known:
            prior = self.shorter.law(before[1:]) if self.shorter else np.ones(257) / 257
            first, last = np.searchsorted(self.keys, [key, key + 1])
            counts = np.bincount(self.after[first:last], minlength=257)
            self.known[key] = (counts + 2 * prior) / (counts.sum() + 2)
        return self.known[key]


class Trunk:
    """Its state is what it remembers, its cache all that it has read."""

    def __init__(self, table):
        self.table, self.cache, self.passes, self.judged = table, [], 0, []

    @property
    def length(self):
        return len(self.cache)

    def crop(self, length):
        del self.cache[length:]

    def __call__(self, tokens):
        self.passes += 1
        self.cache += tokens
        ends = range(self.length - len(tokens) + 1, self.length + 1)
        states = [([0] * 3 + self.cache[:end])[-3:] for end in ends]
        laws = np.array([self.table.law(state) for state in states])
        self.judged += [laws[0]] * (len(tokens) == 2)
        return states, laws


class Module:
    """Of each state and token together, it sees the last few bytes."""

    def __init__(self, table):
        self.table, self.drafted = table, []

    def __call__(self, states, tokens):
        known = [[*state, token] for state, token in zip(states, tokens, strict=True)]
        few = len(self.table.powers)
        laws = np.array([self.table.law(some[len(some) - few :]) for some in known])
        self.drafted.append(laws[-1])
        return laws


def trial(n=3000, c=1 / 61):
    """Let four modules draft for one trunk."""
    text = corpus.load_corpus().train[:400_000].astype(int)
    rng = np.random.default_rng(0)
    tables = [Counts(text, memory) for memory in range(4)]

    def draw(law):
        return int(rng.choice(257, p=law))

    print("module remembers   1 + a   tokens per pass   speed-up")
    for memory, table in enumerate(tables):
        trunk, module = Trunk(tables[3]), Module(table)
        written = write(trunk, module, [*b"    def "], n, draw, rng.random)
        p = np.array(trunk.judged)
        a, gain = speed_up(p, np.array(module.drafted)[: len(p)], c)
        row = f"{1 + a:5.2f}   {len(written) / trunk.passes:15.2f}   {gain:8.2f}"
        print(f"{memory:16}   {row}")
    print(bytes(b % 256 for b in written[:300]).decode("latin1"))


if passed("mtp.6") and passed("mtp.7"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
