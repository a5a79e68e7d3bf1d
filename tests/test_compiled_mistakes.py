"""Plausible mistakes of the decoders, their loops and caches: a test must see each.

A row names the mistake, the lines that make it, and the check that fails on it. The
loops run as plain Python here, on small sizes: the compiler would take a second each.
"""

from functools import partial

import numpy as np
import pytest

from minidsv3.generation import compiled, cpu_kernels, decoding, prefill
from minidsv3.generation import torch_port as torch_decoder
from minidsv3.primitives import cache
from tests import test_compiled as loops
from tests import test_mla, test_moe
from tests import test_sessions as sessions
from tests.planting import plant, plant_loops, plant_methods
from tests.test_whole_model import MODELS

SEEN = (AssertionError, pytest.fail.Exception)

linear = partial(loops.check_linear, Ns=(1, 2, 3), Os=(4, 6), widths=(3,))
ROWS = {
    "the odd token is left out": ([("if N % 2:", "if False:")], linear),
    "the rows behind the last four are left out": (
        [("range(rows - rows % 4, rows)", "range(rows, rows)")], linear),
    "what is there is always cleared": ([("    if not add:", "    if True:")], linear),
    "what is there is never cleared": (
        [("    if not add:\n        y[:] = zero\n", "")], linear),
    "the second token has the first one's sums": (
        [("(n + 1, (e, f, g, h))", "(n + 1, (a, b, c, d))")], linear),
    "a row of four taken twice": (
        [("h += W[o + 3, i] * w", "h += W[o + 2, i] * w")], linear),
    "a row of four taken twice, one token": (
        [("d += W[3, i]", "d += W[2, i]")], linear),
    "what comes next is fetched beyond its end": (
        [("min(fetched + 4 * columns * W.itemsize, ahead.size * W.itemsize)",
          "fetched + 4 * columns * W.itemsize")], loops.check_fetched),
    "numbers counted for bytes": (
        [("ahead.size * W.itemsize", "ahead.size")], loops.check_fetched),
    "its beginning is fetched again and again": (
        [("        fetched = until\n", "")], loops.check_fetched),
    "every second line is fetched": (
        [("until, LINE)", "until, 2 * LINE)")], loops.check_fetched),
    "the matrix at work is fetched": (
        [("_fetch(ahead.ctypes", "_fetch(W.ctypes")], loops.check_fetched),
    "what comes next is a row of the sum": (
        [("_fetch(ahead.ctypes.data + place)", "y[0, 0] += ahead.ravel()[place // 8]")],
        loops.check_ahead),
    "the sum of squares for their mean": (
        [("x[n]) / D + eps", "x[n]) + eps")], loops.check_norm),
    "eps behind the root": (
        [("1 / np.sqrt(dot(x[n], x[n]) / D + eps)",
          "1 / (np.sqrt(dot(x[n], x[n]) / D) + eps)")], loops.check_norm),
    "no gain": ([("g[i] * (x[n, i] * r)", "x[n, i] * r")], loops.check_norm),
    "the norm at each number anew": (  # of a row that has changed already, in place
        [("y[n, i] = g[i] * (x[n, i] * r)",
          "y[n, i] = g[i] * x[n, i] / np.sqrt(dot(x[n], x[n]) / D + eps)")],
        loops.check_norm),
    "silu of the other sign": ([("np.exp(-a[n, i])", "np.exp(a[n, i])")],
                               loops.check_dense),
    "silu of the other half": (
        [("linear(u, W_gate, a", "linear(u, W_gate, b"),
          ("linear(u, W_up, b", "linear(u, W_up, a")],
        loops.check_dense),
    "the stream is overwritten": (
        [("linear(a, W_down, y, True", "linear(a, W_down, y, False")],
        loops.check_dense),
    "turned the other way": (
        [("even * angles[0, j] - odd", "even * angles[0, j] + odd"),
         ("= even * angles[1, j] + odd", "= -even * angles[1, j] + odd")],
        loops.check_turn),
    "half of a pair scaled": ([("x[2 * j + 1] * factor", "x[2 * j + 1]")],
                              loops.check_turn),
    "pairs from two halves": (
        [("even, odd = x[2 * j] * factor, x[2 * j + 1] * factor",
          "even, odd = x[j] * factor, x[j + x.shape[0] // 2] * factor")],
        loops.check_turn),
}  # fmt: skip

