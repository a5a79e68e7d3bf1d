"""The classic mistakes of MLA, planted in the library's source: a test must see each.

Most have been found in a public implementation. A row names the mistake, the file, the
lines that make it, and the check that fails on it; that the same checks pass on the
right code is what the other tests say.
"""

from functools import partial

import pytest

from minidsv3 import parameters
from minidsv3.mla import numpy_ref as mla
from minidsv3.model import block_numpy_ref as block
from minidsv3.model import numpy_ref as model
from minidsv3.primitives import numpy_ref as primitives
from tests import test_mla
from tests.planting import plant


def forward(form: str = "naive") -> None:
    """Against DeepSeek's formulas."""
    test_mla.check_forward(test_mla.BASE, form)


def with_yarn(form: str = "naive") -> None:
    test_mla.check_forward(test_mla.YARN, form)


def gradients(form: str = "naive") -> None:
    test_mla.check_gradients(test_mla.BASE, form, B=1, T=3)


absorbed = partial(forward, "absorbed")
absorbed_gradients = partial(gradients, "absorbed")

ONE_KEY = "k_R = np.broadcast_to(k_R[:, :, None], (B, S, N_h, k_R.shape[-1]))"
NAIVE_QUERY = "q = np.concatenate([q_C, q_R], axis=-1)"
NAIVE_CORE = "causal_attention_forward(q, k, v, softmax_scale(config))"
NORM_KV = (
    'c_KV, saved_norm = rmsnorm_forward(a, params["kv_a_layernorm.weight"], LATENT_EPS)'
)
NORM_Q = (
    'c_Q, saved_norm = rmsnorm_forward(a, params["q_a_layernorm.weight"], LATENT_EPS)'
)
HEADS_OF_KV = "np.split(kv, [d_h], axis=-1)"
PAIRS = "pairs = np.ascontiguousarray(x).view(rotation.dtype)"
TURNED_BACK = "return turned.view(x.dtype), (rotation,)"
SCALE = "return alpha * m * m"

