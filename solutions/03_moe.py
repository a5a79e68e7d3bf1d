# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 3 · A mixture of experts
#
# Eight functions: who is chosen and how much each answer counts, the experts asked and
# their answers put together, what the router and the experts learn, and two ways to
# keep any of them from being asked too often. The last one is a whole layer, forwards
# and backwards, made of *your* answers.
#
# `# needs: lm.9` on top of a cell says that the grader hands in a right
# `swiglu_backward`, that of chapter 1. It does so only while it judges: to call your
# function by hand, copy your answer to lm.9 into a cell of this notebook.
#
# N counts tokens, D the numbers of a state, E the experts, I their inner width, and K
# the experts that a token visits. Experts count from 0.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## moe.1 · Chosen by one number, weighed by another
#
# A row $e_i$ of the router's matrix `W` belongs to expert $i$. Its affinity to a token
# $u$ is its own affair; no other expert's score comes into it:
#
# $$ s_i = \sigma(u \cdot e_i), \qquad \sigma(z) = \frac{1}{1 + e^{-z}} . $$
#
# Who is chosen is decided by $s_i + b_i$. How much an answer counts is decided by $s$
# alone, as a share among the chosen $\mathcal T$:
#
# $$ g_i = \lambda\, \frac{s_i}{\sum_{j \in \mathcal T} s_j} . $$
#
# `choose` is handed to you. It takes one number for each token and expert, (N, E), and
# returns the K experts of each token, (N, K), the best first. They are not always the K
# best of all; what else it looks at is moe.2. Affinities may be tiny, but no sum of
# them is 0.


# %%
# exercise: moe.1
def route(u, W, b, lam, choose):
    """Experts, gates and affinities: u (N, D), W (E, D), b (E,), lam a number.

    -> experts (N, K), gates (N, K), s (N, E).
    """
    ### BEGIN SOLUTION
    s = 1 / (1 + np.exp(-u @ W.T))  # (N, E)
    experts = choose(s + b)  # (N, K)
    chosen = np.take_along_axis(s, experts, axis=1)  # (N, K)
    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)
    return experts, gates, s
    ### END SOLUTION


# %% [markdown]
# ## moe.2 · Four machines at most
#
# The 256 experts of DeepSeek-V3 live on eight machines, 32 neighbours on each. A token
# that visits eight experts on eight machines is sent eight times; so only the experts
# of its best four groups may be chosen.
#
# `choice` holds $s + b$. The E experts form `n_group` groups of neighbours, all of one
# size; the first begins with expert 0. A group is as good as the *sum of its two best*
# numbers. The best `topk_group` groups stay open, and of the experts in them the K best
# are chosen. A group has at least two experts, the open ones together at least K, and
# any of the numbers may be negative.
#
# Return the best first. Of equal groups the lower one is better, of equal experts too,
# so that every machine chooses alike.


# %%
# exercise: moe.2
def choose(choice, K, n_group, topk_group):
    """The K experts of each token, the best first: choice (N, E) -> (N, K)."""
    ### BEGIN SOLUTION
    N, E = choice.shape
    grouped = choice.reshape(N, n_group, E // n_group)
    score = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)  # (N, n_group)
    best = np.argsort(-score, axis=1, kind="stable")[:, :topk_group]
    is_open = np.zeros((N, n_group), bool)
    np.put_along_axis(is_open, best, True, axis=1)
    choice = np.where(is_open[:, :, None], grouped, -np.inf).reshape(N, E)
    return np.argsort(-choice, axis=1, kind="stable")[:, :K]
    ### END SOLUTION


# %% [markdown]
# ## moe.3 · Each expert is asked once
#
# $$ y_t = \sum_{k=1}^{K} g_{t,k}\, \mathrm{FFN}_{i(t,k)}(u_t) $$
#
# where `experts[t, k]` is $i(t, k)$ and `gates[t, k]` is $g_{t,k}$. Read token by
# token, these are N · K calls with one row each, and every call reads an expert's
# weights from memory. Turn it round: collect the tokens of an expert, ask it *once*,
# and put its answers back where they belong. There are N · K pairs of a token and an
# expert; sorted by expert, each expert's pairs stand side by side.
#
# `ffn(i, x)` is expert $i$: rows x (n, D) go in, n answers (n, D) come out. Ask for no
# more rows than there are pairs, leave an expert alone that nobody chose, and drop no
# pair, however many want the same expert. Calls and rows are counted.


