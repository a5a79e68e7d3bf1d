"""MINI as a whole: a step of training beside torch, decoding beside transformers.

Everything on one machine, in float32, with as many threads (`make bench` sets one). The
two sides take turns, and the best of several turns counts; beside the time on the wall
stands the processor's, which a busy machine disturbs less. The bars: a step in at most
twice torch's time, decoding at least as fast as transformers'.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import checkpoints, parameters
from minidsv3.config import MINI, Config, TrainConfig
from minidsv3.corpus import batch, load_corpus
from minidsv3.generation.numpy_ref import generate
from minidsv3.training import numpy_ref as training
from tests.benchmarks.test_moe import WEIGHTS, grouped, swiglu, torch_layer
from tests.oracles import relative_error
from tests.test_model import ids, under
from tests.test_moe_model import is_bias
from tests.test_whole_model import from_file
from tests.torch_moe import BIAS

TURNS = 8


class Best(NamedTuple):
    """Seconds, of the best turn for each clock."""

    wall: float
    cpu: float


def best_of_turns(*turns: Callable, how_many: int = TURNS) -> list[Best]:
    """The best times of calls that take turns, after one to warm up."""
    times = []
    for _ in range(how_many + 1):
        row = []
        for turn in turns:
            began = time.perf_counter(), time.process_time()
            turn()
            row.append((time.perf_counter() - began[0],
                        time.process_time() - began[1]))  # fmt: skip
        times.append(row)
    return [Best(*pair) for pair in np.min(times[1:], axis=0).tolist()]


def report(title: str, ours: Best, theirs: Best, bar: float) -> None:
    print(f"\n{title:26} NumPy {1e3 * ours.wall:7.1f} ms (CPU {1e3 * ours.cpu:7.1f})   "
          f"torch {1e3 * theirs.wall:7.1f} ms (CPU {1e3 * theirs.cpu:7.1f})   "
          f"ratio {ours.wall / theirs.wall:4.2f} (CPU {ours.cpu / theirs.cpu:4.2f}), "
          f"bar {bar:.0f}")  # fmt: skip


# --- a step of training, in plain torch -----------------------------------------------


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


def rotations(config: Config, T: int) -> torch.Tensor:
    j = torch.arange(0, config.qk_rope_head_dim, 2)
    angle = torch.arange(T)[:, None] * config.rope_theta ** (
        -j / config.qk_rope_head_dim
    )
    return torch.polar(torch.ones_like(angle), angle)


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """x (B, N_h, T, d_R), pair by pair."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def attention(w: dict, config: Config, x: torch.Tensor) -> torch.Tensor:
    N_h, d_h, d_c = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.kv_lora_rank,
    )
    turn = rotations(config, x.shape[1])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (N_h, -1)).transpose(1, 2)

    c_Q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], 1e-6)
    q = heads(c_Q @ w["q_b_proj.weight"].T)
    kept = x @ w["kv_a_proj_with_mqa.weight"].T
    c_KV = norm(kept[..., :d_c], w["kv_a_layernorm.weight"], 1e-6)
    kv = heads(c_KV @ w["kv_b_proj.weight"].T)
    k_R = turned(kept[:, None, :, d_c:], turn).expand(-1, N_h, -1, -1)
    q = torch.cat([q[..., :d_h], turned(q[..., d_h:], turn)], -1)
    k = torch.cat([kv[..., :d_h], k_R], -1)
    o = F.scaled_dot_product_attention(q, k, kv[..., d_h:], is_causal=True)
    return o.transpose(1, 2).flatten(2) @ w["o_proj.weight"].T