FORWARD = {
    "a key k^R of each head's own": (
        mla, [(ONE_KEY,
               "k_R = np.stack([np.roll(k_R, i, -1) for i in range(N_h)], axis=2)")],
        forward),
    "a key k^R of each head's own, in the weights": (
        parameters, [("(d_c + d_R, D)", "(d_c + N_h * d_R, D)")],
        test_mla.test_the_released_layer_has_187_million_parameters),
    "content and position scaled apart": (
        mla, [(NAIVE_QUERY,
               "a = config.qk_head_dim**0.5\n"
               "    q = np.concatenate([q_C * a / q_C.shape[-1] ** 0.5, "
               "q_R * a / q_R.shape[-1] ** 0.5], -1)")], forward),
    "scaled by the content's width alone": (
        mla, [(NAIVE_CORE, "causal_attention_forward(q, k, v, d_h**-0.5)")], forward),
    "scaled by the width of the absorbed key": (
        mla, [("alpha = softmax_scale(config)", "alpha = kept.shape[-1] ** -0.5")],
        absorbed),
    "no norm on the latent": (
        mla, [(NORM_KV, NORM_KV + "\n    c_KV = a")], forward),
    "no norm on the queries' latent": (
        mla, [(NORM_Q, NORM_Q + "\n        c_Q = a")], forward),
    "a norm on k^R": (
        mla, [("    kept = np.concatenate([c_KV,",
               "    k_R = k_R / np.sqrt(np.mean(k_R**2, -1, keepdims=True) + 1e-6)\n"
               "    kept = np.concatenate([c_KV,")], forward),
    "one norm over latent and k^R": (
        mla, [(NORM_KV,
               NORM_KV + "\n    r = np.mean(kv**2, -1, keepdims=True) ** -0.5\n"
               '    c_KV = a * r * params["kv_a_layernorm.weight"]')], forward),
    "the latents' norms with rms_norm_eps": (
        mla, [(NORM_KV, NORM_KV.replace("LATENT_EPS", "config.rms_norm_eps"))],
        test_mla.check_latent_eps),
    "the queries' norm with rms_norm_eps": (
        mla, [(NORM_Q, NORM_Q.replace("LATENT_EPS", "config.rms_norm_eps"))],
        test_mla.check_latent_eps),
    "pairs from two halves": (
        primitives, [(PAIRS, "a, b = np.split(x, 2, axis=-1)\n    pairs = a + 1j * b"),
                     (TURNED_BACK,
                      "y = np.concatenate([turned.real, turned.imag], -1)\n"
                      "    return y, (rotation,)")], forward),
    "queries rotated the other way": (
        mla, [("rope_forward(q_R, rotation)", "rope_forward(q_R, rotation.conj())")],
        forward),
    "k^R not rotated": (
        mla, [("k_R, saved_rope = rope_forward(k_R[:, :, None], rotation)",
               "_, saved_rope = rope_forward(k_R[:, :, None], rotation)\n"
               "    k_R = k_R[:, :, None]")], forward),
    "the whole query rotated": (
        mla, [("q_R, saved_rope = rope_forward(q_R, rotation)",
               "q_R, saved_rope = rope_forward(q_R, rotation)\n"
               "    q_C = np.concatenate([rope_forward(q_C[..., :4], rotation)[0], "
               "q_C[..., 4:]], -1)")], forward),
    "rows of the queries: the rotated part first": (
        mla, [("q_C, q_R = np.split(q, [config.qk_nope_head_dim], axis=-1)",
               "q_R, q_C = np.split(q, [config.qk_rope_head_dim], axis=-1)")], forward),
    "rows of kv_a: k^R first": (
        mla, [("a, k_R = np.split(kv, [config.kv_lora_rank], axis=-1)",
               "k_R, a = np.split(kv, [config.qk_rope_head_dim], axis=-1)")], forward),
    "rows of kv_b: the value first": (
        mla, [("k_C, v = " + HEADS_OF_KV,
               "v, k_C = " + HEADS_OF_KV.replace("[d_h]", "[config.v_head_dim]"))],
        forward),
    "rows of kv_b: the value first, absorbed": (
        mla, [("W_UK, W_UV = np.split(W, [config.qk_nope_head_dim], axis=1)",
               "W_UV, W_UK = np.split(W, [config.v_head_dim], axis=1)")], absorbed),
    "rows of kv_b: all keys, then all values": (
        mla, [("k_C, v = " + HEADS_OF_KV,
               "kv = kv.reshape(B, S, -1)\n"
               "    k_C, v = np.split(kv, [N_h * d_h], axis=-1)\n"
               "    k_C, v = (z.reshape(B, S, N_h, -1) for z in (k_C, v))")], forward),
    "m² forgotten": (
        primitives, [(SCALE, "return alpha")], with_yarn),
    "m instead of m²": (
        primitives, [(SCALE, "return alpha * m")], with_yarn),
    "m² on the rotated part only": (
        mla, [(NAIVE_QUERY,
               "m_squared = softmax_scale(config) * config.qk_head_dim**0.5\n"
               "    q = np.concatenate([q_C / m_squared, q_R], axis=-1)")],
        test_mla.check_temperature),
    "m² on the content only": (
        mla, [(NAIVE_QUERY,
               "m_squared = softmax_scale(config) * config.qk_head_dim**0.5\n"
               "    q = np.concatenate([q_C, q_R / m_squared], axis=-1)")],
        test_mla.check_temperature),
    "every frequency divided: interpolation, not YaRN": (
        primitives, [("return theta * (1 - ramp) + theta / yarn.factor * ramp",
                      "return theta / yarn.factor")], with_yarn),
    "absorbed: the value is the whole of what is kept": (
        mla, [("k[..., :d_c], alpha)", "k[..., -d_c:], alpha)")], absorbed),
    "absorbed: k^R left out of the score": (
        mla, [("q = np.concatenate([q_latent, q_R], axis=-1)",
               "q = np.concatenate([q_latent, 0 * q_R], axis=-1)")], absorbed),
}  # fmt: skip