# %%
# exercise: moe.3
def mix(u, experts, gates, ffn, E):
    """The routed experts' answer: u (N, D), experts and gates (N, K) -> y (N, D).

    ffn(i, x) -> (n, D) for x (n, D) and i from 0 to E - 1.
    """
    ### BEGIN SOLUTION
    (N, D), K = u.shape, experts.shape[1]
    order = np.argsort(experts.ravel(), kind="stable")  # (N*K), pairs by expert
    counts = np.bincount(experts.ravel(), minlength=E)  # (E,)
    answers = np.empty((N * K, D))
    for i, pairs in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        if len(pairs):
            answers[pairs] = ffn(i, u[pairs // K])
    return np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D))
    ### END SOLUTION


# %% [markdown]
# ## moe.4 · Shares: what one gains, the others lose
#
# The way back through moe.1. `dgates` (N, K) arrives at the gates. They are shares:
# scale all affinities by two and no gate changes. So only differences can count, and a
# mean is subtracted, weighed with the shares. For a chosen expert,
#
# $$
# \frac{\partial \mathcal L}{\partial s_i} = \frac{\lambda}{S}
# \Big( dg_i - \sum_{j \in \mathcal T} \frac{s_j}{S}\, dg_j \Big),
# \qquad S = \sum_{j \in \mathcal T} s_j ,
# $$
#
# and through the gates an expert that was not chosen hears nothing. But others may have
# read the affinities: `ds` (N, E) is what they send back, and it adds. Then come the
# sigmoid, $\sigma' = s\,(1 - s)$, and the product with `W`.
#
# Return the gradients of `u` and `W`. The choice itself has none, and so `b` has none.


# %%
# exercise: moe.4
def route_backward(dgates, ds, u, W, experts, s, lam):
    """Gradients of the router: dgates, experts (N, K), ds, s (N, E), lam a number.

    u (N, D), W (E, D) -> du (N, D), dW (E, D).
    """
    ### BEGIN SOLUTION
    chosen = np.take_along_axis(s, experts, axis=1)  # (N, K)
    total = chosen.sum(axis=1, keepdims=True)  # (N, 1)
    mean = np.sum(chosen / total * dgates, axis=1, keepdims=True)  # (N, 1)
    dshares = np.zeros(s.shape)
    np.put_along_axis(dshares, experts, lam / total * (dgates - mean), axis=1)
    dz = (dshares + ds) * s * (1 - s)  # (N, E)
    return dz @ W, dz.T @ u
    ### END SOLUTION


# %% [markdown]
# ## moe.5 · Who was asked learns
#
# The way back through the experts. Each is a SwiGLU:
#
# $$
# \mathrm{FFN}_i(u) = \big(\mathrm{silu}(a) \odot b\big)\, W_{\text{down},i}^\top,
# \qquad a = u\,W_{\text{gate},i}^\top, \quad b = u\,W_{\text{up},i}^\top,
# $$
#
# with $\mathrm{silu}(a) = a\,\sigma(a)$, and `dy` (N, D) arrives at
# $y_t = \sum_k g_{t,k}\, \mathrm{FFN}_{i(t,k)}(u_t)$. A gate hears how far the answer
# that it weighs points along `dy`. An expert hears `dy` as loud as its gate is. A token
# was read by K experts, so their messages add. An expert that nobody asked learns
# nothing: its gradients are zeros.
#
# The grader hands in a right `swiglu_backward(dh, a, b)`, which returns `da, db`.


