r"""Block-scaled FP8: a matrix in 8 bits a number, with one float32 scale a block.

A number of type E4M3 has 4 bits of exponent and 3 of mantissa: ±448 at the most, 2⁻⁹ at
the least, and no infinity. So each block of a matrix is stretched onto that range:

.. math:: s = \max|W_{block}| / 448, \qquad q = \mathrm{round}(W / s),
          \qquad W \approx q\,s

Weights have blocks of 128 × 128, activations tiles of 1 × 128 (DeepSeek-V3 report,
section 3.3.2). The released files call s ``weight_scale_inv``, though one multiplies by
it. The last blocks of a row or column may be smaller: 576 rows have five scales.
"""

import math
import re

import ml_dtypes
import numpy as np

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = float(ml_dtypes.finfo(FP8).max)  # 448
BLOCK = (128, 128)
TILE = (1, 128)
# Below this a float32 loses digits, and the scale of a block of zeros would be 0 and
# q = 0/0. DeepSeek's kernels stop at amax = 1e-4, which suits activations; weights of
# that size are common here, and a scale that does not fit them would flush them to 0.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)  # of each byte
# The matrices that DeepSeek-V3 releases in FP8. Embedding, head, norms and router are
# kept (report, section 3.3.1). So is eh_proj, to judge by the loaders of vLLM and
# SGLang, which build it without scales; that the files agree is unconfirmed.
MATRICES = re.compile(
    r"\.(self_attn\.([qkvo]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj)"
    r"|mlp\.(experts\.(\d+\.)?|shared_experts\.)?(gate|up|down)_proj)\.weight$"
)


def is_quantised(name: str) -> bool:
    """Whether the released files have this weight in FP8; experts stacked or apart."""
    return bool(MATRICES.search(name))


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple:
    """How many blocks cover a matrix (out, in): (⌈out / rows⌉, ⌈in / columns⌉)."""
    return tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))


def quantise(
    W: np.ndarray, block: tuple[int, int] = BLOCK, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in) -> q (out, in) in FP8, and float32 scales (⌈out/rows⌉, ⌈in/columns⌉).

    W is read as float32. power_of_two rounds the scales up to powers of two, whose
    product with q is exact (DeepSeek-V3.1's ``ue8m0``); it costs up to a bit of range.
    Raises ValueError for NaN or infinity, which FP8 would keep as NaN or make NaN.
    """
    W = np.asarray(W, np.float32)
    rows, columns = (np.arange(0, n, b) for n, b in zip(W.shape, block, strict=True))
    amax = np.maximum.reduceat(np.abs(W), rows, axis=0)  # (⌈out/rows⌉, in)
    amax = np.maximum.reduceat(amax, columns, axis=1)  # (⌈out/rows⌉, ⌈in/columns⌉)
    if not np.isfinite(amax).all():
        i, j = np.argwhere(~np.isfinite(amax))[0].tolist()
        raise ValueError(f"quantise: block ({i}, {j}) holds NaN or infinity")
    scale_inv = np.maximum(amax / np.float32(LARGEST), np.float32(SMALLEST_SCALE))
    if power_of_two:
        mantissa, exponent = np.frexp(scale_inv)  # the mantissa is in [1/2, 1)
        scale_inv = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    # FP8 has no infinity, and from 464 on a cast gives NaN. A quotient is at most 448,
    # and a rounding of that, which comes down to 448.
    ratio = W / _spread(scale_inv, block, W.shape)  # (out, in)
    return ratio.astype(FP8), scale_inv


def dequantise(
    q: np.ndarray,
    scale_inv: np.ndarray,
    dtype: type = np.float32,
    block: tuple[int, int] = BLOCK,
) -> np.ndarray:
    """Undo `quantise`: each q times the scale of its block, (out, in) in ``dtype``.

    Computed in float32 and rounded once. Raises ValueError if the scales are not one a
    block (transposed, say).
    """
    if scale_inv.shape != scale_shape(q.shape, block):
        raise ValueError(
            f"dequantise: a matrix {q.shape} in blocks of {block} has scales "
            f"{scale_shape(q.shape, block)}, not {scale_inv.shape}"
        )
    W = VALUES[q.view(np.uint8)]  # a table: three times as fast as a cast
    W *= _spread(scale_inv.astype(np.float32), block, q.shape)
    return W.astype(dtype, copy=False)


def _spread(scales: np.ndarray, block: tuple, shape: tuple) -> np.ndarray:
    """Each scale repeated over its block, cut at the ragged edges: (out, in)."""
    (rows, columns), (out, width) = block, shape
    return scales.repeat(rows, axis=0)[:out].repeat(columns, axis=1)[:, :width]
