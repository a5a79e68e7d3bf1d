"""Plausible mistakes of the PyTorch ports and their training: a test must see each.

A row names the mistake, the file, the lines that make it, and the check that fails on
it; that the same checks pass on the right code is what the other tests say.
"""

from functools import partial

import pytest

from minidsv3.config import TINY
from minidsv3.mla import numpy_ref as mla_numpy
from minidsv3.mla import torch_port as mla
from minidsv3.model import torch_port as model
from minidsv3.moe import torch_port as moe
from minidsv3.mtp import torch_port as mtp
from minidsv3.primitives import attention_torch_port as att
from minidsv3.primitives import torch_port as primitives
from minidsv3.training import command, held_out, processor, run_folder
from minidsv3.training import torch_port as training
from tests import test_mla_experiment as experiment
from tests import test_moe
from tests import test_torch_model as whole
from tests import test_torch_ports as ports
from tests import test_torch_training as trained
from tests.planting import plant
from tests.test_cli import text  # noqa: F401, a fixture

SEEN = (AssertionError, pytest.fail.Exception)

PRIMITIVES = {
    "a mean is taken off before the norm": (
        primitives, [("F.rms_norm(x.to(wide), self",
                      "F.rms_norm(x.to(wide) - x.mean(-1, keepdim=True), self")],
        ports.check_rmsnorm),
    "an eps of its own": (
        primitives, [("self.weight.to(wide), self.eps)",
                      "self.weight.to(wide), 1e-6)")], ports.check_rmsnorm),
    "the mean of squares in bfloat16": (
        primitives, [("F.rms_norm(x.to(wide), self.weight.shape, "
                      "self.weight.to(wide), self.eps)",
                      "x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()")],
        ports.check_half_precision_norm),
    "silu of the other half": (
        primitives, [("F.silu(self.gate_proj(x)) * self.up_proj(x)",
                      "self.gate_proj(x) * F.silu(self.up_proj(x))")],
        ports.check_swiglu),
    "gelu": (primitives, [("F.silu(", "F.gelu(")], ports.check_swiglu),
    "pairs from two halves": (
        primitives, [("even, odd = x[..., 0::2], x[..., 1::2]",
                      "even, odd = x.chunk(2, dim=-1)")], ports.check_rotate),
    "pairs put back as two halves": (
        primitives, [("even * sin + odd * cos], dim=-1)",
                      "even * sin + odd * cos], dim=-2)")], ports.check_rotate),
    "turned the other way": (
        primitives, [("even * cos - odd * sin, even * sin + odd * cos",
                      "even * cos + odd * sin, odd * cos - even * sin")],
        ports.check_rotate),
    "angles formed in float32": (
        primitives, [("positions.cpu()[..., None] * theta",
                      "(positions.cpu()[..., None] * theta).float()")],
        ports.check_rotate),
}  # fmt: skip

