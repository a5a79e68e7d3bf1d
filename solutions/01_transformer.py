# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 1 · A transformer in NumPy
#
# Eleven functions, from a softmax to the gradient of a whole model. The last one runs
# the other ten together, and then *your* gradients train.
#
# The loop: write your answer where it says `return ...`, run the cell (Shift+Enter),
# then run the `check` below it. `hint("lm.1")` helps, up to `hint("lm.1", 3)`.
# `check_all()` shows how far you are; `pytest exercises/` in a terminal grades the
# saved file.
#
# Arrays have the shapes that the docstrings give, and no others need to work. Leave
# the comment lines on top of an answer cell as they are: the first is how the grader
# knows the cell, and `# needs: lm.1` says that it hands in a right `softmax`, whatever
# became of yours.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## lm.1 · A softmax that survives 1000
#
# $$p_i = \frac{e^{x_i}}{\sum_j e^{x_j}}$$
#
# over the last axis. Typed as it stands, it answers `nan` as soon as one number
# exceeds 709, because the exponential of 710 is more than a float64 can hold. Write it
# so that any finite input works, and so that $-\infty$, which a mask puts in, becomes
# an exact zero.


# %%
# exercise: lm.1
# solution: minidsv3.primitives.numpy_ref.softmax
def softmax(x):
    """Softmax over the last axis: x (..., N) -> (..., N)."""
    return ...


# %% [markdown]
# ## lm.2 · The future is not merely indifferent
#
# From scores to attention weights. `scores` has shape (B, H, T, S) with T ≤ S: the T
# queries are the *last* T of S positions, as when a cache holds the first S − T. A
# query must not hear a position later than its own, and each row of weights must sum
# to one. You need a softmax: the grader hands in a right one, whatever became of
# yours.


# %%
# exercise: lm.2
# needs: lm.1
def causal_weights(scores):
    """Attention weights: scores (B, H, T, S) -> (B, H, T, S), zero in the future."""
    ### BEGIN SOLUTION
    T, S = scores.shape[-2:]
    future = np.arange(S) > np.arange(S - T, S)[:, None]  # (T, S)
    return softmax(np.where(future, -np.inf, scores))
    ### END SOLUTION


# %% [markdown]
# ## lm.3 · Where is a byte?
#
# Turn each pair $(2j, 2j+1)$ of the last axis by the angle $p\,\theta_j$, from its
# first coordinate towards its second, with
#
# $$\theta_j = \text{base}^{-2j/d}.$$
#
# The positions $p$ are handed in, for they need not be 0, 1, 2: a cached text goes on
# at 5000. All heads of a position turn alike.