direct = partial(loops.check_project, test_mla.CONFIGS["no latent of the queries"])
stretched = partial(loops.check_project, test_mla.YARN)
layer = partial(loops.check_attention, test_mla.YARN)
ATTENTION = {
    "no norm on the queries' latent": (
        [("        rmsnorm(c_Q, g_Q, latent_eps, c_Q)\n", "")], loops.check_project),
    "the queries' norm with rms_norm_eps": (
        [("c_Q, g_Q, latent_eps", "c_Q, g_Q, eps")], loops.check_project),
    "the latent's norm with rms_norm_eps": (
        [("g_KV, latent_eps", "g_KV, eps")], loops.check_project),
    "no norm before attention": (
        [("    rmsnorm(x, g, eps, u)\n    heads", "    u[:] = x\n    heads")], direct),
    "the key is not rotated": (
        [("        turn(kv[n, d_c:], angles[position], x.dtype.type(1))\n", "")],
        loops.check_project),
    "the key is scaled as the query": (
        [("angles[position], x.dtype.type(1))", "angles[position], scale)")],
        loops.check_project),
    "the query is not scaled where it rotates": (
        [("turn(q[n, h, d_c:], angles[position], x.dtype.type(scale))",
          "turn(q[n, h, d_c:], angles[position], x.dtype.type(1))")], stretched),
    "the query is not scaled where it does not": (
        [("head[h, i] * head.dtype.type(scale)", "head[h, i]")], stretched),
    "all texts begin where the first does": (
        [("position = starts[b] + t", "position = starts[0] + t")],
        loops.check_project),
    "queries count from their step": (
        [("turn(q[n, h, d_c:], angles[position]", "turn(q[n, h, d_c:], angles[t]")],
        loops.check_project),
    "texts and tokens exchanged": (
        [("n // (N // B), n % (N // B)", "n % B, n // B")], loops.check_project),
    "a query keeps what memory held": (
        [("        q[h, :d_c] = 0\n", "")], loops.check_project),
    "absorbed into the values": ([("* W[h, i, j]", "* W[h, -1 - i, j]")],
                                 loops.check_project),
    "rows of the queries: the rotated part first": (
        [("content = head[h, i] *", "content = head[h, i - d_h] *"),
         ("= head[h, d_h:]", "= head[h, : q.shape[1] - d_c]")], loops.check_project),
    "a token does not see itself": (
        [("starts[b] + t + 1, S", "starts[b] + t, S")], loops.check_shift),
    "a token sees the next": (
        [("starts[b] + t + 1, S", "starts[b] + t + 2, S")], loops.check_shift),
    "each text as long as the first": (
        [("min(starts[b] + t", "min(starts[0] + t")], loops.check_shift),
    "every token sees what the last sees": (
        [("starts[b] + t + 1, S", "starts[b] + T, S")], loops.check_shift),
    "the largest is not taken off": ([("row[s] -= largest", "row[s] -= 0")],
                                     loops.check_shift),
    "the largest is 0 at least": (
        [("lanes[:] = row[0]", "lanes[:] = 0")], loops.check_shift),
    "the largest of all, hidden ones too": (
        [("seen - seen % 16, seen):", "seen - seen % 16, S):")], loops.check_shift),
    "what is hidden weighs 1": ([("row[seen:] = -np.inf", "row[seen:] = 0")],
                                loops.check_shift),
    "the last of sixteen lanes left out": (
        [("for i in range(16)", "for i in range(15)")], loops.check_the_largest),
    "lanes keep the last row's largest": (
        [("                lanes[:] = row[0]\n", ""),
         ("np.empty(16, scores.dtype)", "np.full(16, -np.inf)")],
        loops.check_the_largest),
    "scores behind the last sixteen left out": (
        [("range(seen - seen % 16, seen)", "range(seen, seen)")],
        loops.check_the_largest),
    "only the scores behind the last sixteen": (
        [("range(0, seen - 15, 16)", "range(0)")], loops.check_the_largest),
    "a token does not see itself, short": (
        [("starts[n // T] + n % T + 1", "max(starts[n // T] + n % T, 1)")],
        loops.check_attend),
    "a token sees the next, short": (
        [("starts[n // T] + n % T + 1", "starts[n // T] + n % T + 2")],
        loops.check_attend),
    "each text as long as the first, short": (
        [("starts[n // T] +", "starts[0] +")], loops.check_attend),
    "every token sees what the last sees, short": (
        [("starts[n // T] + n % T + 1", "starts[n // T] + T")], loops.check_attend),
    "the first text's cache for all": (
        [("cache[n // T], starts", "cache[0], starts")], loops.check_attend),
    "keys behind the last four weigh as a score of 0": (
        [("weights[s] = dot(kept[s], q[n, h])", "weights[s] = 0")], loops.check_attend),
    "the largest is not taken off, short": (
        [("np.exp(weights[s] - largest)", "np.exp(weights[s])")], loops.check_attend),
    "the last weight is not summed": (
        [("weights.sum()", "weights[:-1].sum()")], loops.check_attend),
    "one head's query for all": (
        [("[s : s + 4], q[n, h])", "[s : s + 4], q[n, 0])")], loops.check_attend),
    "latents behind the last four left out": (
        [("range(S - S % 4, S)", "range(S, S)")], loops.check_weigh),
    "a latent of four taken twice": (
        [("d * kept[s + 3, j]", "d * kept[s + 2, j]")], loops.check_weigh),
    "latents keep what memory held": ([("    latent[:] = 0\n", "")], loops.check_weigh),
    "the past of a text is left out": (
        [("q, starts, cache, sums, latents)\n    output(x, sums",
          "q, 0 * starts, cache, sums, latents)\n    output(x, sums")], layer),
    "the long way's scale twice": (
        [("    attend(q, starts", "    q *= scale\n    attend(q, starts")], layer),
    "attention is computed and not added": (
        [("    output(x, sums,", "    output(x.copy(), sums,")], layer),
    "weights do not sum to 1": ([("latents[n, h]) / sums[n, h]", "latents[n, h])")],
                                loops.check_output),
    "one sum for all heads": ([("/ sums[n, h]", "/ sums[n, 0]")],
                              loops.check_output),
    "keys for values": ([("W[h, d_h + v]", "W[h, v]")], loops.check_output),
    "the stream begins with attention": (
        [("linear(o, W_O, x, True", "linear(o, W_O, x, False")],
        loops.check_output),
}  # fmt: skip

