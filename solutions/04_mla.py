# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 4 · Multi-head latent attention
#
# Eight functions: what is kept of a token, two ways to attend to it that give the same
# numbers, a step of decoding, YaRN, two backward passes that give the same gradients,
# and the whole layer, which runs on *your* answers.
#
# `# needs: lm.3` on top of a cell says that the grader hands in a right `rope`, that of
# chapter 1. It does so only while it judges: to call your function by hand, copy your
# answer to lm.3 into a cell of this notebook.
#
# B counts sequences, T positions that ask, S those that are kept, D the numbers of the
# stream, $N_h$ the heads. A head's query has $d_h$ numbers of content and $d_R$ that
# rotate, its value has $d_v$, and a latent has $d_c$; no two of them need be equal. The
# scale of the scores, $\alpha$, is handed in as `alpha`; it is the subject of mla.5.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## mla.1 · All that is kept of a token
#
# With 128 heads of 128, ordinary attention keeps 32,768 numbers a token and layer.
# DeepSeek-V3 keeps 576: a latent, and behind it one key that rotates and that all heads
# share. Both come out of one product,
#
# $$
# [a;\ k] = x\,W_{DKV}^\top, \qquad
# c = \frac{g \odot a}{\sqrt{\overline{a^2} + \epsilon}}, \qquad
# k^R = \mathrm{RoPE}(k),
# $$
#
# where the first $d_c$ rows of $W_{DKV}$ make $a$ and the last $d_R$ make $k$. The norm
# is the latent's alone. Return $[c;\ k^R]$, ready for every token to come: normalised
# here and rotated here, once. The grader hands in a right `rope(x, positions)`; its `x`
# has the shape (B, T, heads, d).


