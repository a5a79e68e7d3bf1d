"""What made the training step fast, one change after the other: chapter 7.

    python book/torch_speed.py --threads 2

``torch_speed.csv``: seconds and memory of a step of one model, for the port as one
would write it first, then with each change added to those before it, and for Hugging
Face transformers with the same weights, as it comes and with the settings of the
process that help us. Each arm is a process of its own; a process takes several steps,
and its best counts. Needs transformers.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.nn.functional as F
from rows import RESULTS as RESULTS
from rows import Row, write
from rows import read as read
from tqdm import tqdm

from minidsv3 import parameters
from minidsv3.config import Config, TrainConfig
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.moe import torch_port as moe
from minidsv3.primitives import attention_torch_port as attention
from minidsv3.training import processor

CONFIG = Config(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=8, v_head_dim=32, qk_rope_head_dim=16,
    qk_nope_head_dim=32, kv_lora_rank=64, q_lora_rank=96, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=64, n_group=8,
    topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=1,
    max_position_embeddings=8448,
)  # fmt: skip
B, T = 8, 256
STD = 0.1  # large enough that a fresh router spreads its tokens

# Each arm adds one change to the one before; "bfloat16" leaves oneDNN out again.
OURS = (
    "loop over experts",
    "grouped products",
    "slabs, own backward",
    "memory kept",
    "attention in chunks",
    "choice by NumPy",
    "oneDNN",
    "bfloat16",
)
PEERS = ("transformers", "transformers, memory kept, oneDNN")
ARMS = (*OURS, *PEERS)


# --- what a change replaces -----------------------------------------------------------


def by_loop(self: moe.RoutedExperts, u: torch.Tensor, routing: moe.Routing):
    """Each expert picks its tokens, computes, adds its answers where they belong."""
    y = torch.zeros_like(u)
    stacks = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
    for i, (W_gate, W_up, W_down) in enumerate(zip(*stacks, strict=True)):
        token, rank = (routing.experts == i).nonzero(as_tuple=True)
        if len(token):
            h = F.silu(u[token] @ W_gate.T) * (u[token] @ W_up.T)
            y.index_add_(0, token, routing.gates[token, rank, None] * (h @ W_down.T))
    return y


def by_grouped_mm(self: moe.RoutedExperts, u: torch.Tensor, routing: moe.Routing):
    """Sort by expert, torch's own grouped product, and autograd."""
    K = routing.experts.shape[1]
    flat = routing.experts.flatten()
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=len(self.gate_proj.weight)).cumsum(0).int()
    x, gates = u[order // K], routing.gates.flatten()[order, None]

    def product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, W.mT, offs=ends)

    a, b = product(x, self.gate_proj.weight), product(x, self.up_proj.weight)
    o = gates * product(F.silu(a) * b, self.down_proj.weight)
    return torch.zeros_like(u).index_add(0, order // K, o)


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
    """torch's own function."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def undo(arm: str) -> Iterator[mock._patch]:
    """The patches that take away the changes which an arm does not have yet."""
    have = OURS.index(arm)
    if have < OURS.index("slabs, own backward"):
        first = have == OURS.index("loop over experts")
        how = by_loop if first else by_grouped_mm
        yield mock.patch.object(moe.RoutedExperts, "forward", how)
    if have < OURS.index("attention in chunks"):
        yield mock.patch.object(attention, "attention_in_chunks", fused_attention)
    if have < OURS.index("choice by NumPy"):
        yield mock.patch.object(moe, "top", moe.top_anywhere)


# --- measuring ------------------------------------------------------------------------


def our_step(arm: str) -> Callable[[], float]:
    """A step of training with the changes up to ``arm``; it answers its loss."""
    model = DeepSeekV3(CONFIG, init_std=STD)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    recipe = TrainConfig()
    patches = list(undo(arm))

    def step() -> float:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=arm == "bfloat16"):
                losses = model.loss(next(batches), recipe).losses
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        return losses["main"].item()

    batches = texts()
    return step


def their_model() -> torch.nn.Module:
    """The same weights in transformers, with its best attention and experts."""
    from transformers import DeepseekV3ForCausalLM

    with TemporaryDirectory() as folder:
        DeepSeekV3(CONFIG, init_std=STD).save_pretrained(folder)
        return DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )  # fmt: skip


def their_step() -> Callable[[], float]:
    """The same step for transformers: the same weights and batches."""
    model = their_model().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        optimiser.zero_grad()
        ids = next(batches)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return loss.item()

    batches = texts()
    return step


def texts() -> Iterator[torch.Tensor]:
    """Batches of random bytes, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, CONFIG.vocab_size, (B, T + 1), generator=generator)


def measure_here(arm: str, threads: int, steps: int) -> Row:
    """One arm in this process, whose settings it changes: run it in one of its own."""
    torch.set_num_threads(threads)
    if keeps_memory(arm):
        processor.keep_freed_memory()
    exact = False
    if arm in PEERS[1:] or arm == "oneDNN":
        exact = processor.float32_through_onednn()
    step = their_step() if arm in PEERS else our_step(arm)
    first = step()
    idle = resident()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "arm": arm, "ms": 1e3 * min(seconds), "step_mib": (peak - idle) / 2**20,
        "peak_mib": peak / 2**20, "loss": first, "onednn": int(exact),
    }  # fmt: skip


def keeps_memory(arm: str) -> bool:
    """Whether an arm has "memory kept"; then a step's memory cannot be told apart."""
    return arm in PEERS[1:] or arm in OURS[OURS.index("memory kept") :]


def resident() -> float:
    """Bytes of memory that this process has now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(arm: str, threads: int, steps: int = 8) -> Row:
    """One arm, in a process of its own."""
    words = [sys.executable, __file__, "--arm", arm, "--threads", str(threads)]
    done = subprocess.run(
        [*words, "--steps", str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every arm, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--arm", choices=ARMS, help="measure one, print it")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure_here(options.arm, options.threads, options.steps)))
        return
    import transformers

    few = {"loop over experts": 2}  # it takes seconds a step
    found = [
        measure(arm, options.threads, few.get(arm, options.steps)) for arm in tqdm(ARMS)
    ]
    write("torch_speed", found, [
        f"# python book/torch_speed.py --threads {options.threads}",
        f"# {date.today()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {options.threads} threads",
        f"# {parameters.count(CONFIG):,} parameters, {B} x {T} tokens a step",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