experts = partial(loops.check_experts, test_moe.layer())
shifted = partial(loops.check_route, 0, test_moe.SMALL, 4, -3.0)


def routes() -> None:
    for seed in range(8):
        loops.check_route(seed, levels=(1, 2, 4, 10**6)[seed % 4])


EXPERTS = {
    "gates are not heard": (
        [("gates[pair], x[row]", "x.dtype.type(1), x[row]")], experts),
    "no shared expert": ([("if S_gate.size:", "if False:")], experts),
    "the router reads the stream": (
        [("linear(u, W, s, False", "linear(x, W, s, False")], experts),
    "experts read what the others have added": (
        [("swiglu(u[row], W_gate[e]", "swiglu(x[row], W_gate[e]")], experts),
    "the shared expert reads what the others have added": (
        [("swiglu(u, S_gate", "swiglu(x, S_gate")], experts),
    "the same expert for all": (
        [("e, row = chosen[pair]", "e, row = chosen[0]")], experts),
    "an expert's own gate is fetched again": (
        [("chosen[min(pair + 1, N * K - 1)]", "chosen[pair]")],
        loops.check_who_comes_next),
    "the first expert is not fetched": (
        [("x.dtype.type(1), x, W_gate[chosen[0]])",
          "x.dtype.type(1), x, W_gate[0, :0])")], loops.check_who_comes_next),
    "gates of s + b": (
        [("        total += s[chosen[k]]\n",
          "        s[chosen[k]] += bias[chosen[k]]\n"
          "        total += s[chosen[k]]\n")], experts),
    "the bias is not heard": ([("s[e] + bias[e]", "s[e]")], routes),
    "gates sum to 1": ([("s.dtype.type(factor) * (", "(")], routes),
    "gates are not shares": ([("(s[chosen[k]] / total)", "s[chosen[k]]")], routes),
    "ties go to the last": (
        [("choice.argmax()", "E - 1 - choice[::-1].argmax()")], routes),
    "groups by their best alone": (
        [("sums[i] = best + second", "sums[i] = best")], routes),
    "the second best is forgotten": (
        [("best, second = c, best", "best = c")], routes),
    "a tie within a group counts once": (
        [("elif c > second:", "elif second < c < best:")], routes),
    "closed groups get 0": (
        [("            choice[i] = -np.inf", "            choice[i] = 0")], shifted),
    "every group is open": ([("if topk_group < n_group:", "if False:")], routes),
    "one group too many": ([("for _ in range(kept)", "for _ in range(kept + 1)")],
                           routes),
    "an expert twice": (
        [("        choice[chosen[k]] = -np.inf\n", "")], routes),
    "what is not finite is silent": ([(" + poison", "")], loops.check_not_finite),
    "logits that are infinite are silent": (
        [("    poison = (s.sum() + bias.sum()) * 0\n", ""),
         ("    if topk_group < n_group:\n",
          "    poison = choice.sum() * 0\n    if topk_group < n_group:\n")],
        loops.check_not_finite),
    "biases that are not finite are silent": (
        [("(s.sum() + bias.sum()) * 0", "s.sum() * 0")], loops.check_not_finite),
}  # fmt: skip