cached_plain = partial(ports.test_cached_plain_attention_for_every_chunking, (4, 2))
ATTENTION = {
    "no scale in the chunks": (
        att, [("alpha=scale)", "alpha=1.0)")], ports.check_chunks),
    "a query does not see itself": (
        att, [("- T + start + 1)", "- T + start)")], ports.check_chunks),
    "a query sees the next key": (
        att, [("- T + start + 1)", "- T + start + 2)")], ports.check_chunks),
    "each chunk masked as the first": (
        att, [("- T + start + 1)", "- T + 1)")], ports.check_chunks),
    "a chunk sees its own keys only": (
        att, [("k[:, :end].mT, alpha",
               "(k[:, :end] * (torch.arange(end) >= start)[:, None]).mT, alpha")],
        ports.check_chunks),
    "the mask of a cached chunk from the left": (
        att, [(".triu(S - T + start + 1)", ".triu(start + 1)")], cached_plain),
    "the mask of a cached chunk from the left, on other devices": (
        att, [ports.ELSEWHERE, (".tril(S - T)", ".tril()")], cached_plain),
    "keys of the past left out": (
        att, [("end = S - T + start", "end = start")], ports.check_later_chunks),
    "keys of the past left out, where a chunk is not the last": (
        att, [("        mask = q.new_full(",
               "        new = (torch.arange(S) >= S - T)[:, None]\n"
               "        k = k if end == S else k * new\n"
               "        mask = q.new_full(")], ports.check_later_chunks),
    "the last chunk as long as the others": (
        att, [("end = S - T + start + now.shape[2]",
               "end = min(S - T + start + CHUNK, S - 1 + (T < CHUNK))")],
        ports.check_later_chunks),
    "a mask for each query in turn": (
        att, [("mask.repeat(now.shape[1], 1)",
               "mask.repeat_interleave(now.shape[1], 0)")], ports.check_later_chunks),
    "key heads in turn, in chunks": (
        att, [("q.unflatten(1, (N_kv, -1))",
               "q.unflatten(1, (-1, N_kv)).transpose(1, 2)"),
              ("o.unflatten(0, (B, N_kv)).flatten",
               "o.unflatten(0, (B, N_kv)).transpose(1, 2).flatten")],
        ports.check_later_chunks),
    "heads of the groups exchanged": (
        att, [("o.unflatten(0, (B, N_kv)).flatten",
               "o.unflatten(0, (B, N_kv)).transpose(1, 2).flatten")],
        ports.check_later_chunks),
    "texts and key heads exchanged": (
        att, [("o.unflatten(0, (B, N_kv))",
               "o.unflatten(0, (N_kv, B)).transpose(0, 1)")],
        ports.check_later_chunks),
    "keys learn half": (
        att, [("1, 2), k[", "1, 2), (k / 2 + k.detach() / 2)[")],
        ports.check_later_chunks),
    "what is visible is not heard": (
        att, [("    plain = visible is None\n", "    visible, plain = None, True\n")],
        ports.check_visible),
    "visible is what is hidden": (
        att, [("torch.from_numpy(visible)", "torch.from_numpy(~visible)")],
        ports.check_visible),
    "the first text's eyes for all": (
        att, [("torch.from_numpy(visible)", "torch.from_numpy(visible[:1])")],
        ports.check_visible),
    "a square is causal whatever is visible": (
        att, [("T > 1 and plain:", "T > 1:")],
        ports.check_square_visible),
    "the first text's positions for all": (
        primitives, [("angles = angles[:, None]", "angles = angles[:1, None]")],
        ports.check_rows_of_positions),
    "no mask in a cached chunk": (
        att, [("alpha=scale)", "alpha=scale, beta=float(T == S))")], cached_plain),
    "no mask in a cached chunk, on other devices": (
        att, [ports.ELSEWHERE, ("if 1 < T < S:", "if False:")], cached_plain),
    "no mask in a square, on other devices": (
        att, [ports.ELSEWHERE, ("is_causal=plain and 1 < T == S", "is_causal=False")],
        cached_plain),
    "keys remembered without position": (
        att, [("_appended(cache, *self.keys(x, rotation))",
               "_appended(cache, *self.keys(x, rotation[:, :1] * 0 + 1))")],
        ports.check_remembering_plain),
    "plain attention answers where it should remember": (
        att, [("        _appended(cache, *self.keys(x, rotation))\n",
               "        self(x, rotation, cache)\n")], ports.check_remembering_plain),
    "key heads in turn": (
        att, [("    mask = None\n",
               "    mask = None\n"
               "    k, v = (z.repeat(1, q.shape[1] // z.shape[1], 1, 1) "
               "for z in (k, v))\n")], cached_plain),
    "keys without position": (
        att, [("k = rotate(heads(self.k_proj(x), self.N_kv), rotation)",
               "k = heads(self.k_proj(x), self.N_kv)")], ports.check_plain_attention),
    "heads cut across": (
        att, [("x.unflatten(-1, (n, -1)).transpose(1, 2)",
               "x.unflatten(-1, (-1, n)).movedim(-1, 1)")],
        ports.check_plain_attention),
}  # fmt: skip