KV_BACK = (
    "    da, dg = rmsnorm_backward(dc_KV, saved_norm)\n    dk_R",
    "    _, dg = rmsnorm_backward(dc_KV, saved_norm)\n    da = dc_KV\n    dk_R",
)
TWO_ROLES = "dkept[..., :d_c] += dv[:, :, 0]"
BACKWARD = {
    "dk^R of one head": (
        mla, [("dk_R.sum(axis=2)", "dk_R[:, :, 0]")], gradients),
    "dk^R averaged over heads": (
        mla, [("dk_R.sum(axis=2)", "dk_R.mean(axis=2)")], gradients),
    "absorbed: the latent's gradient as key only": (
        mla, [(TWO_ROLES, "dv")], absorbed_gradients),
    "absorbed: the latent's gradient as value only": (
        mla, [(TWO_ROLES, "dkept[..., :d_c] = dv[:, :, 0]")], absorbed_gradients),
    "naive: the latent's gradient as key only": (
        mla, [("[dk_C, dv]", "[dk_C, 0 * dv]")], gradients),
    "naive: the latent's gradient as value only": (
        mla, [("[dk_C, dv]", "[0 * dk_C, dv]")], gradients),
    "the rows of dW_UKV in the other order": (
        mla, [("np.concatenate([dW_UK, dW_UV], axis=1)",
               "np.concatenate([dW_UV, dW_UK], axis=1)")], absorbed_gradients),
    "W_UV's gradient from the naive output": (
        mla, [("dW_UV = _outer_by_head(do, o_latent)",
               "dW_UV = _outer_by_head(do, 0 * o_latent)")], absorbed_gradients),
    "the norm of the latent passed over": (mla, [KV_BACK], gradients),
    "the norm of the queries' latent passed over": (
        mla, [("da, dg = rmsnorm_backward(dc_Q, saved_norm)",
               "da, dg = dc_Q, rmsnorm_backward(dc_Q, saved_norm)[1]")], gradients),
    "dk^R not rotated back": (
        mla, [("rope_backward(dk_R[:, :, None], saved_rope)[:, :, 0]", "dk_R")],
        gradients),
    "dq^R not rotated back": (
        mla, [("rope_backward(dq_R, saved_rope)", "dq_R")], gradients),
    "dk^R rotated forward": (
        mla, [("rope_backward(dk_R[:, :, None], saved_rope)[:, :, 0]",
               "rope_forward(dk_R[:, :, None], *saved_rope)[0][:, :, 0]")], gradients),
    "x read by the queries only": (
        mla, [("return dx_q + dx_kv, grads", "return dx_q, grads")], gradients),
    "x read by the latents only": (
        mla, [("return dx_q + dx_kv, grads", "return dx_kv, grads")], gradients),
}  # fmt: skip

