# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 5 · A mini DeepSeek-V3
#
# Two functions, and both run on *your* answers to the chapters before: a block, and the
# loss of the whole model. Forwards only; each part has its way back already.
#
# `# assembles: mla.1, …` on top of a cell says that your own functions are handed in,
# read from your saved notebooks. The exercise waits until they have passed.
#
# `c` is a config with the words of DeepSeek's `config.json`; the two exercises need
# `num_attention_heads`, `first_k_dense_replace`, `num_experts_per_tok`, `n_group`,
# `topk_group` and `routed_scaling_factor`. So `c.n_group` is the number of groups, and
# the last of them is what the gates of a token sum to. B counts sequences, T positions,
# D the numbers of the stream, E experts, V tokens, L blocks, and n modules behind them.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## mini.1 · A block: two additions
#
# All 61 layers of DeepSeek-V3 are this:
#
# $$
# x \leftarrow x + \mathrm{MLA}(\mathrm{norm}(x;\, g_1)), \qquad
# x \leftarrow x + \mathrm{FFN}(\mathrm{norm}(x;\, g_2)) .
# $$
#
# The parts read a normalised copy; nothing ever normalises the stream itself. In the
# first `first_k_dense_replace` layers, counted from 0, FFN is one dense SwiGLU. In all
# others it is the shared expert plus the routed ones. Decide it by the layer's number:
# `p` holds the parameters of both.
#
# Return the new stream and the layer's balance loss, as moe.6 has it with $\alpha = 1$.
# A dense layer has nothing to balance: 0.
#
# Given are the norm, a SwiGLU, and the queries with the scale of their scores,
# $1 / \sqrt{d_h + d_R}$, as in mla.8. Attend in the naive form. One trap is DeepSeek's
# own: `eps` is that of $g_1$ and $g_2$. The norms of the latents, the queries' and the
# one inside `latents`, keep 1e-6, whatever `eps` is.


# %%
# exercise: mini.1
# needs: lm.3
# assembles: mla.1, mla.2, moe.1, moe.2, moe.3, moe.6
def block(p, x, layer, c, eps=1e-6):
    """The stream behind a block, and its balance loss: x (B, T, D), layer from 0.

    p: norm_1, norm_2 (D,); W_DQ, g_Q, W_UQ, W_DKV, g_KV, W_UKV, W_O as in mla.8;
    F_gate, F_up (I, D), F_down (D, I) of the dense feed-forward; W, b, W_gate, W_up,
    W_down, S_gate, S_up, S_down as in moe.8. -> x (B, T, D), a number.
    """
    (B, T, D), N_h, E = x.shape, c.num_attention_heads, len(p["W"])
    d_R, positions = len(p["W_DKV"]) - len(p["g_KV"]), np.arange(T)

    def norm(x, g, eps=eps):
        return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5

    def swiglu(u, W_gate, W_up, W_down):
        a, b = u @ W_gate.T, u @ W_up.T
        return (a / (1 + np.exp(-a)) * b) @ W_down.T

    def queries(u):
        """The q_C (B, T, N_h, d_h), q_R (B, T, N_h, d_R) and the scale."""
        q = norm(u @ p["W_DQ"].T, p["g_Q"], 1e-6) @ p["W_UQ"].T
        q_C, q_R = np.split(q.reshape(B, T, N_h, -1), [-d_R], axis=-1)
        return q_C, rope(q_R, positions), (q.shape[-1] / N_h) ** -0.5

    ### BEGIN SOLUTION
    u = norm(x, p["norm_1"])
    q_C, q_R, scale = queries(u)
    kept = latents(u, p["W_DKV"], p["g_KV"], positions)  # (B, T, d_c+d_R)
    o, _ = naive_forward(q_C, q_R, kept, p["W_UKV"], scale)  # (B, T, N_h, d_v)
    x = x + o.reshape(B, T, -1) @ p["W_O"].T

    u = norm(x, p["norm_2"])
    if layer < c.first_k_dense_replace:
        return x + swiglu(u, p["F_gate"], p["F_up"], p["F_down"]), 0.0
    rows, K = u.reshape(B * T, D), c.num_experts_per_tok

    def ours(choice):
        return choose(choice, K, c.n_group, c.topk_group)

    def ffn(i, rows):
        return swiglu(rows, p["W_gate"][i], p["W_up"][i], p["W_down"][i])

    experts, gates, s = route(rows, p["W"], p["b"], c.routed_scaling_factor, ours)
    y = mix(rows, experts, gates, ffn, E).reshape(B, T, D)
    y = y + swiglu(u, p["S_gate"], p["S_up"], p["S_down"])
    load, _ = balance(s.reshape(B, T, E), K, 1.0)
    return x + y, load
    ### END SOLUTION


