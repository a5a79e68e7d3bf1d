# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 6 · From NumPy to PyTorch
#
# Nine pieces of the PyTorch model, three of each mechanism. The mathematics is that of
# chapters 2 to 4. What is new is what PyTorch does unasked: it widens and narrows
# numbers, registers whatever you assign, writes down every operation for the way back,
# and has its own idea of a mask, of an eps and of a scale.
#
# Your answers receive tensors. Their results are held against the NumPy reference, and
# so are the gradients that autograd finds of them; on the first case `gradcheck` nudges
# each number besides. Where a class is asked for, the grader makes one, loads weights
# into it by name, and calls it.
#
# Axes: B sequences, H or N_h heads, T positions, D numbers of a state, V tokens, N
# tokens of a batch, E experts, I their inner width, K experts that a token visits.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from grader import check, check_all, hint
from torch import nn

# %% [markdown]
# ## mla.torch.1 · Pairs, in real numbers
#
# DeepSeek turns the pairs $(x_{2j}, x_{2j+1})$:
#
# $$
# y_{2j} = x_{2j} \cos\varphi_j - x_{2j+1} \sin\varphi_j, \qquad
# y_{2j+1} = x_{2j} \sin\varphi_j + x_{2j+1} \cos\varphi_j .
# $$
#
# `rotation` holds the cosines, then the sines, (2, T, d_R/2). It comes in float32 at
# least, whatever `x` is: in bfloat16 position 1000 is position 1000 no more. A product
# of bfloat16 and float32 is float32 in PyTorch, so what comes out must be brought back
# to the dtype of `x`, once, at the end; float64 stays float64 all the way. The pairs
# stay where they were: neighbours.
#
# `x` may be a view of something that others still read.


# %%
# exercise: mla.torch.1
# solution: minidsv3.primitives.torch_port.rotate
def rotate(x, rotation):
    """Turn each pair: x (B, H, T, d_R), rotation (2, T, d_R/2).

    -> x's shape and dtype.
    """
    return ...


# %% [markdown]
# ## mla.torch.2 · Absorbed, by torch's own attention
#
# mla.3 once more, with heads in front of positions, as PyTorch likes them: W_UK goes
# into the query, W_UV behind the sum, and what stands between is attention with *one*
# key for all heads,
#
# $$
# o_h = \mathrm{softmax}\big(\alpha\, [\,q^C_h W^{UK}_h ;\, q^R_h\,]\,
# [\,c ;\, k^R\,]^\top\big)\; c\; (W^{UV}_h)^\top .
# $$
#
# The rows of `W_UKV` (N_h·(d_h + d_v), d_c) lie head by head, the key's d_h first.
# `kept` (B, S, d_c + d_R) is the cache: the latents, and behind each its rotated key.
# The T queries are the *last* T of the S positions, and see nothing behind their own.
#
# `F.scaled_dot_product_attention` is allowed. It wants to be told three things that it
# would otherwise guess, and guess wrong here. No head may get keys or values of its
# own: in one case they would not fit into a float32.


# %%
# exercise: mla.torch.2
def attend_absorbed(q_C, q_R, kept, W_UKV, scale):
    """Attend to the latents: q_C (B, N_h, T, d_h), q_R (B, N_h, T, d_R).

    kept (B, S, d_c + d_R), W_UKV (N_h*(d_h + d_v), d_c) -> (B, N_h, T, d_v).
    """
    ### BEGIN SOLUTION
    (_, N_h, T, d_h), d_c = q_C.shape, W_UKV.shape[1]
    W = W_UKV.unflatten(0, (N_h, -1))  # (N_h, d_h + d_v, d_c)
    W_UK, W_UV = W[:, :d_h], W[:, d_h:]
    q = torch.cat([q_C @ W_UK, q_R], dim=-1)  # (B, N_h, T, d_c + d_R)
    k = kept[:, None].expand(-1, N_h, -1, -1)  # (B, N_h, S, d_c + d_R), no copy
    v = k[..., :d_c]  # (B, N_h, S, d_c)
    S = k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)  # (T, S)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return o @ W_UV.mT
    ### END SOLUTION