ENDS = {
    "the head reads what is not normed": (
        [("linear(h, W, logits", "linear(x, W, logits")], loops.check_head),
    "the state first, then the embedding": (
        [("g_e, eps, joined[:, :D]", "g_e, eps, joined[:, D:]"),
         ("g_h, eps, joined[:, D:]", "g_h, eps, joined[:, :D]")], loops.check_entrance),
    "the norms exchanged": (
        [("rmsnorm(e, g_e", "rmsnorm(e, g_h"), ("rmsnorm(h, g_h", "rmsnorm(h, g_e")],
        loops.check_entrance),
    "the state is not normed": (
        [("rmsnorm(h, g_h, eps, joined[:, D:])", "joined[:, D:] = h")],
        loops.check_entrance),
}  # fmt: skip

LOOPS = {**ROWS, **ATTENTION, **EXPERTS, **ENDS}


@pytest.mark.parametrize("mistake", LOOPS)
def test_mistakes_of_the_loops_are_seen(mistake: str, monkeypatch) -> None:
    lines, check = LOOPS[mistake]
    with np.errstate(all="ignore"):  # as in compiled loops
        plant_loops(monkeypatch, cpu_kernels)
        check()
        plant_loops(monkeypatch, cpu_kernels, *lines)
        with pytest.raises(SEEN):
            check()


def test_the_compiler_is_told_that_nan_stays(monkeypatch) -> None:
    plant(monkeypatch, cpu_kernels,
          ('{"reassoc", "contract", "nsz"}', "True"))  # fmt: skip
    with pytest.raises(SEEN):
        loops.check_options(cpu_kernels._compiled(lambda x: x))


def test_a_folder_that_cannot_be_written_is_seen(monkeypatch) -> None:
    plant(monkeypatch, cpu_kernels, ("except RuntimeError:", "except KeyError:"))
    with pytest.raises(RuntimeError, match="no locator available"):
        loops.check_nowhere_to_write(monkeypatch)