# %%
# exercise: lm.3
def rope(x, positions, base=10000.0):
    """Rotary positions: x (B, T, H, d), positions (T,) -> (B, T, H, d)."""
    ### BEGIN SOLUTION
    d = x.shape[-1]
    theta = base ** (-2.0 * np.arange(d // 2) / d)  # (d/2)
    angle = positions[:, None, None] * theta  # (T, 1, d/2)
    cos, sin = np.cos(angle), np.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, T, H, d/2)
    y = np.empty_like(x)
    y[..., 0::2] = even * cos - odd * sin
    y[..., 1::2] = even * sin + odd * cos
    return y
    ### END SOLUTION


# %% [markdown]
# ## lm.4 · What was expected minus what came
#
# The loss is the mean of $-\ln p_\text{target}$ over all B·T positions. Its gradient
# with respect to the logits fits on one line of mathematics, and every backward pass
# of this book begins with it. The grader hands in a right `softmax`.


# %%
# exercise: lm.4
# needs: lm.1
def cross_entropy_backward(logits, targets):
    """Gradient of the mean loss: logits (B, T, V), targets (B, T) -> (B, T, V)."""
    ### BEGIN SOLUTION
    onehot = np.eye(logits.shape[-1])[targets]  # (B, T, V)
    return (softmax(logits) - onehot) / targets.size
    ### END SOLUTION


# %% [markdown]
# ## lm.5 · Forty times the same byte
#
# The embedding looked up row `ids[b, t]` for each position. If the byte `e` occurs
# forty times, its row of the gradient, number 101, is a sum of forty vectors. One
# popular line of NumPy keeps the last of them and says nothing.


# %%
# exercise: lm.5
def embedding_backward(dy, ids, V):
    """Gradient of the table: dy (B, T, D), ids (B, T) -> (V, D)."""
    ### BEGIN SOLUTION
    dW = np.zeros((V, dy.shape[-1]))
    np.add.at(dW, ids, dy)
    return dW
    ### END SOLUTION


# %% [markdown]
# ## lm.6 · RMSNorm: the term that is easy to forget
#
# $$y = g \odot x\,r, \qquad r = (\overline{x^2} + \epsilon)^{-1/2},$$
#
# with one $r$ a row. Two gradients: `dx`, in which the input counts twice, openly and
# inside $r$; and `dg`, which all rows share.


# %%
# exercise: lm.6
def rmsnorm_backward(dy, x, g, eps):
    """Gradients of RMSNorm: dy, x (B, T, D), g (D,) -> dx (B, T, D), dg (D,)."""
    ### BEGIN SOLUTION
    r = (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5  # (B, T, 1)
    dz = g * dy  # (B, T, D)
    dx = r * dz - x * r**3 * np.mean(dz * x, axis=-1, keepdims=True)
    dg = np.sum(dy * x * r, axis=(0, 1))
    return dx, dg
    ### END SOLUTION


# %% [markdown]
# ## lm.7 · Worse than average
#
# Softmax backwards. You have its output $P$ and the gradient $dP$; you want the
# gradient of the scores that went in. A nudge of one score moves the whole row, for a
# row always sums to one.


# %%
# exercise: lm.7
# solution: minidsv3.primitives.numpy_ref.softmax_backward
def softmax_backward(dP, P):
    """Gradient of softmax over the last axis: dP, P (..., N) -> dS (..., N)."""
    return ...


# %% [markdown]
# ## lm.8 · Attention, with one key head for all
#
# Multi-query attention: H query heads share one head of keys and values,
#
# $$S = \alpha\, q\,k^\top,\quad P = \mathrm{softmax}(S),\quad o = P\,v,$$
#
# with $\alpha$ called `scale`, and $P$ already computed (and masked). `do` is the
# gradient that arrives at $o$; three are to be returned. What is shared, sums:
# DeepSeek's MLA has such a key too, and the forgotten sum over heads is its most
# common bug. The grader hands in a right `softmax_backward`.


# %%
# exercise: lm.8
# needs: lm.7
def attention_backward(do, q, k, v, P, scale):
    """Gradients of multi-query attention.

    do (B, H, T, d_v), q (B, H, T, d), k (B, S, d), v (B, S, d_v), P (B, H, T, S)
    -> dq, dk, dv in the shapes of q, k, v.
    """
    ### BEGIN SOLUTION
    dv = np.einsum("bhts,bhtv->bsv", P, do)
    dP = np.einsum("bhtv,bsv->bhts", do, v)
    dS = scale * softmax_backward(dP, P)  # (B, H, T, S)
    dq = np.einsum("bhts,bsd->bhtd", dS, k)
    dk = np.einsum("bhts,bhtd->bsd", dS, q)
    return dq, dk, dv
    ### END SOLUTION


# %% [markdown]
# ## lm.9 · A product of two opinions
#
# The wide vector of the feed-forward is
#
# $$h = \mathrm{silu}(a) \odot b, \qquad \mathrm{silu}(a) = a\,\sigma(a).$$
#
# Given the gradient that arrives at $h$, return those of $a$ and of $b$, whole: a
# model trains with half of $\mathrm{silu}'$ missing, and its loss curve would not have
# told you.


# %%
# exercise: lm.9
def swiglu_backward(dh, a, b):
    """Gradients of h = silu(a) * b: dh, a, b (..., I) -> da, db (..., I)."""
    ### BEGIN SOLUTION
    s = 1 / (1 + np.exp(-a))  # (..., I)
    da = dh * b * s * (1 + a * (1 - s))
    db = dh * a * s
    return da, db
    ### END SOLUTION


# %% [markdown]
# ## lm.10 · One step of AdamW
#
# Running means of the gradient and of its square,
#
# $$
# m \leftarrow \beta_1 m + (1-\beta_1)\,g, \qquad
# v \leftarrow \beta_2 v + (1-\beta_2)\,g^2 ,
# $$
#
# both begun at zero. For the step they are corrected for that beginning, to $\hat m$
# and $\hat v$; returned they are as above. Then
#
# $$
# w \leftarrow w - \text{rate}\,
# \big(\hat m / (\sqrt{\hat v} + \epsilon) + \text{decay}\; w\big).
# $$
#
# `t` counts steps from 1; what is the correction? (The training page derives it.) The
# arrays may have any shape. Return new ones: the caller still needs the old.


# %%
# exercise: lm.10
def adamw_step(w, g, m, v, t, rate, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1):
    """One update: weight w, gradient g, means m and v, one shape -> new w, m, v."""
    ### BEGIN SOLUTION
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    w = w - rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    return w, m, v
    ### END SOLUTION


# %% [markdown]
# ## lm.11 · All of it, by you
#
# A language model of one block, forwards, is given. Write it backwards, at the place
# of the last line, and return `loss, grads`. Use the functions you have: **your own**,
# this time. The grader runs them together, so it waits until lm.1 to lm.9 have passed.
# For the products `y = x @ W.T` there is no exercise; write a small helper inside.
#
# Go through the forward pass from its last line to its first. Where it adds, the
# gradient goes both ways; where something was used twice, two gradients add up. The
# rotation has no backward function of its own: which positions turn it back?


# %%
# exercise: lm.11
# assembles: lm.1, lm.2, lm.3, lm.4, lm.5, lm.6, lm.7, lm.8, lm.9
def loss_and_grads(params, ids, H=2, eps=1e-6):
    """Mean loss (nats) and the gradient of every parameter; ids (B, T+1).

    params: embed (V, D), norm_1 (D,), W_q (H*d, D), W_k (d, D), W_v (d, D),
    W_o (D, H*d), norm_2 (D,), W_gate (I, D), W_up (I, D), W_down (D, I), head (V, D).
    Returns loss, grads; grads has the names and shapes of params.
    """

    def rmsnorm(x, g):
        return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5

    p, past, targets = params, ids[:, :-1], ids[:, 1:]
    (B, T), d = past.shape, len(p["W_k"])
    scale, positions = d**-0.5, np.arange(T)
    x0 = p["embed"][past]  # (B, T, D)
    u1 = rmsnorm(x0, p["norm_1"])
    q = rope((u1 @ p["W_q"].T).reshape(B, T, H, d), positions).swapaxes(1, 2)
    k = rope((u1 @ p["W_k"].T)[:, :, None], positions)[:, :, 0]  # (B, T, d)
    v = u1 @ p["W_v"].T  # (B, T, d)
    P = causal_weights(scale * np.einsum("bhtd,bsd->bhts", q, k))  # (B, H, T, T)
    o = np.einsum("bhts,bsd->bhtd", P, v).swapaxes(1, 2).reshape(B, T, H * d)
    x1 = x0 + o @ p["W_o"].T  # (B, T, D)
    u2 = rmsnorm(x1, p["norm_2"])
    a, b = u2 @ p["W_gate"].T, u2 @ p["W_up"].T  # (B, T, I)
    h = a / (1 + np.exp(-a)) * b
    x2 = x1 + h @ p["W_down"].T
    logits = x2 @ p["head"].T  # (B, T, V)
    loss = -np.mean(np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)))
    grads = {}
    ### BEGIN SOLUTION

    def linear_backward(name, dy, x):
        grads[name] = np.einsum("bto,bti->oi", dy, x)
        return dy @ p[name]

    dx2 = linear_backward("head", cross_entropy_backward(logits, targets), x2)
    dh = linear_backward("W_down", dx2, h)
    da, db = swiglu_backward(dh, a, b)
    du2 = linear_backward("W_gate", da, u2) + linear_backward("W_up", db, u2)
    dx1, grads["norm_2"] = rmsnorm_backward(du2, x1, p["norm_2"], eps)
    dx1 = dx1 + dx2
    do = linear_backward("W_o", dx1, o).reshape(B, T, H, d).swapaxes(1, 2)
    dq, dk, dv = attention_backward(do, q, k, v, P, scale)
    dq = rope(dq.swapaxes(1, 2), -positions).reshape(B, T, H * d)
    dk = rope(dk[:, :, None], -positions)[:, :, 0]
    du1 = linear_backward("W_q", dq, u1) + linear_backward("W_k", dk, u1)
    du1 = du1 + linear_backward("W_v", dv, u1)
    dx0, grads["norm_1"] = rmsnorm_backward(du1, x0, p["norm_1"], eps)
    grads["embed"] = embedding_backward(dx0 + dx1, past, len(p["embed"]))
    return loss, grads
    ### END SOLUTION