absorbed = partial(ports.check_mla, form="absorbed")
LATENTS = {
    "the crossover of one head's key": (
        mla_numpy, [("(c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank",
                     "c.qk_nope_head_dim * c.kv_lora_rank")],
        experiment.check_crossover),
    "a crossover that the rotated part moves": (
        mla_numpy, [("dearer = 2 * c.kv_lora_rank -",
                     "dearer = c.qk_rope_head_dim + 2 * c.kv_lora_rank -")],
        experiment.check_crossover),
    "a crossover below zero": (
        mla_numpy, [("if dearer > 0 else", "if dearer else")],
        experiment.check_crossover),
    "remembered before the norm": (
        mla, [("cache.extend(self.latents(x, rotation))",
               "a, k_R = self.kv_a_proj_with_mqa(x).split("
               "[self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)\n"
               "        k_R = rotate(k_R[:, None], rotation)[:, 0]\n"
               "        0 * self.kv_a_layernorm(a)\n"
               "        cache.extend(torch.cat([a, k_R], -1))")],
        ports.check_remembering_mla),
    "MLA answers where it should remember": (
        mla, [("        cache.extend(self.latents(x, rotation))\n",
               "        self(x, rotation, cache)\n")], ports.check_remembering_mla),
    "the latent's norm with rms_norm_eps": (
        mla, [("RMSNorm(d_c, LATENT_EPS)", "RMSNorm(d_c, config.rms_norm_eps)")],
        ports.check_latent_eps),
    "the queries' norm with rms_norm_eps": (
        mla, [("RMSNorm(d_cq, LATENT_EPS)", "RMSNorm(d_cq, config.rms_norm_eps)")],
        ports.check_latent_eps),
    "cached before the norm": (  # and normed at each reading: the output is right
        mla, [("torch.cat([self.kv_a_layernorm(a), k_R], dim=-1)",
               "torch.cat([a, k_R], dim=-1)"),
              ("        attend = self",
               "        a, k_R = kept.split([self.config.kv_lora_rank, "
               "self.config.qk_rope_head_dim], -1)\n"
               "        kept = torch.cat([self.kv_a_layernorm(a), k_R], -1)\n"
               "        attend = self")], ports.check_kept),
    "k^R not rotated": (
        mla, [("rotate(k_R[:, None], rotation)[:, 0]", "k_R")], ports.check_mla),
    "q^R not rotated": (
        mla, [("return q_C, rotate(q_R, rotation)", "return q_C, q_R")],
        ports.check_mla),
    "scaled by the content's width": (
        mla, [("config, softmax_scale(config)",
               "config, config.qk_nope_head_dim**-0.5")], ports.check_mla),
    "no norm on the queries' latent": (
        mla, [("self.q_a_layernorm(self.q_a_proj(x))",
               "self.q_a_proj(x) + 0 * self.q_a_layernorm(self.q_a_proj(x))")],
        ports.check_mla),
    "rows of the queries: the rotated part first": (
        mla, [("q_C, q_R = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim]",
               "q_R, q_C = q.split([c.qk_rope_head_dim, c.qk_nope_head_dim]")],
        ports.check_mla),
    "rows of kv_b: the value first": (
        mla, [("k_C, v = kv.split([c.qk_nope_head_dim, c.v_head_dim]",
               "v, k_C = kv.split([c.v_head_dim, c.qk_nope_head_dim]")],
        ports.check_mla),
    "rows of kv_b: the value first, absorbed": (
        mla, [("W_UK, W_UV = W.split([c.qk_nope_head_dim, c.v_head_dim]",
               "W_UV, W_UK = W.split([c.v_head_dim, c.qk_nope_head_dim]")], absorbed),
    "absorbed: the value is the end of what is kept": (
        mla, [("k[..., : c.kv_lora_rank]", "k[..., -c.kv_lora_rank :]")], absorbed),
    "absorbed: k^R left out of the score": (
        mla, [("torch.cat([q_C @ W_UK, q_R], dim=-1)",
               "torch.cat([q_C @ W_UK, 0 * q_R], dim=-1)")], absorbed),
    "the past is not read": (
        mla, [("(kept,) = cache.extend(kept)",
               "kept = cache.extend(kept)[0][:, -x.shape[1] :]")],
        ports.check_cached_mla),
}  # fmt: skip


def layer() -> None:
    ports.check_moe(test_moe.layer(T=4))


def routing() -> None:
    ports.check_routing(test_moe.LAYERS["TINY's experts"])


def broad() -> None:
    ports.check_routing(test_moe.LAYERS["whole breadth"])


def negative() -> None:
    ports.check_routing(test_moe.LAYERS["whole breadth, negative biases"])