# %% [markdown]
# ## mla.torch.3 · The names are part of it
#
# A whole layer, in the naive form, without cache and without YaRN, whose state dict has
# DeepSeek's names: those that the class below lists, each with `.weight` behind it. The
# grader loads the NumPy dict into it.
#
# These seven and no other: nothing in DeepSeek-V3 has a bias. Both norms have an eps of
# 1e-6; `nn.RMSNorm` takes another one if it is not told. They normalise the latents,
# not the rotated key. Each head's content is d_h numbers, then come d_R that turn; the
# scores are divided by $\sqrt{d_h + d_R}$.
#
# The grader hands in a right `rotate`, that of mla.torch.1. The positions are those of
# a whole text, so that T queries meet T keys.


# %%
# exercise: mla.torch.3
# needs: mla.torch.1
class LatentAttention(nn.Module):
    """Multi-head latent attention of one block. Its weights, by name:

    q_a_proj (d_cq, D), q_a_layernorm (d_cq,), q_b_proj (N_h*(d_h + d_R), d_cq),
    kv_a_proj_with_mqa (d_c + d_R, D), kv_a_layernorm (d_c,),
    kv_b_proj (N_h*(d_h + d_v), d_c), o_proj (D, N_h*d_v).
    """

    def __init__(self, D, N_h, d_h, d_R, d_v, d_c, d_cq):
        super().__init__()
        self.N_h, self.d_h, self.d_R, self.d_v, self.d_c = N_h, d_h, d_R, d_v, d_c
        ### BEGIN SOLUTION
        self.q_a_proj = nn.Linear(D, d_cq, bias=False)
        self.q_a_layernorm = nn.RMSNorm(d_cq, eps=1e-6)
        self.q_b_proj = nn.Linear(d_cq, N_h * (d_h + d_R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, d_c + d_R, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(d_c, eps=1e-6)
        self.kv_b_proj = nn.Linear(d_c, N_h * (d_h + d_v), bias=False)
        self.o_proj = nn.Linear(N_h * d_v, D, bias=False)
        ### END SOLUTION

    def forward(self, x, rotation):
        """Shapes: x (B, T, D), rotation (2, T, d_R/2) -> (B, T, D)."""
        ### BEGIN SOLUTION
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.N_h, -1)).transpose(1, 2)  # (B, N_h, T, d_h + d_R)
        q_C, q_R = q.split([self.d_h, self.d_R], dim=-1)
        c, k_R = self.kv_a_proj_with_mqa(x).split([self.d_c, self.d_R], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c))
        kv = kv.unflatten(-1, (self.N_h, -1)).transpose(1, 2)  # (B, N_h, T, d_h + d_v)
        k_C, v = kv.split([self.d_h, self.d_v], dim=-1)
        k_R = rotate(k_R[:, None], rotation).expand(-1, self.N_h, -1, -1)
        q = torch.cat([q_C, rotate(q_R, rotation)], dim=-1)
        k = torch.cat([k_C, k_R], dim=-1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))
        ### END SOLUTION


# %% [markdown]
# ## moe.torch.1 · The one place that stays exact
#
# Training runs under `torch.autocast`: inside it, every product of matrices is made in
# bfloat16, three digits. The router must not be. With three digits many affinities are
# equal that were not, and a good part of the tokens go elsewhere.
#
# Write moe.1 and moe.2 in one function:
#
# $$
# s = \sigma(u W^\top), \qquad
# g_i = \lambda\, \frac{s_i}{\sum_{j \in \mathcal T} s_j},
# $$
#
# where $\mathcal T$ are the K best of $s + b$ in the `topk_group` best of `n_group`
# groups of neighbours, and a group is as good as the sum of its two best. If all groups
# are open, a group may be a single expert; else it has at least two. No two numbers are
# equal, any may be negative.
#
# Whatever is on around it, compute in float32 *at least*: `u` in bfloat16 is widened
# first, `u` in float64 stays float64. Gradients flow to `u` and `W` through the gates
# and the affinities, and nothing flows to `b`.


# %%
# exercise: moe.torch.1
def route(u, W, b, K, n_group, topk_group, lam):
    """Experts, gates and affinities: u (N, D), W (E, D), b (E,).

    -> experts (N, K), the best first, gates (N, K), s (N, E).
    """
    ### BEGIN SOLUTION
    wide = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        s = (u.to(wide) @ W.to(wide).T).sigmoid()  # (N, E)
        choice = s.detach() + b.detach()
        if topk_group < n_group:
            grouped = choice.unflatten(1, (n_group, -1))  # (N, n_group, E/n_group)
            score = grouped.topk(2, dim=-1).values.sum(dim=-1)  # (N, n_group)
            best = score.topk(topk_group, dim=1).indices
            closed = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)
            choice = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
        experts = choice.topk(K, dim=1).indices  # (N, K)
        chosen = s.gather(1, experts)
        gates = lam * chosen / chosen.sum(dim=1, keepdim=True)
    return experts, gates, s
    ### END SOLUTION