# %%
# exercise: mla.1
# needs: lm.3
def latents(x, W_DKV, g, positions, eps=1e-6):
    """What is kept: x (B, T, D), W_DKV (d_c+d_R, D), g (d_c,), positions (T,).

    -> (B, T, d_c+d_R).
    """
    ### BEGIN SOLUTION
    a, k = np.split(x @ W_DKV.T, [len(g)], axis=-1)  # (B, T, d_c), (B, T, d_R)
    c = g * a * (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5
    k_R = rope(k[:, :, None], positions)[:, :, 0]  # (B, T, d_R)
    return np.concatenate([c, k_R], axis=-1)
    ### END SOLUTION


# %% [markdown]
# ## mla.2 · Every head's keys, made again
#
# The naive form. From the latents, $W_{UKV}$ makes keys and values of all heads; then
# they attend as heads always have:
#
# $$
# [k^C_i;\ v_i] = c\,W_{UKV,i}^\top, \qquad
# P_i = \mathrm{softmax}\big(\alpha\,(q^C_i\,k_i^{C\top} + q^R_i\,k^{R\top})\big),
# \qquad o_i = P_i\,v_i .
# $$
#
# The rows of $W_{UKV}$ lie head by head: $d_h$ for the key of the first head, $d_v$ for
# its value, then the second head's. The two parts of a score are one product of queries
# and keys of $d_h + d_R$ numbers, so they have one scale. The T queries are the last T
# of the S positions. The grader hands in a right `causal_weights(scores)`, which takes
# (B, N_h, T, S).


# %%
# exercise: mla.2
# needs: lm.2
def naive_forward(q_C, q_R, kept, W_UKV, alpha):
    """Attend with keys and values of each head.

    q_C (B, T, N_h, d_h), q_R (B, T, N_h, d_R), kept (B, S, d_c+d_R),
    W_UKV (N_h*(d_h+d_v), d_c) -> o (B, T, N_h, d_v), P (B, N_h, T, S).
    """
    ### BEGIN SOLUTION
    (B, S, _), (N_h, d_h) = kept.shape, q_C.shape[2:]
    c, k_R = np.split(kept, [W_UKV.shape[1]], axis=-1)  # (B, S, d_c), (B, S, d_R)
    kv = (c @ W_UKV.T).reshape(B, S, N_h, -1)  # (B, S, N_h, d_h+d_v)
    k_C, v = np.split(kv, [d_h], axis=-1)
    content = np.einsum("bthd,bshd->bhts", q_C, k_C)
    position = np.einsum("bthr,bsr->bhts", q_R, k_R)
    P = causal_weights(alpha * (content + position))  # (B, N_h, T, S)
    return np.einsum("bhts,bshv->bthv", P, v), P
    ### END SOLUTION


# %% [markdown]
# ## mla.3 · The keys that are never made
#
# To write one token, the naive form makes the keys and values of the whole text. With
# $W_{UKV,i} = [W_{UK,i};\ W_{UV,i}]$, brackets move:
# $q^C_i\,(c\,W_{UK,i}^\top)^\top = (q^C_i\,W_{UK,i})\,c^\top$. So
#
# $$
# \tilde q_i = q^C_i\,W_{UK,i}, \quad
# P_i = \mathrm{softmax}\big(\alpha\,(\tilde q_i\,c^\top + q^R_i\,k^{R\top})\big), \quad
# \tilde o_i = P_i\,c, \quad o_i = \tilde o_i\,W_{UV,i}^\top .
# $$
#
# The same `o` and `P`, and no key or value of any head is ever made. The last case
# holds you to it: its latents are float32, and so large that $c\,W_{UK,i}^\top$ and
# $c\,W_{UV,i}^\top$ overflow. With the brackets moved, nothing does. (In float64
# nothing does either way, but then the keys of the whole text are there again.)


# %%
# exercise: mla.3
# needs: lm.2
def absorbed_forward(q_C, q_R, kept, W_UKV, alpha):
    """Attend to the latents themselves.

    q_C (B, T, N_h, d_h), q_R (B, T, N_h, d_R), kept (B, S, d_c+d_R),
    W_UKV (N_h*(d_h+d_v), d_c) -> o (B, T, N_h, d_v), P (B, N_h, T, S).
    """
    ### BEGIN SOLUTION
    (N_h, d_h), d_c = q_C.shape[2:], W_UKV.shape[1]
    c, k_R = np.split(kept, [d_c], axis=-1)  # (B, S, d_c), (B, S, d_R)
    W_UK, W_UV = np.split(W_UKV.reshape(N_h, -1, d_c), [d_h], axis=1)
    q_latent = np.einsum("bthd,hdc->bthc", q_C, W_UK)
    content = np.einsum("bthc,bsc->bhts", q_latent, c)
    position = np.einsum("bthr,bsr->bhts", q_R, k_R)
    P = causal_weights(alpha * (content + position))  # (B, N_h, T, S)
    o_latent = np.einsum("bhts,bsc->bthc", P, c)
    return np.einsum("bthc,hvc->bthv", o_latent, W_UV), P
    ### END SOLUTION


# %% [markdown]
# ## mla.4 · One more token
#
# A step of decoding. `cache` holds what was kept of S positions, as mla.1 makes it, but
# only the first `length` of them stand: behind them may lie a draft that was refused
# since. Crop it, append what is to be kept of the T new tokens, and let their queries
# attend, in the absorbed form.
#
# `q` is handed in before its rotation: per head, $d_h$ numbers of content, then the
# $d_R$ that rotate. The new tokens continue the text, so their positions begin where it
# ends. Return `o` and the new cache; the old one stays as it is. The grader hands in
# right versions of `rope(x, positions)`, `latents(x, W_DKV, g, positions)` and
# `absorbed_forward(q_C, q_R, kept, W_UKV, alpha)`.


# %%
# exercise: mla.4
# needs: lm.3, mla.1, mla.3
def decode(cache, length, x, q, W_DKV, g, W_UKV, alpha):
    """Read T more tokens: cache (B, S, d_c+d_R), length ≤ S a number, x (B, T, D).

    q (B, T, N_h, d_h+d_R), W_DKV (d_c+d_R, D), g (d_c,), W_UKV (N_h*(d_h+d_v), d_c)
    -> o (B, T, N_h, d_v), new cache (B, length+T, d_c+d_R).
    """
    ### BEGIN SOLUTION
    positions = np.arange(length, length + x.shape[1])
    new = latents(x, W_DKV, g, positions)  # (B, T, d_c+d_R)
    kept = np.concatenate([cache[:, :length], new], axis=1)
    d_R = len(W_DKV) - len(g)
    q_C, q_R = np.split(q, [q.shape[-1] - d_R], axis=-1)
    o, _ = absorbed_forward(q_C, rope(q_R, positions), kept, W_UKV, alpha)
    return o, kept
    ### END SOLUTION


# %% [markdown]
# ## mla.5 · Stretched by forty
#
# DeepSeek-V3 was trained on texts of 4,096 tokens and learned to read 128K of them
# afterwards, by YaRN with $s = 40$. Pairs that turn often within the old length L are
# left alone, pairs that hardly turn go $s$ times as slowly, and those between are
# blended. With $\theta_j = b^{-2j/d_R}$, exactly $n$ turns within L would be made by
# pair number
#
# $$ j(n) = \frac{d_R\,\ln\!\big(L / (2\pi n)\big)}{2 \ln b} , $$
#
# a fraction as a rule. Rounded outwards, and kept within bounds,
#
# $$
# \mathrm{low} = \max(\lfloor j(n_\text{fast}) \rfloor,\ 0), \qquad
# \mathrm{high} = \min(\lceil j(n_\text{slow}) \rceil,\ d_R - 1) .
# $$
#
# A ramp $\rho_j$ rises in a straight line from 0 at low to 1 at high and is flat
# outside. (Low is less than high in every case.) The new frequencies and the scale of
# the scores are
#
# $$
# \theta'_j = (1 - \rho_j)\,\theta_j + \rho_j\,\theta_j / s, \qquad
# \alpha = \frac{m^2}{\sqrt{d_h + d_R}}, \qquad m = 0.1 \ln s + 1 .
# $$
#
# $m$ belongs to queries and to keys, hence the square. And $\alpha$ is one for the
# whole score: it scales the content too, which does not rotate.


# %%
# exercise: mla.5
def yarn(d_h, d_R, s, L, b=10000.0, n_fast=32, n_slow=1):
    """Frequencies (d_R/2,) and the scale alpha, for a context s times as long as L."""
    ### BEGIN SOLUTION
    j = np.arange(d_R // 2)
    theta = b ** (-2 * j / d_R)  # (d_R/2,)

    def pair(n):
        return d_R * np.log(L / (2 * np.pi * n)) / (2 * np.log(b))

    low = max(np.floor(pair(n_fast)), 0)
    high = min(np.ceil(pair(n_slow)), d_R - 1)
    ramp = np.clip((j - low) / (high - low), 0, 1)  # (d_R/2,)
    m = 0.1 * np.log(s) + 1
    return theta * (1 - ramp) + theta / s * ramp, m**2 * (d_h + d_R) ** -0.5
    ### END SOLUTION


# %% [markdown]
# ## mla.6 · One key, many heads
#
# The naive form backwards. `do` arrives at the heads' outputs; `P` is what the forward
# pass had as weights, so no mask is needed. Keys and values were not saved: make them
# again, which is what DeepSeek does to save memory. Four gradients leave. `dkept` is
# that of latent and rotated key side by side, as they are kept; that key served every
# head.
#
# The grader hands in a right `softmax_backward(dP, P)`.


# %%
# exercise: mla.6
# needs: lm.7
def naive_backward(do, q_C, q_R, kept, W_UKV, P, alpha):
    """Gradients of mla.2: do (B, T, N_h, d_v), P (B, N_h, T, S), the rest as there.

    -> dq_C, dq_R, dkept, dW_UKV in the shapes of q_C, q_R, kept, W_UKV.
    """
    ### BEGIN SOLUTION
    (B, S, _), (N_h, d_h) = kept.shape, q_C.shape[2:]
    c, k_R = np.split(kept, [W_UKV.shape[1]], axis=-1)  # (B, S, d_c), (B, S, d_R)
    kv = (c @ W_UKV.T).reshape(B, S, N_h, -1)  # (B, S, N_h, d_h+d_v)
    k_C, v = np.split(kv, [d_h], axis=-1)
    dv = np.einsum("bhts,bthv->bshv", P, do)
    dP = np.einsum("bthv,bshv->bhts", do, v)
    dS = alpha * softmax_backward(dP, P)  # (B, N_h, T, S)
    dq_C = np.einsum("bhts,bshd->bthd", dS, k_C)
    dq_R = np.einsum("bhts,bsr->bthr", dS, k_R)
    dk_C = np.einsum("bhts,bthd->bshd", dS, q_C)
    dk_R = np.einsum("bhts,bthr->bsr", dS, q_R)
    dkv = np.concatenate([dk_C, dv], axis=-1).reshape(B, S, -1)
    dW_UKV = np.einsum("bso,bsc->oc", dkv, c)
    return dq_C, dq_R, np.concatenate([dkv @ W_UKV, dk_R], axis=-1), dW_UKV
    ### END SOLUTION


# %% [markdown]
# ## mla.7 · One latent, two parts
#
# The same four gradients by the other way. Seen from its core, the absorbed form is
# attention with one key head: the queries are $[\tilde q_i;\ q^R_i]$, the one key of a
# token is all that is kept of it, and its one value is the latent again. You have
# differentiated that, in lm.8. The grader hands in a right
# `attention_backward(do, q, k, v, P, alpha)` with `do`, `q` (B, N_h, T, ·), `k`, `v`
# (B, S, ·), which returns `dq, dk, dv`.
#
# What is left is in front of the core and behind it: how $W_{UK}$ made the queries, how
# $W_{UV}$ made the outputs, and that the latent played two parts.


# %%
# exercise: mla.7
# needs: lm.8
def absorbed_backward(do, q_C, q_R, kept, W_UKV, P, alpha):
    """Gradients of mla.3: do (B, T, N_h, d_v), P (B, N_h, T, S), the rest as there.

    -> dq_C, dq_R, dkept, dW_UKV in the shapes of q_C, q_R, kept, W_UKV.
    """
    ### BEGIN SOLUTION
    (N_h, d_h), d_c = q_C.shape[2:], W_UKV.shape[1]
    c = kept[..., :d_c]  # (B, S, d_c)
    W_UK, W_UV = np.split(W_UKV.reshape(N_h, -1, d_c), [d_h], axis=1)
    q_latent = np.einsum("bthd,hdc->bhtc", q_C, W_UK)
    o_latent = np.einsum("bhts,bsc->bhtc", P, c)
    do_latent = np.einsum("bthv,hvc->bhtc", do, W_UV)
    q = np.concatenate([q_latent, q_R.swapaxes(1, 2)], axis=-1)
    dq, dkept, dc = attention_backward(do_latent, q, kept, c, P, alpha)
    dkept[..., :d_c] += dc
    dq_latent, dq_R = np.split(dq.swapaxes(1, 2), [d_c], axis=-1)  # (B, T, N_h, ·)
    dq_C = np.einsum("bthc,hdc->bthd", dq_latent, W_UK)
    dW_UK = np.einsum("bthc,bthd->hdc", dq_latent, q_C)
    dW_UV = np.einsum("bthv,bhtc->hvc", do, o_latent)
    dW_UKV = np.concatenate([dW_UK, dW_UV], axis=1).reshape(W_UKV.shape)
    return dq_C, dq_R, dkept, dW_UKV
    ### END SOLUTION


# %% [markdown]
# ## mla.8 · The layer, by you
#
# All of it, forwards and backwards, by **your own** functions; the grader runs them
# together. The queries are given; they have a latent of their own, which nobody keeps:
#
# $$
# c^Q = \mathrm{norm}(x\,W_{DQ}^\top;\ g_Q), \qquad
# [q^C_i;\ q^R_i] = c^Q\,W_{UQ,i}^\top, \qquad q^R_i \text{ rotated.}
# $$
#
# Go on from there: what is kept, the heads' outputs, `y` through $W_O$; then backwards
# from `dy`. The layer returns its own answer: the stream is added elsewhere. Latent and
# key must go back through norm and rotation, queries through rotation and norm, and `x`
# was read twice. `absorb` says in which form to attend, both ways. The grader hands in
# a right `rope` and a right `rmsnorm_backward(dy, x, g, eps)`, which returns `dx, dg`.
# For the products, write a small helper, as in lm.11.


# %%
# exercise: mla.8
# needs: lm.3, lm.6
# assembles: mla.1, mla.2, mla.3, mla.6, mla.7
def layer(params, x, dy, positions, N_h, alpha, absorb=False, eps=1e-6):
    """Output and gradients of a layer: x, dy (B, T, D), positions (T,).

    params: W_DQ (d_cq, D), g_Q (d_cq,), W_UQ (N_h*(d_h+d_R), d_cq),
    W_DKV (d_c+d_R, D), g_KV (d_c,), W_UKV (N_h*(d_h+d_v), d_c), W_O (D, N_h*d_v).
    Returns y, dx, grads; grads has the names and shapes of params.
    """
    p, (B, T) = params, x.shape[:2]
    d_c = len(p["g_KV"])
    d_R = len(p["W_DKV"]) - d_c
    attend, attend_backward = naive_forward, naive_backward
    if absorb:
        attend, attend_backward = absorbed_forward, absorbed_backward
    a_Q = x @ p["W_DQ"].T  # (B, T, d_cq)
    c_Q = p["g_Q"] * a_Q * (np.mean(a_Q * a_Q, axis=-1, keepdims=True) + eps) ** -0.5
    q = (c_Q @ p["W_UQ"].T).reshape(B, T, N_h, -1)  # (B, T, N_h, d_h+d_R)
    q_C, q_R = q[..., :-d_R], rope(q[..., -d_R:], positions)
    grads = {}
    ### BEGIN SOLUTION

    def linear_backward(name, dy, x):
        grads[name] = np.einsum("bto,bti->oi", dy, x)
        return dy @ p[name]

    kept = latents(x, p["W_DKV"], p["g_KV"], positions, eps)  # (B, T, d_c+d_R)
    o, P = attend(q_C, q_R, kept, p["W_UKV"], alpha)
    o = o.reshape(B, T, -1)  # (B, T, N_h*d_v)
    y = o @ p["W_O"].T

    do = linear_backward("W_O", dy, o).reshape(B, T, N_h, -1)
    dq_C, dq_R, dkept, grads["W_UKV"] = attend_backward(
        do, q_C, q_R, kept, p["W_UKV"], P, alpha
    )
    dq = np.concatenate([dq_C, rope(dq_R, -positions)], axis=-1).reshape(B, T, -1)
    dc_Q = linear_backward("W_UQ", dq, c_Q)
    da_Q, grads["g_Q"] = rmsnorm_backward(dc_Q, a_Q, p["g_Q"], eps)
    dx = linear_backward("W_DQ", da_Q, x)
    a = x @ p["W_DKV"][:d_c].T  # what the latent's norm read
    da, grads["g_KV"] = rmsnorm_backward(dkept[..., :d_c], a, p["g_KV"], eps)
    dk = rope(dkept[:, :, None, d_c:], -positions)[:, :, 0]  # (B, T, d_R)
    dx = dx + linear_backward("W_DKV", np.concatenate([da, dk], axis=-1), x)
    return y, dx, grads
    ### END SOLUTION


# %% [markdown]
# When the two forms have passed, let them run. Below, 32 heads of 64 have 2,000 tokens
# behind them and attend for one more, by your functions. **Predict** first: which form
# is faster, and how many times? A score is a sum of 96 products in the naive form and
# of 288 in the absorbed one.
#
# Then the bill of DeepSeek-V3's shape, 61 layers of 128 heads, two bytes a number. How
# many groups of keys and values could grouped-query attention afford for the same?

# %%
from time import perf_counter

from grader import passed

from minidsv3.primitives.numpy_ref import softmax


def causal_weights(scores):
    """What mla.2 and mla.3 are handed while they are judged."""
    T, S = scores.shape[-2:]
    return softmax(np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf))


def trial(S=2000, N_h=32, d_h=64, d_R=32, d_c=256):
    """Read the last of S tokens, in both forms."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    kept, W_UKV = normal(1, S, d_c + d_R), normal(N_h * 2 * d_h, d_c) * d_c**-0.5
    q_C, q_R = normal(1, 1, N_h, d_h), normal(1, 1, N_h, d_R)
    found = []
    for form in (naive_forward, absorbed_forward):
        times = []
        for _ in range(3):
            began = perf_counter()
            o, _ = form(q_C, q_R, kept, W_UKV, (d_h + d_R) ** -0.5)
            times.append(perf_counter() - began)
        found.append(o)
        print(f"{form.__name__:17} {1e3 * min(times):7.1f} ms for one more token")
    print(f"their answers differ by {abs(found[0] - found[1]).max():.0e}\n")


def bill(layers=61, N_h=128, d_h=128, d_R=64, d_c=512):
    """What a token costs to remember."""
    rows = {"MHA": 2 * N_h * d_h, "GQA, 8 groups": 2 * 8 * d_h, "MQA": 2 * d_h}
    rows |= {"MLA, expanded": N_h * (d_h + d_R + d_h), "MLA": d_c + d_R}
    for name, numbers in rows.items():
        print(f"{name:15} {2 * layers * numbers:11,} bytes a token")


if passed("mla.2") and passed("mla.3"):
    trial()
    bill()

# %% [markdown]
# ## How far you are

# %%
check_all()