ROUTER = {
    "the bias in the gates": (
        moe, [("chosen = s.gather(-1, experts)",
               "chosen = (s + self.e_score_correction_bias).gather(-1, experts)")],
        layer),
    "no bias in the choice": (
        moe, [("choice = s + self.e_score_correction_bias", "choice = s")], routing),
    "softmax": (moe, [(".sigmoid()  # (N, E)", ".softmax(-1)")], layer),
    "closed groups get 0": (
        moe, [("masked_fill(closed[..., None], -torch.inf)",
               "masked_fill(closed[..., None], 0.0)")], negative),
    "a group counts by its best": (
        moe, [("grouped.amax(-1) + others.amax(-1)", "grouped.amax(-1)")], routing),
    "a group counts by its sum": (
        moe, [("grouped.amax(-1) + others.amax(-1)", "grouped.sum(-1)")], broad),
    "the chosen groups are closed": (
        moe, [("dtype=torch.bool)\n        closed = closed.scatter(-1, open_groups, "
               "False)",
               "dtype=torch.bool)\n        closed = ~closed.scatter(-1, open_groups, "
               "False)")], routing),
    "shares of all": (
        moe, [("chosen / (chosen.sum(", "chosen / (s.sum(")], layer),
    "no scaling factor": (
        moe, [("self.config.routed_scaling_factor * shares", "shares")], layer),
    "gates without gradient": (
        moe, [("chosen = s.gather(-1, experts)",
               "chosen = s.detach().gather(-1, experts)")], layer),
    "scored in bfloat16 under autocast": (
        moe, [("torch.autocast(u.device.type, enabled=False)",
               "torch.autocast(u.device.type)")], ports.check_router_in_full),
    "scored in the precision of u": (
        moe, [("wide = torch.promote_types(u.dtype, torch.float32)",
               "wide = u.dtype")], ports.check_router_in_full),
    "ties as topk leaves them": (
        moe, [("    scores, best = scores.clone(), []\n",
               "    return scores.topk(k, dim=-1).indices\n"
               "    scores, best = scores.clone(), []\n")], ports.check_some_ties),
    "of equals the last": (
        moe, [("scores.argmax(dim=-1, keepdim=True)",
               "scores.shape[-1] - 1 - scores.flip(-1).argmax(-1, keepdim=True)")],
        ports.check_some_ties),
    "the biases follow the weights' precision": (
        moe, [("if torch.finfo(after.dtype).bits < 32:", "if False:")],
        ports.check_wide_biases),
    "the biases rise with the load": (
        moe, [("bias += speed", "bias -= speed")], ports.check_bias_rule),
    "the biases move in proportion": (
        moe, [("above.sign()", "above")], ports.check_bias_rule),
    "the mean load in float32": (
        moe, [("counts.sum() - len(counts) * counts",
               "counts.float().mean() - counts.float()")], ports.check_bias_rule),
    "the balance loss without K": (
        moe, [("(E / (K * T))", "(E / T)")], ports.check_balance),
    "the balance loss over the whole batch": (
        moe, [("f = chosen.sum(1) * (E / (K * T))",
               "f = chosen.mean(0, keepdim=True).sum(1) * (E / (K * T))")],
        ports.check_balance),
    "affinities instead of shares": (
        moe, [("P = (affinities / (affinities.sum(-1, keepdim=True) + 1e-20))",
               "P = affinities")], ports.check_balance),
    "the balance loss teaches nothing": (
        moe, [("P = (affinities / ", "P = (affinities.detach() / ")], layer),
}  # fmt: skip