# %% [markdown]
# ## moe.torch.2 · A backward of your own
#
# Left to itself, autograd keeps every intermediate result of every expert. You know
# better: an expert's answers need not be kept at all. A gate hears how far the answer
# that it weighs points along `dy`, and
#
# $$
# dg = \langle dy,\; W_{\text{down}} h \rangle = \langle dy\, W_{\text{down}},\; h
# \rangle .
# $$
#
# On the right the answer does not occur, and $dy\,W_{\text{down}}$ you need anyway:
# times the gate it is $dh$. The gate then multiplies I numbers of a row instead of D.
#
# `forward` is given. `segments` lists the experts that were asked: each is (i, t, k),
# the expert's number, its n tokens, and at which rank each of them has it. Of each, `a`
# and `b` were kept, in that order. Write the `backward` of
# $y_t = \sum_k g_{t,k}\,\mathrm{FFN}_{i(t,k)}(u_t)$ with
# $h = \mathrm{silu}(a) \odot b$, and
# $\mathrm{silu}'(a) = \sigma(a)\,(1 + a\,(1 - \sigma(a)))$.
#
# Six products of matrices an expert, not a seventh: in one case an answer is too large
# for a float32, and what you return must not be. PyTorch wants one gradient for each
# argument of `forward`, and None for what has none.


# %%
# exercise: moe.torch.2
class Experts(torch.autograd.Function):
    """The routed experts: u (N, D), gates (N, K), W_gate, W_up (E, I, D), W_down."""

    @staticmethod
    def forward(ctx, u, gates, W_gate, W_up, W_down, segments):
        """Shapes: W_down (E, D, I); segments [(i, t (n,), k (n,)), …] -> y (N, D)."""
        y, kept = torch.zeros_like(u), []
        for i, t, k in segments:
            a, b = u[t] @ W_gate[i].T, u[t] @ W_up[i].T  # (n, I)
            y[t] += gates[t, k, None] * ((F.silu(a) * b) @ W_down[i].T)
            kept += [a, b]
        ctx.save_for_backward(u, gates, W_gate, W_up, W_down, *kept)
        ctx.segments = segments
        return y

    @staticmethod
    def backward(ctx, dy):
        """Gradients of all that went into forward: dy (N, D)."""
        u, gates, W_gate, W_up, W_down, *kept = ctx.saved_tensors
        ### BEGIN SOLUTION
        du, dgates = torch.zeros_like(u), torch.zeros_like(gates)
        dW_gate, dW_up = torch.zeros_like(W_gate), torch.zeros_like(W_up)
        dW_down = torch.zeros_like(W_down)
        for i, t, k in ctx.segments:
            a, b, *kept = kept
            sigma = a.sigmoid()
            h = a * sigma * b  # (n, I)
            g = gates[t, k, None]  # (n, 1)
            dh = dy[t] @ W_down[i]  # (n, I), not yet weighed
            dgates[t, k] = (dh * h).sum(dim=1)
            dW_down[i] = dy[t].T @ (g * h)
            dh = g * dh
            da = dh * b * sigma * (1 + a * (1 - sigma))
            db = dh * a * sigma
            dW_gate[i], dW_up[i] = da.T @ u[t], db.T @ u[t]
            du[t] += da @ W_gate[i] + db @ W_up[i]
        return du, dgates, dW_gate, dW_up, dW_down, None
        ### END SOLUTION


# %% [markdown]
# ## moe.torch.3 · Saved, moved, never trained
#
# A router's biases are no weights: no gradient may reach them, no optimiser may see
# them, and yet they belong into the checkpoint, as `e_score_correction_bias`, and onto
# whichever device the model goes to. PyTorch has a word for such a tensor. They begin
# at zero.
#
# `update` moves them in place, for whoever holds the tensor must see it: by $\gamma$
# up where an expert had fewer tokens than the mean over all E, down where it had more,
# not at all where it had just as many. `experts` (N, K) are those that were chosen.
#
# `loss` is the balance loss of moe.6 without $\alpha$, the mean over B sequences of
#
# $$
# \sum_i f_i P_i, \qquad
# f_i = \frac{E}{K\,T} \sum_t \mathbb 1[\, s_{t,i} \text{ among the K best of } s_t],
# \qquad
# P_i = \frac1T \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}} .
# $$
#
# $f$ is counted, without biases, and a count has no gradient. $P$ has one, above the
# fraction and below it. No two affinities of a token are equal.