EXTEND = "        (kept,) = cache.extend(kept)  # (B, S, d_c + d_R)"
FORM = "absorbed = cache is not None and cache.length > 0"
FIRST = "(cache is None or not cache.length)"
DECODING = {
    "cached before the norm": (  # and normed at each reading: the output is right
        mla, [(EXTEND,
               '        W_a = params["kv_a_proj_with_mqa.weight"]\n'
               "        d_c, raw = config.kv_lora_rank, kept.copy()\n"
               "        raw[..., :d_c] = linear_forward(x, W_a)[0][..., :d_c]\n"
               "        (kept,) = cache.extend(raw)\n"
               "        kept, g = kept.copy(), params['kv_a_layernorm.weight']\n"
               "        kept[..., :d_c] = rmsnorm_forward("
               "kept[..., :d_c], g, LATENT_EPS)[0]")],
        test_mla.check_what_is_kept),
    "cached before the rotation": (  # the past's keys then have no position
        mla, [(EXTEND,
               '        W_a = params["kv_a_proj_with_mqa.weight"]\n'
               "        d_c, T = config.kv_lora_rank, x.shape[1]\n"
               "        (past,) = cache.extend(np.append(kept[..., :d_c], "
               "linear_forward(x, W_a)[0][..., d_c:], -1))\n"
               "        kept = np.append(past[:, :-T], kept, axis=1)")],
        test_mla.check_cached_layer),
    "cached before the rotation: what is kept": (
        mla, [(EXTEND,
               '        W_a = params["kv_a_proj_with_mqa.weight"]\n'
               "        kept[..., config.kv_lora_rank :] = "
               "linear_forward(x, W_a)[0][..., config.kv_lora_rank :]\n" + EXTEND)],
        test_mla.check_what_is_kept),
    "all keys made anew for each token": (
        block, [(FORM, "absorbed = False")], test_mla.check_cost_of_decoding),
    "all keys made anew, and then not used": (
        mla, [("    q_latent = _by_head(q_C, W_UK)",
               "    linear_forward(kept[..., :d_c], W_UKV)\n"
               "    q_latent = _by_head(q_C, W_UK)")],
        test_mla.check_cost_of_decoding),
    "the product of the up-projections formed": (
        mla, [("    q_latent = _by_head(q_C, W_UK)",
               "    W_UV @ W_UK.swapaxes(1, 2)\n"
               "    q_latent = _by_head(q_C, W_UK)")],
        test_mla.check_cost_of_decoding),
    "expanded keys and values kept": (
        mla, [(EXTEND,
               "        (kept, _) = cache.extend(kept, linear_forward("
               "kept[..., : config.kv_lora_rank], params['kv_b_proj.weight'])[0])")],
        test_mla.check_kept_numbers),
    "k^R not kept": (
        mla, [(EXTEND,
               "        d_c, T = config.kv_lora_rank, x.shape[1]\n"
               "        (past,) = cache.extend(kept[..., :d_c])\n"
               "        keys = np.zeros((*past.shape[:2], kept.shape[-1] - d_c))\n"
               "        keys[:, -T:] = kept[..., d_c:]\n"
               "        kept = np.append(past, keys.astype(x.dtype), axis=-1)")],
        test_mla.check_kept_numbers),
    "k^R kept once a head": (
        mla, [(EXTEND,
               "        d_c, N_h = config.kv_lora_rank, config.num_attention_heads\n"
               "        keys = np.tile(kept[..., d_c:], N_h - 1)\n"
               "        (kept,) = cache.extend(np.append(kept, keys, -1))\n"
               "        kept = kept[..., : d_c + config.qk_rope_head_dim]")],
        test_mla.check_kept_numbers),
    "the cache in float64": (
        mla, [(EXTEND,
               "        (kept,) = cache.extend(kept.astype(np.float64))\n"
               "        kept = kept.astype(x.dtype)")],
        test_mla.check_kept_numbers),
    "queries compressed in training only": (
        mla, [("    q_C, q_R, saved_q = queries_forward(",
               f"    if not {FIRST}:\n"
               '        W = params["q_b_proj.weight"] @ params["q_a_proj.weight"]\n'
               "        from dataclasses import replace\n"
               "        q_C, q_R, saved_q = queries_forward({'q_proj.weight': W}, x, "
               "replace(config, q_lora_rank=None), rotation)\n"
               "    else:\n"
               "        q_C, q_R, saved_q = queries_forward(")],
        test_mla.check_cached_layer),
    "cached queries rotated as at position 0": (
        mla, [("queries_forward(params, x, config, rotation)\n    kept",
               f"queries_forward(params, x, config, rotation if {FIRST} else "
               "np.ones_like(rotation))\n    kept")], test_mla.check_cached_layer),
    "positions from 0 in every chunk": (
        model, [("    positions = np.arange(start, start + T)\n",
                 "    positions = np.arange(T)\n")], test_mla.check_cached_model),
    "a chunk's positions one too far": (
        model, [("    positions = np.arange(start, start + T)\n",
                 "    positions = np.arange(start, start + T) + (start > 0)\n")],
        test_mla.check_cached_model),
    "the past is not read": (
        mla, [(EXTEND, "        kept = cache.extend(kept)[0][:, -x.shape[1] :]")],
        test_mla.check_cached_layer),
    "the prompt in the absorbed form": (  # right, and slower
        block, [(FORM, "absorbed = cache is not None")],
        test_mla.check_the_choice_of_form),
}  # fmt: skip

MISTAKES = {**FORWARD, **BACKWARD, **DECODING}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch) -> None:
    module, lines, check = MISTAKES[mistake]
    check()
    plant(monkeypatch, module, *lines)
    with pytest.raises(AssertionError):
        check()