EXPERTS = {
    "gates applied twice": (
        moe, [("per_sample_weights=gates.to", "per_sample_weights=gates.square().to")],
        layer),
    "gates forgotten": (
        moe, [("per_sample_weights=gates.to",
               "per_sample_weights=torch.ones_like(gates).to")], layer),
    "dg from the weighed dh": (
        moe, [("dgates = (dh * h)", "dgates = (g * dh * h)")], layer),
    "dW_down not weighed": (
        moe, [("grouped_dW(dy_rows, g * h,", "grouped_dW(dy_rows, h,")], layer),
    "dW_down weighed twice": (
        moe, [("grouped_dW(dy_rows, g * h,", "grouped_dW(dy_rows, g * g * h,")], layer),
    "dh not weighed": (moe, [("        dh *= g\n", "")], layer),
    "fillers with weight 1": (
        moe, [("g = u.new_zeros(len(token), 1)", "g = u.new_ones(len(token), 1)")],
        ports.check_slabs_of_a_layer),
    "the slope of silu": (
        moe, [("torch.ops.aten.silu_backward(dh * b, a)",
               "dh * b * torch.sigmoid(a)")], layer),
    "db without silu": (
        moe, [("silu_backward(dh * b, a), dh * gated",
               "silu_backward(dh * b, a), dh * a")], layer),
    "dx of one path": (
        moe, [("        dx = add_grouped_dx(dx, db, W_up, slabs)\n", "")], layer),
    "dW of gate and up exchanged": (
        moe, [("return du, dgates, dW_gate, dW_up, dW_down",
               "return du, dgates, dW_up, dW_gate, dW_down")], layer),
    "du of a token's first expert": (
        moe, [("F.embedding_bag(place, dx", "F.embedding_bag(place[:, :1], dx")],
        layer),
    "the rows of a slab swapped": (
        moe, [("first_row += range(row, end, height)",
               "first_row += reversed(range(row, end, height))")],
        ports.check_some_layouts),
    "the experts of a slab sorted by number": (
        moe, [("by_load[:busy][start : start + SLAB],",
               "by_load[:busy][start : start + SLAB].sort().values,")],
        ports.check_some_layouts),
    "a pair's token by its rank": (
        moe, [("// experts.shape[1]", "% len(experts)")], ports.check_some_layouts),
    "dW not put back to its experts": (
        moe, [("dW.index_copy_(0, members,",
               "dW.index_copy_(0, torch.arange(len(members)),")],
        ports.check_some_products),
    "experts without rows keep old memory": (
        moe, [("return dW.index_fill_(0, layout.idle, 0)",
               "return dW.index_fill_(0, layout.idle, 7)")],
        ports.check_an_expert_without_tokens),
    "dx overwritten": (
        moe, [("torch.baddbmm(dx_slab, dy_slab, W_slab, out=dx_slab)",
               "torch.bmm(dy_slab, W_slab, out=dx_slab)")], ports.check_some_products),
    "heights of powers of two": (
        moe, [("rows.bit_length() - 4", "rows.bit_length() - 1")],
        ports.check_some_paddings),
    "no shared expert": (
        moe, [("y = y + self.shared_experts(u)",
               "y = y + 0 * self.shared_experts(u)")], layer),
    "the shared expert scaled": (
        moe, [("y = y + self.shared_experts(u)",
               "y = y + 2.5 * self.shared_experts(u)")], layer),
    "the slope of silu, by differences": (
        moe, [("torch.ops.aten.silu_backward(dh * b, a)",
               "dh * b * torch.sigmoid(a)")], ports.test_experts_hear_of_every_input),
    "shares of no score": (
        moe, [("chosen.sum(-1, keepdim=True) + 1e-20",
               "chosen.sum(-1, keepdim=True)")],
        ports.test_scores_that_vanish_are_no_error),
    "an ε that the only expert feels": (
        moe, [("chosen.sum(-1, keepdim=True) + 1e-20",
               "chosen.sum(-1, keepdim=True) + 1e-6")],
        ports.check_one_expert_a_token),
    "tokens centred on their batch": (
        moe, [("rows = u.flatten(0, 1)  # (N, D)",
               "rows = (u - 1e-9 * u.mean((0, 1))).flatten(0, 1)")],
        partial(ports.check_no_token_sees_another, test_moe.layer())),
    "float32 affinities rounded to bfloat16": (
        moe, [(".sigmoid()  # (N, E)",
               ".sigmoid()\n"
               "            s = s if s.dtype.itemsize > 4 else s.bfloat16().float()")],
        ports.test_float32_is_float64_rounded),
}  # fmt: skip