# %%
# exercise: moe.5
# needs: lm.9
def experts_backward(dy, u, experts, gates, W_gate, W_up, W_down):
    """Gradients of the experts: dy, u (N, D), experts, gates (N, K).

    W_gate, W_up (E, I, D), W_down (E, D, I)
    -> du (N, D), dgates (N, K), dW_gate, dW_up, dW_down in the shapes of the weights.
    """
    ### BEGIN SOLUTION
    du, dgates = np.zeros(u.shape), np.zeros(gates.shape)
    dW_gate, dW_up = np.zeros(W_gate.shape), np.zeros(W_up.shape)
    dW_down = np.zeros(W_down.shape)
    for i in range(len(W_gate)):
        t, k = np.nonzero(experts == i)  # its n tokens, and at which rank
        x, dy_i = u[t], dy[t]  # (n, D), (n, D)
        a, b = x @ W_gate[i].T, x @ W_up[i].T  # (n, I), (n, I)
        h = a / (1 + np.exp(-a)) * b
        dgates[t, k] = np.sum(dy_i * (h @ W_down[i].T), axis=1)
        do = gates[t, k][:, None] * dy_i  # (n, D)
        dW_down[i] = do.T @ h
        da, db = swiglu_backward(do @ W_down[i], a, b)
        dW_gate[i], dW_up[i] = da.T @ x, db.T @ x
        du[t] += da @ W_gate[i] + db @ W_up[i]
    return du, dgates, dW_gate, dW_up, dW_down
    ### END SOLUTION


# %% [markdown]
# ## moe.6 · No text may lean on few experts
#
# A batch may be balanced while each of its texts visits only the experts of its own
# subject. A loss of tiny weight $\alpha$ looks at each sequence of T tokens by itself:
#
# $$
# \mathcal L = \alpha \sum_{i} f_i P_i, \qquad
# f_i = \frac{E}{K\,T} \sum_{t} \mathbb 1[\, s_{t,i} \text{ among the K best of } s_t],
# \qquad
# P_i = \frac1T \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}} .
# $$
#
# So the report prints it (equations 17–20): the K best of $s$, without bias and without
# groups. If all experts are visited alike, every $f_i$ is 1 and the loss is $\alpha$.
# Return the mean of the loss over the B sequences, and its gradient. $f$ counts, and a
# count has no gradient; $P$ has one, and it is a share again.


# %%
# exercise: moe.6
def balance(s, K, alpha):
    """The balance loss and its gradient: s (B, T, E) -> a number, ds (B, T, E)."""
    ### BEGIN SOLUTION
    B, T, E = s.shape
    best = np.argsort(-s, axis=-1, kind="stable")[..., :K]  # (B, T, K)
    visits = np.zeros(s.shape)
    np.put_along_axis(visits, best, 1.0, axis=-1)
    f = E / (K * T) * visits.sum(axis=1, keepdims=True)  # (B, 1, E)
    total = s.sum(axis=-1, keepdims=True)  # (B, T, 1)
    shares = s / total
    P = shares.mean(axis=1, keepdims=True)  # (B, 1, E)
    loss = alpha * np.sum(f * P) / B
    mean = np.sum(f * shares, axis=-1, keepdims=True)  # (B, T, 1)
    return loss, alpha / (B * T) * (f - mean) / total
    ### END SOLUTION


# %% [markdown]
# ## moe.7 · A thermostat for each expert
#
# What keeps the experts balanced in DeepSeek-V3 is not the loss. After each step,
# every expert's tokens are counted over the whole batch, $c_i$, and its bias moves by
# $\gamma$: down if it had more than the mean $\bar c$ over all E, up if it had less,
#
# $$ b_i \leftarrow b_i + \gamma\, \mathrm{sign}(\bar c - c_i) . $$
#
# How far it is from its share does not matter, only the side. How well this does is
# told by the fullest expert, that on which all others wait:
#
# $$ \mathrm{MaxVio} = \frac{\max_i c_i}{\bar c} - 1 . $$
#
# You are handed the experts that the N tokens of a step chose. Return the new biases,
# and the MaxVio of that step.


# %%
# exercise: moe.7
def update_bias(b, experts, gamma):
    """The biases after a step, and its MaxVio: b (E,), experts (N, K) -> (E,), number.

    gamma is a number.
    """
    ### BEGIN SOLUTION
    counts = np.bincount(experts.ravel(), minlength=len(b))  # (E,)
    share = counts.mean()
    return b + gamma * np.sign(share - counts), counts.max() / share - 1
    ### END SOLUTION