# %% [markdown]
# ## mini.2 · Three losses, one number
#
# The whole model, from tokens to the number that training lowers. `ids` are
# $t_1 \dots t_{T+1}$. L blocks read the first T; the final norm makes $h^0$, and the
# head says from it what comes next:
#
# $$
# x = \mathrm{Emb}(t_{1:T}), \qquad
# h^0 = \mathrm{norm}(\mathrm{Block}_{L-1}( \dots \mathrm{Block}_0(x))), \qquad
# \mathcal L_\text{main} = \mathrm{nats}(h^0,\ t_{2:T+1}) .
# $$
#
# Module $k = 1 \dots n$ reads $h^{k-1}$ and the embedding of $t_{i+k}$ through its
# entrance. Behind it stands a block of the module's own, with experts: it is number
# $L + k - 1$ of the model, counted from 0. Then comes the module's own last norm, which
# makes $h^k$. Head and embedding are the model's:
#
# $$
# h^k = \mathrm{norm}_k(\mathrm{Block}_{L+k-1}(\mathrm{entrance}(h^{k-1}, e))), \qquad
# \mathcal L_\text{MTP}^k = \mathrm{nats}(h^k,\ t_{k+2:T+1}) .
# $$
#
# Every layer of experts has a balance loss, the modules' too, and they add up:
#
# $$
# \mathcal L = \mathcal L_\text{main}
#   + \lambda\, \frac1n \sum_{k=1}^{n} \mathcal L_\text{MTP}^k
#   + \alpha \sum_\text{layers} \mathcal L_\text{bal} .
# $$
#
# Return four numbers: the main loss, the *mean* of the modules' losses, the *sum* of
# the balance losses, and $\mathcal L$.


# %%
# exercise: mini.2
# assembles: lm.1, mtp.1, mtp.2, mini.1
def losses(p, ids, c, lam, alpha, eps=1e-6):
    """The losses main, mtp, balance and total: ids (B, T+1), lam and alpha numbers.

    p: embed (V, D), blocks (a list of L dictionaries, each a p of mini.1), norm (D,),
    head (V, D), modules (a list of n dictionaries: g_h, g_e (D,), M (D, 2*D) for the
    entrance, block, which is a p of mini.1, and norm (D,)).
    """

    def norm(x, g):
        return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5

    def nats(h, targets):
        """What the head pays on average: h (B, S, D), targets (B, S)."""
        P = softmax(h @ p["head"].T)  # (B, S, V)
        return -np.mean(np.log(np.take_along_axis(P, targets[..., None], -1)))

    ### BEGIN SOLUTION
    x = p["embed"][ids[:, :-1]]  # (B, T, D)
    L, loads, further = len(p["blocks"]), [], []
    for layer, own in enumerate(p["blocks"]):
        x, load = block(own, x, layer, c, eps)
        loads.append(load)
    h = norm(x, p["norm"])
    main = nats(h, ids[:, 1:])
    for layer, own in enumerate(p["modules"], start=L):
        k = layer - L + 1
        h, tokens, targets = shifted(h, ids, k)
        e = p["embed"][tokens]  # (B, T-k, D)
        x = entrance(h, e, own["g_h"], own["g_e"], own["M"], eps)
        x, load = block(own["block"], x, layer, c, eps)
        loads.append(load)
        h = norm(x, own["norm"])
        further.append(nats(h, targets))
    mtp, load = np.mean(further), sum(loads)
    return main, mtp, load, main + lam * mtp + alpha * load
    ### END SOLUTION


# %% [markdown]
# When that has passed, look at the three losses of `MINI`, the book's model, before its
# first step: by the library, on a batch of Python's standard library. **Predict** all
# three. There are 257 tokens, and a model that knows nothing gives each the same
# chance. `MINI` has two blocks with experts, and one module.
#
# In the second row the routers favour 16 of 256 experts, two in each group; in the
# third row it is the biases that do. Two columns measure balance: that loss, and the
# MaxVio of the fullest layer. Which of them notices what?

# %%
from grader import passed

from minidsv3 import corpus, parameters
from minidsv3.config import MINI, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.moe.numpy_ref import max_violation


def trial(lam=0.3, alpha=1e-4):
    """Losses before the first step: a fresh model, and two that lean."""
    ids = corpus.batch(corpus.load_corpus().train, 4, 64, seed=0, step=1)
    recipe = TrainConfig(mtp_weight=lam, balance_weight=alpha)
    print("                    main     MTP  balance   total  MaxVio")
    for kind in ("fresh", "leaning routers", "leaning biases"):
        params = parameters.initialise(MINI, seed=0, std=0.02)
        for name, w in params.items():
            if kind == "leaning routers" and name.endswith("mlp.gate.weight"):
                w[::16] *= 30
            if kind == "leaning biases" and name.endswith("e_score_correction_bias"):
                w[::16] += 1
        found, _, stats = model.loss_and_grads(params, MINI, ids, recipe)
        row = "".join(f"{value:8.3f}" for value in found.values())
        worst = max(map(max_violation, stats["load"].values()))
        print(f"{kind:16}{row}{worst:8.2f}")


if passed("mini.2"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