all_parts = partial(whole.check_as_numpy, TINY)
cached = partial(whole.check_cached, TINY)
names = partial(whole.test_the_state_dict_has_the_names_of_the_file, TINY)
WHOLE = {
    "the state first, then the embedding": (
        mtp, [("[self.enorm(e), self.hnorm(h)]", "[self.hnorm(h), self.enorm(e)]")],
        ports.check_module),
    "the norms exchanged": (
        mtp, [("[self.enorm(e), self.hnorm(h)]", "[self.hnorm(e), self.enorm(h)]")],
        ports.check_module),
    "the state is not normed": (
        mtp, [("self.hnorm(h)]", "h + 0 * self.hnorm(h)]")], ports.check_module),
    "no norm before the head": (
        mtp, [('return self.shared_head["norm"](x)',
               'return x + 0 * self.shared_head["norm"](x)')], ports.check_module),
    "λ not divided by D": (
        model, [("/ max(D, 1)", "/ 1")], whole.check_two_modules),
    "λ forgotten": (
        model, [("values[0] + c.mtp_weight * sum", "values[0] + sum")], all_parts),
    "targets shifted by one": (
        model, [("ids[:, k + 1 :]", "ids[:, k:-1]")], all_parts),
    "embeddings shifted by one": (model, [("e[:, k:]", "e[:, :-k]")], all_parts),
    "modules teach the trunk nothing": (
        model, [("h[:, :-1], e[:, k:]", "h[:, :-1].detach(), e[:, k:]")], all_parts),
    "modules teach the embedding nothing": (
        model, [("h[:, :-1], e[:, k:]", "h[:, :-1], e[:, k:].detach()")], all_parts),
    "every module reads the trunk": (
        model, [("h[:, :-1], e[:, k:]",
                 "self.hidden_states(ids[:, :-1])[0][:, :-k], e[:, k:]")],
        whole.check_two_modules),
    "α forgotten": (
        model, [("total + c.balance_weight * values[-1]", "total + values[-1]")],
        all_parts),
    "the balance of whole batches": (
        model, [("r.affinities.unflatten(0, (-1, T))", "r.affinities[None]")],
        all_parts),
    "loads under each other's names": (
        model, [("biases = (n for n, _ in self.named_buffers())",
                 "biases = reversed([n for n, _ in self.named_buffers()])")],
        all_parts),
    "no final norm": (
        model, [("return self.model.norm(x), routings",
                 "return x + 0 * self.model.norm(x), routings")], all_parts),
    "the stream starts anew after attention": (
        model, [("return x + y, routing", "return u + y, routing")], all_parts),
    "the loss in whole": (
        model, [("targets.flatten().long())",
                 'targets.flatten().long(), reduction="sum")')],
        all_parts),
    "targets are not looked at": (
        model, [("_check_ids(ids[:, -1:], config)  #", "pass  #")],
        whole.check_bad_ids),
    "positions from 0 in every chunk": (
        model, [("positions = caches[0].positions(T)",
                 "positions = np.arange(T)")], cached),
    "a chunk's positions one too far": (
        model, [("positions = caches[0].positions(T)",
                 "positions = caches[0].positions(T) + (caches[0].length > 0)")],
        cached),
    "caches are not compared": (
        model, [("common_length(caches, L)", "caches[0].length if caches else 0")],
        whole.check_bad_caches),
    "the prompt in the absorbed form": (  # right, and slower
        model, [("cache.length > 0 and few", "few")], whole.check_the_choice_of_form),
    "long chunks in the absorbed form": (
        model, [("cache.length > 0 and few", "cache.length > 0")],
        whole.check_the_choice_of_form),
    "few are those that are many": (
        model, [("[1] < attention.crossover", "[1] > attention.crossover")],
        whole.check_the_choice_of_form),
    "a stream is remembered before its norm": (
        model, [("self.self_attn.remember(self.input_layernorm(x), rotation",
                 "self.self_attn.remember(x + 0 * self.input_layernorm(x), rotation")],
        ports.check_remembering_block),
    "pairs are remembered that the entrance has not joined": (
        model, [("remember(module.entrance(h, e), rotation", "remember(h, rotation")],
        whole.check_silent_drafts),
    "without answer nothing is remembered": (
        model, [("            module.block.remember(module.entrance(h, e), rotation, "
                 "cache)\n", "")], whole.check_silent_drafts),
    "an answer all the same": (
        model, [("        if not answer:", "        if False:")],
        whole.check_silent_drafts),
    "the future is seen": (
        att, [("- T + start + 1)", "- T + start + 2)")], whole.check_causality),
    "a copied module asks the first one's block": (
        mtp, [('object.__setattr__(self, "block", block)',
               'object.__setattr__(self, "block", lambda *a: block(*a))')],
        whole.check_copies),
    "biases converted with the model": (
        moe, [("if torch.finfo(after.dtype).bits < 32:", "if False:")],
        whole.check_conversions),
    "angles on the default device": (
        model, [("torch.from_numpy(positions.astype(np.float64))",
                 "torch.tensor(positions, dtype=torch.float64)")],
        whole.check_default_device),
    "angles among the parameters": (
        model, [("        self.model.norm = RMSNorm(D",
                 '        self.register_buffer("angles", torch.zeros(3))\n'
                 "        self.model.norm = RMSNorm(D")], names),
    "a module has a head of its own": (
        mtp, [('{"norm": RMSNorm(width, eps)}',
               '{"norm": RMSNorm(width, eps), "head": linear(width, 3)}')], names),
}  # fmt: skip