session = sessions.check_session
COMPILED = {
    "the module's pairs begin one after the last": (
        [("starts = self.lengths - counts", "starts = self.lengths - 1")],
        sessions.check_rejected),
    "the draft follows what was rejected": (
        [("* T + counts - 1", "* T + T - 1")], session),
    "states of what was rejected": (
        [("[:, :T]", "[:, -T:]")], sessions.check_rejected),
    "the module reads states before the last norm": (
        [("self.h = np.empty_like(x)\n"
          "        return self._logits(x, self.norm, self.h)",
          "self.h = x\n"
          "        return self._logits(x, self.norm, np.empty_like(x))")], session),
    "one token is kept of each": (
        [("self.lengths = self.lengths + counts", "self.lengths = self.lengths + 1")],
        sessions.check_rejected),
    "caches of the first texts": (
        [("[kept[texts] for kept in self.kept]",
          "[kept[: len(texts)] for kept in self.kept]")], session),
    "the module's cache of the first texts": (
        [("self.module_kept[texts]", "self.module_kept[: len(texts)]")], session),
    "no temperature of YaRN": (
        [("head_dim, softmax_scale(c),", "head_dim, c.qk_head_dim**-0.5,")],
        partial(session, config=test_mla.YARN)),
    "rms_norm_eps for the latents": (
        [("eps, LATENT_EPS)", "eps, c.rms_norm_eps)")],
        partial(session, config=MODELS["an eps that is felt"])),
    "LATENT_EPS for the stream": (
        [("softmax_scale(c), c.rms_norm_eps", "softmax_scale(c), LATENT_EPS")],
        partial(session, config=MODELS["an eps that is felt"])),
    "the rotated key for a part of the value": (
        [("seen[..., :d_c]", "seen[..., -d_c:]")], session),
    "as much past as the shortest text has": (
        [("starts.max() + N // B", "starts.min() + N // B")], session),
    "the shortest text decides what is short": (
        [("seen = self.lengths.max() + T", "seen = self.lengths.min() + T")],
        sessions.check_border),
    "the border is long": (
        [("seen <= SHORT", "seen < SHORT")], sessions.check_border),
    "one head's scores decide": (
        [("len(x) * self.config.num_attention_heads * seen", "len(x) * seen")],
        sessions.check_border),
    "one text's scores decide": (
        [("short = len(x) *", "short = T *")], sessions.check_border),
    "as much past as the shortest text has, long": (
        [("starts.max() + N // B", "starts.min() + N // B")], sessions.check_long),
    "every layer's output by the first": (
        [("kernels.output(x, sums, latents, *block.output)",
          "kernels.output(x, sums, latents, *self.decoder.blocks[0].output)")],
        sessions.check_long),
    "the first pair asks, not the last": (
        [("x, q[last], kept", "x, q[:: len(q) // B], kept")], sessions.check_rejected),
    "the last pair sees what its text had": (
        [("kept, self.lengths - 1)", "kept, starts)")], sessions.check_rejected),
    "the last pair sees the next place": (
        [("kept, self.lengths - 1)", "kept, self.lengths)")], session),
    "the last pair is attended to and no more": (
        [("        block.feed(x, *block.feed_weights)\n        return",
          "        return")], session),
    "angles count from 1": (
        [("np.arange(capacity)[:, None]", "np.arange(1, capacity + 1)[:, None]")],
        session),
    "angles rounded": (
        [("turns.astype(self.dtype)", "turns.astype('f4').astype(self.dtype)")],
        session),
    "old memory behind the module's pairs": (
        [("np.zeros_like(self.kept[0])", "np.full_like(self.kept[0], np.nan)")],
        sessions.check_one_token),
    "weights are copies": (
        [("        check(params, config)  #",
          "        params = {k: a.copy() for k, a in params.items()}\n"
          "        check(params, config)  #")], sessions.check_training_in_between),
    "shapes are not looked at": (
        [("        check(params, config)  #", "        pass  #")],
        sessions.check_refusals),
    "any order passes": (
        [("if not a.flags.c_contiguous]", "if False]")], sessions.check_refusals),
    "several precisions pass": ([("len(kinds) != 1 or ", "")], sessions.check_refusals),
    "no shared expert": (
        [("if c.n_shared_experts:", "if False:")], session),
    "the shared expert alone, if there are two": (
        [("if c.n_shared_experts:", "if c.n_shared_experts == 1:")],
        partial(session, config=MODELS["two shared experts"])),
    "gates sum to 1": (
        [("float(c.routed_scaling_factor)", "1.0")], session),
    "the trunk's norm for the module": (
        [("self.decoder.module_norm", "self.norm")], session),
}  # fmt: skip

PREFILL = {
    "the state of the longest prompt's end": (
        [("h[b, length - 1 - start]", "h[b, -1]")], session),
    "pairs of a state and its own token": (
        [("ids[:, start + 1 : start + 1 + part", "ids[:, start : start + part")],
        sessions.check_chunks),
    "no pair across two chunks": (
        [("ids[:, start + 1 : start + 1 + part", "ids[:, start + 1 : start + part")],
        sessions.check_chunks),
    "states of the first texts": (
        [("self.h[texts]", "self.h[: len(texts)]")], session),
    "lengths of the first texts": (
        [("self.lengths[texts]", "self.lengths[: len(texts)]")], session),
    "the module reads no prompt": (
        [("if self.module_cache is not None and after.size:", "if False:")], session),
}  # fmt: skip