# %%
# exercise: moe.torch.3
class Balance(nn.Module):
    """The biases of E experts, the rule that moves them, and the balance loss."""

    def __init__(self, E):
        super().__init__()
        ### BEGIN SOLUTION
        self.register_buffer("e_score_correction_bias", torch.zeros(E))
        ### END SOLUTION

    def update(self, experts, gamma):
        """Move the biases, in place: experts (N, K), gamma a number."""
        ### BEGIN SOLUTION
        b = self.e_score_correction_bias
        counts = experts.flatten().bincount(minlength=len(b)).to(b.dtype)  # (E,)
        b += gamma * (counts.mean() - counts).sign()
        ### END SOLUTION

    def loss(self, s, K):
        """The balance loss: s (B, T, E) -> a number."""
        ### BEGIN SOLUTION
        _, T, E = s.shape
        best = s.topk(K, dim=-1).indices  # (B, T, K)
        visits = torch.zeros_like(s).scatter(-1, best, 1.0)
        f = E / (K * T) * visits.sum(dim=1)  # (B, E)
        P = (s / s.sum(dim=-1, keepdim=True)).mean(dim=1)  # (B, E)
        return (f * P).sum(dim=1).mean()
        ### END SOLUTION


# %% [markdown]
# ## mtp.torch.1 · Around a block, beside its parts
#
# In the released files the weights of an MTP module and those of its block lie side by
# side: `model.layers.61.eh_proj.weight`, `model.layers.61.self_attn.o_proj.weight`. No
# `block.` stands between them. Embedding and head are the trunk's own: a module has no
# copy of them, neither in memory nor in its state dict.
#
# `block` maps (B, T, D) to (B, T, D) and has named parts, each a module; `embed` maps
# tokens to (B, T, D), `head` states to logits (B, T, V). The module computes
#
# $$
# h' = W\,[\,\mathrm{norm}(e;\, \text{enorm}) ;\, \mathrm{norm}(h;\, \text{hnorm})\,],
# \qquad h^k = \mathrm{norm}(\mathrm{block}(h');\, \text{shared\_head.norm}) ,
# $$
#
# where $e$ are the embeddings of `tokens`, and returns $h^k$ and the head's logits of
# it. Its own weights are `enorm.weight`, `hnorm.weight`, `shared_head.norm.weight`
# (D,) and `eh_proj.weight` (D, 2·D), the embedding's half first. All norms have `eps`.
# Besides these, the state dict holds the parts of the block under their own names, and
# nothing else.
#
# Mind what an assignment does: `self.head = head` registers it.


# %%
# exercise: mtp.torch.1
class MTPModule(nn.Module):
    """One prediction module around a block that is handed in."""

    def __init__(self, D, block, embed, head, eps):
        super().__init__()
        ### BEGIN SOLUTION
        self.enorm, self.hnorm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(D, eps=eps)})
        self.borrowed = block, embed, head  # a tuple registers nothing
        ### END SOLUTION

    def forward(self, h, tokens):
        """Shapes: h (B, T, D), tokens (B, T) -> h (B, T, D), logits (B, T, V)."""
        ### BEGIN SOLUTION
        block, embed, head = self.borrowed
        pair = torch.cat([self.enorm(embed(tokens)), self.hnorm(h)], dim=-1)
        h = self.shared_head["norm"](block(self.eh_proj(pair)))
        return h, head(h)
        ### END SOLUTION


# %% [markdown]
# ## mtp.torch.2 · All depths, one number
#
# The trunk has read $t_1 \dots t_T$ of `ids` (B, T+1), and `h` (B, T, D) are its
# states. Its own loss asks for the next token; depth k hands module k the states of
# depth k − 1, together with the embeddings of tokens k further on, and asks for tokens
# k + 1 further on. A state without its token, or without its target, falls away: depth
# k has T − k places, and its loss is their mean. Altogether
#
# $$
# \mathcal L = \mathcal L_{\text{main}} + \frac{\lambda}{D} \sum_{k=1}^{D}
# \mathcal L_k .
# $$
#
# `modules` lists D modules, `module(h, e)` gives the next states; with an empty list
# there is only the trunk's loss. `embed(ids)` looks up, `head(h)` gives logits, and
# both are the same at every depth. What each depth learns, everything below it hears:
# head, embedding, the modules before it, and the trunk.
#
# `F.cross_entropy` takes logits with the classes on axis 1.