clipped = trained.check_same_training
not_clipped = partial(clipped, recipe=trained.RECIPES["not clipped"])
GROUP = (
    "        for group in state.optimiser.param_groups:\n"
    '            group["lr"] = rate\n'
)
STEP = "        state.optimiser.step()\n"
TRAINING = {
    "parts not divided": (
        training, [('(part_losses["total"] / c.accumulate).backward()',
                    'part_losses["total"].backward()')], trained.check_accumulation),
    "only the last part's gradient": (
        training, [("    for part in ids.chunk(c.accumulate):\n",
                    "    for part in ids.chunk(c.accumulate):\n"
                    "        model.zero_grad()\n")], trained.check_accumulation),
    "only the last part's load": (
        training, [("loads[name] + counts if name in loads else counts", "counts")],
        trained.check_accumulation),
    "only the last part's losses": (
        training, [("losses.get(name, 0.0) + loss.item() / c.accumulate",
                    "loss.item()")], trained.check_accumulation),
    "gradients of all steps add up": (
        training, [("    model.zero_grad()\n", "")], clipped),
    "the rate one step late": (
        training, [(GROUP + STEP, STEP + GROUP)], clipped),
    "the schedule counts from 0": (
        training, [("rate = learning_rate(state.step + 1, c)",
                    "rate = learning_rate(state.step, c)")], clipped),
    "λ one step late": (
        training, [("mtp_weight(state.step + 1, c)", "mtp_weight(state.step, c)")],
        trained.check_lambda),
    "λ is not set": (
        training, [("now = replace(c, mtp_weight=mtp_weight(state.step + 1, c))",
                    "now = c")], trained.check_lambda),
    "the next step's batch": (
        training, [("c.seed, state.step)", "c.seed, state.step + 1)")], clipped),
    "the biases stay": (
        training, [("update_bias(model.get_buffer(name), counts, c.bias_update_speed)",
                    "pass")], trained.check_biases),
    "the biases move in evaluation": (
        training, [("            logits = model(given[:, :-1])\n",
                    "            logits = model(given[:, :-1])\n"
                    "        for bias in model.buffers():\n"
                    "            update_bias(bias, torch.arange(len(bias)), 0.01)\n")],
        trained.check_evaluation_changes_nothing),
    "weight decay of all": (
        training, [('"weight_decay": 0.0}', '"weight_decay": c.weight_decay}')],
        trained.check_decay_groups),
    "weight decay as part of the gradient": (
        training, [("torch.optim.AdamW(\n", "torch.optim.Adam(\n")], clipped),
    "β exchanged": (
        training, [("(c.beta1, c.beta2)", "(c.beta2, c.beta1)")], clipped),
    "ε as torch has it": (training, [("c.adam_eps, decay", "1e-8, decay")], clipped),
    "every gradient scaled to the norm": (
        training, [("    if norm > max_norm:", "    if True:")], not_clipped),
    "no clipping": (training, [("    if norm > max_norm:", "    if False:")], clipped),
    "each tensor clipped alone": (
        training, [("torch._foreach_mul_(grads, max_norm / norm)",
                    "[g.mul_(max_norm / g.norm()) for g in grads]")], clipped),
    "the norm after clipping": (
        training, [("    return norm\n", "    return min(norm, max_norm)\n")], clipped),
    "NaN is spread before it is named": (
        training, [("    if norm > max_norm:", "    if not norm <= max_norm:")],
        trained.check_not_finite),
    "NaN is not looked for": (
        training, [("if not math.isfinite(grad_norm):", "if False:")],
        trained.check_not_finite),
    "NaN is looked for after the step": (
        training, [("        if not math.isfinite(grad_norm):",
                    "        state.optimiser.step()\n"
                    "        if not math.isfinite(grad_norm):")],
        trained.check_not_finite),
    "moments from zero": (
        training, [("torch.from_numpy(start.m[name])",
                    "torch.zeros(start.m[name].shape).to(weight)")],
        trained.test_training_goes_on_in_the_middle),
    "moments exchanged": (
        training, [("torch.from_numpy(start.m[name])",
                    "torch.from_numpy(start.v[name].copy())")],
        trained.test_training_goes_on_in_the_middle),
    "the optimiser counts from 0": (
        training, [("torch.tensor(start.step, dtype", "torch.tensor(0, dtype")],
        trained.test_training_goes_on_in_the_middle),
    "the optimiser's count on the processor": (
        training, [("dtype=torch.float32, device=device)", "dtype=torch.float32)")],
        trained.check_the_optimisers_steps_lie_with_the_weights),
    "precision is not heard": (
        training, [('enabled=precision == "bfloat16"', "enabled=False")],
        trained.check_half_training),
    "evaluation rounded to float32": (
        training, [("            logits = model(given[:, :-1])\n",
                    "            logits = model(given[:, :-1]).float()\n")],
        trained.check_evaluate),
    "oneDNN is not asked again": (
        processor, [("    home.matmul.fp32_precision = before\n", "")],
        trained.check_onednn),
    "evaluation that overflows": (
        held_out, [("if not math.isfinite(total):", "if False:")],
        trained.check_evaluation_is_finite),
    "evaluation of the text read": (
        training, [("cross_entropy(logits, given[:, 1:])",
                    "cross_entropy(logits, given[:, :-1])")], trained.check_evaluate),
}  # fmt: skip

