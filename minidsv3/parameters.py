r"""Names and shapes of every parameter, as DeepSeek's checkpoints have them.

A model is one flat dict from these names to arrays. The table below is pure
arithmetic on a `Config`: it counts the 671B parameters of DeepSeek-V3 without
allocating one of them. In memory the experts of a layer are stacked, (E, I, D); the
file has one name per expert, and ``checkpoints.py`` alone converts.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np

from minidsv3.config import Config

Shapes = dict[str, tuple[int, ...]]


class ParameterError(ValueError):
    """Parameters that do not fit the config: names, shapes or values."""


def shapes(config: Config) -> Shapes:
    """Every parameter of the model: name -> shape, in the order of the forward pass.

    The MTP modules' copies of embedding and head do not exist in memory, so they are
    not listed; ``e_score_correction_bias`` is, though no gradient ever reaches it.
    """
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    table: Shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(L):
        sparse = config.is_moe_layer(layer)
        table |= prefixed(f"model.layers.{layer}.", _block(config, sparse))
    table |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for depth in range(config.num_nextn_predict_layers):
        table |= prefixed(f"model.layers.{L + depth}.", _mtp(config))
    return table


def _block(config: Config, sparse: bool) -> Shapes:
    """One transformer block: two norms, attention, feed-forward."""
    D = config.hidden_size
    attention = mla_shapes(config) if config.uses_mla else _plain_attention(config)
    dense = _swiglu(config.intermediate_size, D)
    return {
        "input_layernorm.weight": (D,),
        **prefixed("self_attn.", attention),
        "post_attention_layernorm.weight": (D,),
        **prefixed("mlp.", moe_shapes(config) if sparse else dense),
    }


def _plain_attention(config: Config) -> Shapes:
    D, d, d_v = config.hidden_size, config.qk_rope_head_dim, config.v_head_dim
    N_h, N_kv = config.num_attention_heads, config.num_key_value_heads
    return {
        "q_proj.weight": (N_h * d, D),
        "k_proj.weight": (N_kv * d, D),
        "v_proj.weight": (N_kv * d_v, D),
        "o_proj.weight": (D, N_h * d_v),
    }


def mla_shapes(config: Config) -> Shapes:
    """Multi-head latent attention: DeepSeek-V3 report eqs. (1)–(11)."""
    D, N_h = config.hidden_size, config.num_attention_heads
    d_h, d_R, d_v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    d_c, d_cq = config.kv_lora_rank, config.q_lora_rank
    if d_cq is None:
        queries = {"q_proj.weight": (N_h * (d_h + d_R), D)}
    else:
        queries = {
            "q_a_proj.weight": (d_cq, D),
            "q_a_layernorm.weight": (d_cq,),
            "q_b_proj.weight": (N_h * (d_h + d_R), d_cq),
        }
    return queries | {
        "kv_a_proj_with_mqa.weight": (d_c + d_R, D),
        "kv_a_layernorm.weight": (d_c,),
        "kv_b_proj.weight": (N_h * (d_h + d_v), d_c),
        "o_proj.weight": (D, N_h * d_v),
    }


def _swiglu(intermediate: int, D: int) -> Shapes:
    return {
        "gate_proj.weight": (intermediate, D),
        "up_proj.weight": (intermediate, D),
        "down_proj.weight": (D, intermediate),
    }


def moe_shapes(config: Config) -> Shapes:
    """Router, stacked routed experts and the shared one: eqs. (12)–(16)."""
    D, E = config.hidden_size, config.n_routed_experts
    width = config.moe_intermediate_size
    table: Shapes = {"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)}
    table |= {f"experts.{k}": (E, *s) for k, s in _swiglu(width, D).items()}
    if config.n_shared_experts:
        shared = _swiglu(config.n_shared_experts * width, D)
        table |= prefixed("shared_experts.", shared)
    return table


def _mtp(config: Config) -> Shapes:
    """One MTP module: two norms, the joining projection, a block, a last norm."""
    D = config.hidden_size
    return {
        "enorm.weight": (D,),
        "hnorm.weight": (D,),
        "eh_proj.weight": (D, 2 * D),
        **_block(config, sparse=config.uses_moe),
        "shared_head.norm.weight": (D,),
    }


def count(config: Config) -> int:
    """Number of parameters in memory, the bias buffers of the routers included."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def initialise(
    config: Config, seed: int, std: float, dtype: type = np.float32
) -> dict[str, np.ndarray]:
    """Fresh parameters: matrices from N(0, std²), norm gains 1, router biases 0.

    Each matrix has a generator of its own, seeded with its name. So two models that
    differ in one mechanism start with equal weights wherever both have them, and an
    experiment compares the mechanism, not the dice.
    """
    return {
        name: _fresh(name, shape, seed, std).astype(dtype)
        for name, shape in shapes(config).items()
    }


def _fresh(name: str, shape: tuple[int, ...], seed: int, std: float) -> np.ndarray:
    if name.endswith("norm.weight"):
        return np.ones(shape)
    if name.endswith("bias"):
        return np.zeros(shape)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.normal(0.0, std, shape)


def prefixed(prefix: str, table: Mapping) -> dict:
    """The same table with ``prefix`` in front of every name."""
    return {prefix + name: value for name, value in table.items()}


def cut(table: Mapping, prefix: str) -> dict:
    """What a room receives: the entries under ``prefix``, with the prefix removed."""
    n = len(prefix)
    return {name[n:]: value for name, value in table.items() if name.startswith(prefix)}


def check(params: Mapping[str, np.ndarray], config: Config) -> None:
    """Raise ParameterError unless names and shapes are exactly those of the config."""
    check_shapes(params, shapes(config))


def check_shapes(params: Mapping[str, np.ndarray], expected: Shapes) -> None:
    """Raise ParameterError unless names and shapes are those of the table."""
    missing = [name for name in expected if name not in params]
    extra = [name for name in params if name not in expected]
    if missing or extra:
        raise ParameterError(
            f"the parameters do not belong to this config: missing {_some(missing)}, "
            f"not expected {_some(extra)}"
        )
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ParameterError(
                f"{name} has shape {params[name].shape}, the config asks for {shape}"
            )


def first_not_finite(table: Mapping[str, np.ndarray]) -> str | None:
    """Name of the first array that holds NaN or infinity, or None."""
    return next((k for k, a in table.items() if not np.isfinite(a).all()), None)


def blame(culprit: str | None) -> str:
    """The end of a message about numbers that are not finite, given whose they are."""
    if culprit:
        return f": {culprit} holds NaN or infinity"
    return (
        " though every parameter is: activations overflowed; float64 helps, or in "
        "training a lower learning rate"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