# %% [markdown]
# ## moe.8 · The layer, of your own making
#
# All of it, with *your* functions: `route`, `choose`, `mix`, `experts_backward`,
# `balance` and `route_backward`. The layer's answer to `u` (B, T, D) is
#
# $$
# y = \mathrm{Shared}(u) + \sum_{i \in \mathcal T} g_i\, \mathrm{FFN}_i(u) .
# $$
#
# The shared expert has no gate, and every token goes there. `dy` arrives at $y$, and
# to the loss behind it the balance loss of this layer is added, weighed with `alpha`.
# Its affinities are those of `route`, by sequence.
#
# The parameters are `W`, `b`, the stacked `W_gate`, `W_up`, `W_down`, and the shared
# expert's `S_gate`, `S_up` (J, D), `S_down` (D, J), with a width J of its own. Return
# $y$, the gradient of `u`, and a dictionary with the gradient of each parameter that
# has one, under its name.
#
# One thing saves half of the work: the shared expert's way back needs no new line of
# mathematics. It is an expert, alone in its stack, that everybody chose with a gate
# of 1.


# %%
# exercise: moe.8
# assembles: moe.1, moe.2, moe.3, moe.4, moe.5, moe.6
def layer(params, u, dy, K, n_group, topk_group, lam, alpha):
    """A whole MoE layer: u, dy (B, T, D) -> y (B, T, D), du (B, T, D), grads."""
    p, E, (B, T, D) = params, len(params["W"]), u.shape
    N = B * T
    rows, dy_rows = u.reshape(N, D), dy.reshape(N, D)
    shared = p["S_gate"][None], p["S_up"][None], p["S_down"][None]  # a stack of one

    def swiglu(x, W_gate, W_up, W_down):
        a, b = x @ W_gate.T, x @ W_up.T
        return (a / (1 + np.exp(-a)) * b) @ W_down.T

    ### BEGIN SOLUTION
    stacks = p["W_gate"], p["W_up"], p["W_down"]
    experts, gates, s = route(
        rows, p["W"], p["b"], lam, lambda choice: choose(choice, K, n_group, topk_group)
    )
    y = mix(rows, experts, gates, lambda i, x: swiglu(x, *(W[i] for W in stacks)), E)
    y = y + swiglu(rows, p["S_gate"], p["S_up"], p["S_down"])

    grads = {}
    du, dgates, *dW = experts_backward(dy_rows, rows, experts, gates, *stacks)
    grads["W_gate"], grads["W_up"], grads["W_down"] = dW
    _, ds = balance(s.reshape(B, T, E), K, alpha)
    du_router, grads["W"] = route_backward(
        dgates, ds.reshape(N, E), rows, p["W"], experts, s, lam
    )
    everybody = np.zeros((N, 1), int)  # chose expert 0
    gate = np.ones(everybody.shape)
    du_shared, _, *dS = experts_backward(dy_rows, rows, everybody, gate, *shared)
    grads["S_gate"], grads["S_up"], grads["S_down"] = (dW[0] for dW in dS)
    du = du + du_router + du_shared
    return y.reshape(u.shape), du.reshape(u.shape), grads
    ### END SOLUTION


# %% [markdown]
# When moe.1, moe.2 and moe.7 have passed, let your thermostat work. Below, 2048 tokens
# a step meet a router that likes some experts far better than others, in 8 groups of
# 4, and nothing but the biases can help. (Experts drawn by lot would have a MaxVio of
# about 0.13 with so few tokens; it cannot get much lower than that.) DeepSeek-V3 moves
# its biases by 0.001 a step. **Predict** first: which of the three speeds is the first
# to come below 0.5, and which is balanced best after 400 steps? Does each of them get
# there?

# %%
from grader import passed


def trial(N=2048, D=16, E=32, K=4):
    """Three speeds, one router; what changes is the biases."""
    rng = np.random.default_rng(0)
    W = rng.normal(0, 0.5, (E, D))
    liked = rng.normal(0, 1, D)  # all tokens have something in common
    shown = 0, 10, 20, 50, 100, 200, 400
    print("step  " + "".join(f"{step:8}" for step in shown))
    for gamma in (0.001, 0.01, 0.1):
        b, seen = np.zeros(E), []
        draws = np.random.default_rng(1)
        for _ in range(max(shown) + 1):
            u = liked + draws.normal(0, 1, (N, D))
            experts, _, _ = route(u, W, b, 2.5, lambda c: choose(c, K, 8, 4))
            b, violation = update_bias(b, experts, gamma)
            seen.append(violation)
        row = "".join(f"{seen[step]:8.2f}" for step in shown)
        print(f"MaxVio{row}   gamma = {gamma}")


if passed("moe.1") and passed("moe.2") and passed("moe.7"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