MISTAKES = {
    **PRIMITIVES,
    **ATTENTION,
    **LATENTS,
    **ROUTER,
    **EXPERTS,
    **WHOLE,
    **TRAINING,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = MISTAKES[mistake]
    check()
    plant(monkeypatch, module, *lines)
    with pytest.raises(SEEN):
        check()


COMMAND = {
    "TensorBoard is asked when training has begun": (
        command, [("    if options.tensorboard:\n        _summary_writer()\n", "")],
        trained.check_tensorboard_is_asked_first),
    "back ends are not told apart": (
        run_folder, [('        "backend": json.dumps(backend),\n', "")],
        trained.check_refused_resumption),
    "rows of lost steps stay": (
        run_folder, [("    _forget_rows_after(folder / HELD_OUT, step, "
                      "HELD_OUT_COLUMNS)\n", "")], trained.check_held_out),
    "held-out text one step late": (
        command, [("record.step % every == 0", "(record.step - 1) % every == 0")],
        trained.check_held_out),
    "curves of a lost step stay": (
        command, [("purge_step=step + 1", "purge_step=step")], trained.check_curves),
    "the curve of held-out text a step late": (
        command, [("            bits = evaluate() if every",
                   "            late, bits = bits, evaluate() if every"),
                  ("write_curves(record, bits)", "write_curves(record, late)"),
                  ("    progress = tqdm(", "    bits = None\n    progress = tqdm(")],
        trained.check_curves),
}  # fmt: skip


@pytest.mark.parametrize("mistake", COMMAND)
def test_mistakes_of_the_command_are_seen(
    mistake: str,
    tmp_path,
    text,  # noqa: F811
    capsys,
    monkeypatch,
) -> None:
    module, lines, check = COMMAND[mistake]
    plant(monkeypatch, module, *lines)
    given = (tmp_path, text) if check is trained.check_curves else (
        tmp_path, text, capsys
    )  # fmt: skip
    with pytest.raises(SEEN):
        check(*given)