def looped(w: dict, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """As `grouped`, by a loop over the experts that have rows."""
    stacks = [w[f"experts.{name}"].unbind() for name in WEIGHTS]
    parts = zip(x.split(counts.tolist()), *stacks, strict=True)
    return torch.cat([
        swiglu(dict(zip(WEIGHTS, matrices, strict=True)), rows)
        for rows, *matrices in parts if len(rows)
    ])  # fmt: skip


class Plain:
    """MINI in torch's own operations, trained as ours is, biases and all."""

    def __init__(self, params: dict, config: Config, recipe: TrainConfig, experts):
        self.config, self.recipe, self.experts = config, recipe, experts
        self.p = {
            name: torch.tensor(array, requires_grad=not is_bias(name))
            for name, array in params.items()
        }
        learned = {name: t for name, t in self.p.items() if t.requires_grad}
        groups = [
            {"params": [t for name, t in learned.items() if training.decays(name)],
             "weight_decay": recipe.weight_decay},
            {"params": [t for name, t in learned.items() if not training.decays(name)],
             "weight_decay": 0.0},
        ]  # fmt: skip
        betas = (recipe.beta1, recipe.beta2)
        self.learned = list(learned.values())
        self.optimiser = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.done = 0

    def block(self, n: int, x: torch.Tensor) -> torch.Tensor:
        w, eps = under(self.p, n), self.config.rms_norm_eps
        u = norm(x, w["input_layernorm.weight"], eps)
        x = x + attention(parameters.cut(w, "self_attn."), self.config, u)
        u = norm(x, w["post_attention_layernorm.weight"], eps)
        mlp = parameters.cut(w, "mlp.")
        if "gate.weight" not in mlp:
            return x + swiglu(mlp, u)
        y, s, self.load[n] = torch_layer(self.config, mlp, u, self.experts)
        self.balance = self.balance + self.of_sequences(s.view(*u.shape[:2], -1))
        return x + y

    def of_sequences(self, s: torch.Tensor) -> torch.Tensor:
        """The balance loss of affinities (B, T, E)."""
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        f = torch.zeros_like(s).scatter_(-1, s.topk(K).indices, 1.0).mean(1) * (E / K)
        return (f * (s / s.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()

    def loss(self, tokens: np.ndarray) -> torch.Tensor:
        p, config, eps = self.p, self.config, self.config.rms_norm_eps
        self.load, self.balance = {}, torch.zeros(())
        t, L = torch.tensor(tokens), config.num_hidden_layers
        e = F.embedding(t[:, :-1], p["model.embed_tokens.weight"])
        x = e
        for n in range(L):
            x = self.block(n, x)
        h = norm(x, p["model.norm.weight"], eps)
        head = p["lm_head.weight"].T
        main = F.cross_entropy((h @ head).flatten(0, 1), t[:, 1:].flatten())
        w = under(p, L)
        joined = [norm(e[:, 1:], w["enorm.weight"], eps),
                  norm(h[:, :-1], w["hnorm.weight"], eps)]  # fmt: skip
        x = self.block(L, torch.cat(joined, -1) @ w["eh_proj.weight"].T)
        h = norm(x, w["shared_head.norm.weight"], eps)
        further = F.cross_entropy((h @ head).flatten(0, 1), t[:, 2:].flatten())
        c = self.recipe
        return main + c.mtp_weight * further + c.balance_weight * self.balance

    def step(self, tokens: np.ndarray) -> float:
        self.done += 1
        self.optimiser.zero_grad()
        loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, self.recipe.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = training.learning_rate(self.done, self.recipe)
        self.optimiser.step()
        for n, counts in self.load.items():
            sign = (counts.float().mean() - counts).sign()
            bias = self.p[f"model.layers.{n}.mlp.{BIAS}"]
            bias += self.recipe.bias_update_speed * sign
        return loss.item()


def texts(B: int, T: int) -> Iterator[np.ndarray]:
    tokens = load_corpus().train
    return (batch(tokens, B, T, 0, step) for step in range(10_000))


@pytest.mark.parametrize("B", [8, 16])
def test_a_step_of_training(B: int) -> None:
    """Loss, gradients, clipping, AdamW, biases; both read the same batches."""
    recipe = TrainConfig(batch_size=B, sequence_length=128)
    start = partial(parameters.initialise, MINI, 0, recipe.init_std)
    state = training.new_state(start())
    ours = training.train(state, MINI, recipe, load_corpus().train)
    routes = (looped, grouped)
    peers = [Plain(start(), MINI, recipe, experts) for experts in routes]
    losses = next(ours).losses["total"], *(p.step(next(texts(B, 128))) for p in peers)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    for peer in peers:  # after one step of Adam every weight has moved by the rate
        for name, array in state.params.items():
            moved = [a - b for a, b in zip((array, peer.p[name].detach().numpy()),
                     2 * [start()[name]], strict=True)]  # fmt: skip
            assert relative_error(*moved) <= 0.05 or not moved[0].any(), name
    given = [texts(B, 128) for _ in peers]
    turns = [partial(lambda p, g: p.step(next(g)), *pair) for pair in
             zip(peers, given, strict=True)]  # fmt: skip
    mine, *others = best_of_turns(lambda: next(ours), *turns)
    for experts, their in zip(routes, others, strict=True):
        report(f"step of {B} × 128, {experts.__name__}", mine, their, bar=2)


# --- decoding -------------------------------------------------------------------------


def test_cached_decoding(tmp_path) -> None:
    """Greedy, one text, the same weights by way of a file, the same new tokens."""
    params, new = parameters.initialise(MINI, 0, 0.1), 120
    checkpoints.save(tmp_path, MINI, params)
    prompt, kinds = ids(1, 16, config=MINI), ("eager", "grouped_mm")
    peers = [from_file(tmp_path, attn_implementation="sdpa", experts_implementation=k)
             for k in kinds]  # fmt: skip
    words = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def theirs(peer) -> np.ndarray:
        with torch.no_grad():
            return peer.generate(torch.tensor(prompt), **words)[:, 16:].numpy()

    ours = partial(generate, params, MINI, prompt, new)
    for peer in peers:
        np.testing.assert_array_equal(ours(), theirs(peer))
    turns = [partial(theirs, peer) for peer in peers]
    mine, *others = best_of_turns(ours, *turns, how_many=4)
    for kind, their in zip(kinds, others, strict=True):
        report(f"{new} tokens, {kind}", mine, their, bar=1)