modules = partial(session, sessions.of_modules)
MODULES = {
    "ends stay where they were": (
        [("        self.lengths = self.lengths + counts\n        self._settle()\n",
          "        self.lengths = self.lengths + counts\n")], modules),
    "texts end where the longest does": (
        [("        logits = super().prefill(ids, lengths)\n        self._settle()\n",
          "        logits = super().prefill(ids, lengths)\n"
          "        self.lengths = 0 * lengths + lengths.max()\n"
          "        self._settle()\n")], modules),
    "the module's pairs begin one after the last": (
        [("settle(self.lengths - counts)", "settle(self.lengths - 1)")],
        partial(sessions.check_rejected, sessions.of_modules)),
    "the draft follows what was rejected": (
        [("z[np.arange(len(counts)), counts - 1]", "z[np.arange(len(counts)), -1]")],
        modules),
    "states of what was rejected": (
        [("self.h[:, :T]", "self.h[:, -T:]")],
        partial(sessions.check_rejected, sessions.of_modules)),
    "caches of the first texts": (
        [("cache.select(texts)", "cache.select(np.arange(len(texts)))")], modules),
    "the module's cache of the first texts": (
        [("            cache.select(texts)\n",
          "            mine = cache is self.module_cache\n"
          "            cache.select(np.arange(len(texts)) if mine else texts)\n")],
        modules),
    "logits are float32": (
        [("torch.promote_types(z.dtype, torch.float32)", "torch.float32")], modules),
    "logits stay half": (
        [("z.to(torch.promote_types(z.dtype, torch.float32))",
          "(z.half() if z.dtype == torch.bfloat16 else z)")], sessions.check_half),
}  # fmt: skip

CACHES = {
    "a token does not see itself": (
        [("<= self.positions(T)[..., None]", "< self.positions(T)[..., None]")],
        sessions.check_ragged),
    "every row ends where the longest does": (
        [("self.lengths[:, None] + np.arange(T)",
          "0 * self.lengths[:, None] + self.length + np.arange(T)")],
        sessions.check_ragged),
    "as long as the shortest row": (
        [("int(lengths.max())", "int(lengths.min())")], sessions.check_ragged),
    "rows end behind what has just come": (
        [("            kept[rows, places] = n\n",
          "            kept[rows, places] = n\n"
          "        self.lengths = self.lengths + T\n")], sessions.check_ragged),
    "rows in columns' places": (
        [("kept[rows, places] = n", "kept[rows, places[:, ::-1]] = n")],
        sessions.check_ragged),
    "ends of the rows that left": (
        [("self.settle(self.lengths[rows])", "self.settle(self.lengths[: len(rows)])")],
        sessions.check_ragged),
    "old memory": (
        [("np.zeros(shape, n.dtype)", "np.full(shape, np.nan, n.dtype)")],
        sessions.check_plain_cache),
    "old memory, torch's": (
        [("n.new_zeros(shape)", "n.new_full(shape, float('nan'))")],
        sessions.check_empty),
    "a batch of one is stretched": (
        [("        self._check_kind(new)\n", "")], sessions.check_full),
    "positions from 0": (
        [("np.arange(self.length, self.length + T)", "np.arange(T)")],
        sessions.check_plain_cache),
    "unsettled rows see a mask": (
        [("        if self.lengths is None:\n            return None\n"
          "        return np.arange(self.length + T) <= self.positions(T)[..., None]",
          "        return np.arange(self.length + T) <= self.positions(T)[..., None]")],
        sessions.check_ragged),
}  # fmt: skip

METHODS = {
    f"{file.__name__.split('.')[-1]}: {mistake}": (file, *row)
    for file, rows in (
        (compiled, COMPILED),
        (prefill, PREFILL),
        (torch_decoder, MODULES),
        (cache, CACHES),
    )
    for mistake, row in rows.items()
}


@pytest.mark.parametrize("mistake", METHODS)
def test_mistakes_of_sessions_and_caches_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = METHODS[mistake]
    plant_methods(monkeypatch, module)
    check()
    plant_methods(monkeypatch, module, *lines)
    with pytest.raises(SEEN):
        check()


CHOICE = {
    "nothing is compiled": ('not find_spec("numba")', 'find_spec("numba")'),
    "the NumPy model reads for torch's": ("params, config, reader)", "params, config)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CHOICE)
def test_mistakes_of_the_choice_are_seen(mistake: str, monkeypatch) -> None:
    plant(monkeypatch, decoding, CHOICE[mistake])
    with pytest.raises(SEEN):
        sessions.check_choice()


def test_it_is_seen_that_numba_is_not_looked_for(monkeypatch) -> None:
    plant(monkeypatch, decoding, ('not find_spec("numba") or ', ""))
    with pytest.raises(SEEN):
        sessions.check_without_numba(monkeypatch)