# %% [markdown]
# When that has passed, train. Every derivative below is yours, and so is the
# optimiser. **Predict** first: a table of pairs of bytes pays about 3.5 bits per byte
# on this text. What does your block pay after 200 steps?

# %%
from grader import passed

from minidsv3 import corpus


def train(steps=200, V=257, D=48, d=24, I=96):
    """Train your block on Python's standard library."""
    shapes = {"embed": (V, D), "W_q": (2 * d, D), "W_k": (d, D), "W_v": (d, D)}
    shapes |= {"W_o": (D, 2 * d), "W_gate": (I, D), "W_up": (I, D), "W_down": (D, I)}
    shapes |= {"head": (V, D)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, D**-0.5, shape) for name, shape in shapes.items()}
    params |= {"norm_1": np.ones(D), "norm_2": np.ones(D)}
    m, v = ({name: np.zeros_like(w) for name, w in params.items()} for _ in range(2))
    text = corpus.load_corpus().train
    for t in range(1, steps + 1):
        ids = corpus.batch(text, batch_size=16, length=32, seed=0, step=t)
        loss, grads = loss_and_grads(params, ids)
        for name, w in params.items():
            new = adamw_step(w, grads[name], m[name], v[name], t, rate=1e-2)
            params[name], m[name], v[name] = new
        if t == 1 or t % 40 == 0:
            print(f"step {t:3}   {loss / np.log(2):.2f} bits per byte")


if passed("lm.10") and passed("lm.11"):
    train()

# %% [markdown]
# ## How far you are

# %%
check_all()