# %%
# exercise: mtp.torch.2
def mtp_loss(h, ids, embed, head, modules, lam):
    """The loss of trunk and modules: h (B, T, D), ids (B, T+1) -> a number."""

    ### BEGIN SOLUTION
    def loss(h, targets):
        return F.cross_entropy(head(h).flatten(0, 1), targets.flatten())

    total = loss(h, ids[:, 1:])
    for k, module in enumerate(modules, start=1):
        h = module(h[:, :-1], embed(ids[:, k:-1]))  # (B, T - k, D)
        total = total + lam / len(modules) * loss(h, ids[:, k + 1 :])
    return total
    ### END SOLUTION


# %% [markdown]
# ## mtp.torch.3 · One head, D + 1 uses, one step
#
# The head was used D + 1 times, and autograd has added up what it is to learn. Now it
# must be clipped once, and moved once. That is easily got wrong: the trunk and every
# module list it among their own parameters.
#
# `trunk` and each of `modules` are `nn.Module`s. They share `embed` and `head`, which
# are the same objects in each. `total` is the loss of all of them. Take one step.
#
# `make(groups)` gives an optimiser, as `torch.optim.SGD(groups, lr=…)` would. A group
# is a dictionary, `{"params": [...], "weight_decay": number}`. Matrices decay by
# `decay`. Vectors, that is norms, do not, and neither does `trunk.embed.weight`.
#
# Gradients of an earlier step may still lie in `.grad`; they must not count. All
# gradients of this step together, each weight's once, have a norm. If it exceeds
# `clip`, all are shrunk alike, so that it is `clip`. Then the optimiser steps.
#
# Some weights may have played no part in `total`; their `.grad` is None, and nothing
# moves them. Return the norm of all gradients as it was before it was clipped.


# %%
# exercise: mtp.torch.3
def one_step(trunk, modules, total, make, decay, clip):
    """Clip and step, every weight once: total a loss, make(groups) -> optimiser.

    Returns the norm of all gradients before clipping.
    """
    ### BEGIN SOLUTION
    weights = list(nn.ModuleList([trunk, *modules]).parameters())  # each once
    matrices = [p for p in weights if p.ndim > 1 and p is not trunk.embed.weight]
    others = [p for p in weights if p.ndim < 2 or p is trunk.embed.weight]
    optimiser = make(
        [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
    )
    optimiser.zero_grad()
    total.backward()
    norm = nn.utils.clip_grad_norm_(weights, clip)
    optimiser.step()
    return norm
    ### END SOLUTION


# %% [markdown]
# When moe.torch.2 has passed, see what it is good for. The same experts, once left to
# autograd and once with your `backward`: how many bytes does each keep between forward
# and backward, weights not counted? PyTorch tells whoever asks, by a hook on every
# tensor that it puts away. **Predict** the ratio first: at 2 experts a token, D = 64
# and I = 32, autograd keeps for each pair of a token and an expert its row of `u`, `a`,
# `b` and what became of them, and the answer. You keep `a` and `b`.

# %%
from grader import passed


def bytes_kept(answer, *tensors):
    """What PyTorch puts away for the way back, each storage once, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors[2:]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = tensor, storage.nbytes()  # held: none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer(*tensors)
    return sum(size for _, size in found.values())


def trial(N=1024, D=64, I=32, E=8, K=2):
    """Who keeps how much."""
    torch.manual_seed(0)
    experts = torch.rand(N, E).topk(K).indices
    segments = [(i, *torch.nonzero(experts == i, as_tuple=True)) for i in range(E)]
    shapes = (N, D), (N, K), (E, I, D), (E, I, D), (E, D, I)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def plain(u, gates, W_gate, W_up, W_down):
        y = torch.zeros_like(u)
        for i, t, k in segments:
            a, b = u[t] @ W_gate[i].T, u[t] @ W_up[i].T
            o = (F.silu(a) * b) @ W_down[i].T
            y = y.index_add(0, t, gates[t, k, None] * o)
        return y

    autograd = bytes_kept(plain, *tensors)
    yours = bytes_kept(lambda *given: Experts.apply(*given, segments), *tensors)
    print(f"autograd  {autograd / N:6.0f} bytes a token")
    print(f"yours     {yours / N:6.0f} bytes a token, {yours / autograd:.0%}")


if passed("moe.torch.2"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
