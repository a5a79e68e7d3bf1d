r"""The primitives in NumPy, each with its backward pass written by hand.

Every pair follows one pattern::

    y, saved = name_forward(x, ...)
    dx, dW   = name_backward(dy, saved)

``dy`` is the gradient of the loss with respect to ``y`` and has the shape of ``y``;
``dx`` has the shape of ``x``. Vectors are rows, so a linear layer is ``x @ W.T`` with
``W`` of shape (out, in), as in DeepSeek's checkpoints. Nothing here keeps state, and
everything runs in the dtype it is given, float32 or float64.
"""

import numpy as np

from minidsv3.config import Config

Array = np.ndarray


# --- linear and embedding ---------------------------------------------------------


def linear_forward(x: Array, W: Array) -> tuple[Array, tuple]:
    r"""Linear layer without bias, :math:`y = x W^\top`.

    Shapes: x (..., I), W (O, I) -> y (..., O). Raises ValueError if I differs.
    """
    if x.shape[-1] != W.shape[1]:
        raise ValueError(
            f"linear: the last axis of x is {x.shape[-1]}, but W of shape {W.shape} "
            f"takes {W.shape[1]} (W is stored as (out, in))"
        )
    return x @ W.T, (x, W)


def linear_backward(dy: Array, saved: tuple) -> tuple[Array, Array]:
    r"""Gradients of the linear layer: :math:`dx = dy\,W`, :math:`dW = dy^\top x`.

    dW sums over every position of every sequence: they all used the same W.
    """
    x, W = saved
    dx = dy @ W
    x_rows = x.reshape(-1, x.shape[-1])  # (N, I)
    dy_rows = dy.reshape(-1, dy.shape[-1])  # (N, O)
    return dx, dy_rows.T @ x_rows


def embedding_forward(ids: Array, W: Array) -> tuple[Array, tuple]:
    """Row lookup: ids (B, T) of integers, W (V, D) -> (B, T, D).

    NumPy reads the id -1 as the last row, so a negative id is refused here, as is one
    beyond the table. Raises ValueError naming the id.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= len(W)):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {bad} is outside the vocabulary 0…{len(W) - 1}")
    return W[ids], (ids, W.shape)


def embedding_backward(dy: Array, saved: tuple) -> Array:
    """Gradient of the lookup: row v collects dy from each position that read it.

    ``dW[ids] += dy`` would keep only one of several equal ids; ``np.add.at`` adds all.
    """
    ids, shape = saved
    dW = np.zeros(shape, dy.dtype)
    np.add.at(dW, ids.ravel(), dy.reshape(-1, shape[1]))
    return dW


# --- RMSNorm ----------------------------------------------------------------------


def rmsnorm_forward(x: Array, g: Array, eps: float) -> tuple[Array, tuple]:
    r"""RMSNorm, :math:`y = g ⊙ x\,r` with :math:`r = (\overline{x^2}+ε)^{-1/2}`.

    Shapes: x (..., D), g (D,) -> y (..., D). eps keeps a row of zeros finite.
    """
    r = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)  # (..., 1)
    return g * (x * r), (x, g, r)


def rmsnorm_backward(dy: Array, saved: tuple) -> tuple[Array, Array]:
    r"""Gradient of RMSNorm; the second term is what the shared r adds.

    :math:`dx = r\,(g⊙dy) - x\,\frac{r^3}{D}\sum_j (g⊙dy⊙x)_j`,
    :math:`dg = \sum dy ⊙ x\,r` over all rows.
    """
    x, g, r = saved
    dz = g * dy  # (..., D)
    dot = np.mean(dz * x, axis=-1, keepdims=True)  # (..., 1)
    dx = r * dz - x * (r**3 * dot)
    dg = np.sum((dy * x * r).reshape(-1, len(g)), axis=0)  # (D)
    return dx, dg


# --- rotary positions ---------------------------------------------------------------


def rope_frequencies(config: Config) -> Array:
    r"""Angle per position of each pair, :math:`θ_j = \text{rope\_theta}^{-2j/d_R}`.

    With ``rope_scaling`` set, YaRN's: fast pairs keep their frequency, slow pairs are
    slowed by ``factor``, those between are blended (DeepSeek's inference code, and
    their report's §4.3). Returns float64 of shape (d_R/2,), radians per position.
    """
    d_R, yarn = config.qk_rope_head_dim, config.rope_scaling
    j = np.arange(d_R // 2)
    theta = config.rope_theta ** (-2.0 * j / d_R)  # (d_R/2)
    if yarn is None:
        return theta

    def pair_that_turns(n: float) -> float:
        """The (fractional) j whose pair makes n turns in the original context."""
        radius = yarn.original_max_position_embeddings / (2 * np.pi * n)
        return d_R * np.log(radius) / (2 * np.log(config.rope_theta))

    low = max(np.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(np.ceil(pair_that_turns(yarn.beta_slow)), d_R - 1)
    # equal bounds would divide by zero; the released code widens them likewise
    ramp = np.clip((j - low) / max(high - low, 1e-3), 0, 1)  # (d_R/2)
    return theta * (1 - ramp) + theta / yarn.factor * ramp


def softmax_scale(config: Config) -> float:
    r"""What attention scores are multiplied with, :math:`α = m^2/\sqrt{d_h+d_R}`.

    m is 1 without YaRN, else :math:`0.1\,\text{mscale\_all\_dim}\,\ln s + 1`. It
    applies to the whole score, the part without positions too, as in both released
    codebases.
    """
    alpha = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is None or yarn.factor <= 1:
        return alpha
    m = 0.1 * yarn.mscale_all_dim * float(np.log(yarn.factor)) + 1
    return alpha * m * m


def rope_rotation(positions: Array, frequencies: Array, dtype: np.dtype) -> Array:
    r"""The unit complex numbers :math:`e^{i\,p\,θ_j}`.

    Shapes: positions (T,) or (B, T), any integers; frequencies (d_R/2,)
    -> (..., T, d_R/2). Angles are formed in float64 and rounded once at the end: at
    position 100,000 a float32 angle is off by up to 0.004 radians.
    """
    angles = positions[..., None] * frequencies  # (..., T, d_R/2)
    return np.exp(1j * angles).astype(np.result_type(dtype, np.complex64))


def rope_forward(x: Array, rotation: Array) -> tuple[Array, tuple]:
    r"""Turn each pair of coordinates by its angle (DeepSeek's interleaved pairs).

    Coordinates 2j and 2j+1 are one complex number, multiplied by
    :math:`e^{i\,p\,θ_j}`. Checkpoints whose pairs are (j, j + d_R/2) need their rows
    permuted first. Shapes: x (B, T, H, d_R), rotation (T, d_R/2) or (B, T, d_R/2).
    Raises ValueError if shapes or precisions do not belong together.
    """
    if x.dtype.kind != "f" or 2 * x.itemsize != rotation.itemsize:
        raise ValueError(
            f"rope: x is {x.dtype} and rotation {rotation.dtype}; needs float32 with "
            "complex64 or float64 with complex128"
        )
    if x.shape[-3] != rotation.shape[-2] or x.shape[-1] != 2 * rotation.shape[-1]:
        raise ValueError(
            f"rope: x of shape {x.shape} needs one position per row of axis 1 and "
            f"{x.shape[-1]} / 2 angles, got rotation of shape {rotation.shape}"
        )
    pairs = np.ascontiguousarray(x).view(rotation.dtype)  # (B, T, H, d_R/2)
    turned = pairs * rotation[..., None, :]  # (B, T, H, d_R/2)
    return turned.view(x.dtype), (rotation,)


def rope_backward(dy: Array, saved: tuple) -> Array:
    """Gradient of a rotation: the rotation back by the same angle."""
    (rotation,) = saved
    dx, _ = rope_forward(dy, rotation.conj())
    return dx


# --- softmax and cross-entropy ------------------------------------------------------


def softmax(x: Array) -> Array:
    """Softmax over the last axis; subtracting the row's maximum keeps exp finite."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


def softmax_backward(dP: Array, P: Array) -> Array:
    r"""Gradient of softmax, (..., N): :math:`dS = P ⊙ (dP - \sum_j P_j\,dP_j)`."""
    return P * (dP - np.sum(P * dP, axis=-1, keepdims=True))


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[float, tuple]:
    r"""Mean of :math:`-\log \mathrm{softmax}(z)_{target}`, in nats.

    Shapes: logits (..., V), targets (...) of integers -> a float. Computed from
    ``log-sum-exp(z) - z[target]``: no probability is formed and then logged, so
    a target of probability 1e-300 still has its exact loss. The mean runs in float64.
    """
    V = logits.shape[-1]
    z = logits.reshape(-1, V)  # (N, V)
    t = targets.reshape(-1)  # (N)
    if len(t) != len(z):
        raise ValueError(
            f"cross-entropy: {len(z)} rows of logits, {len(t)} targets; give one each"
        )
    if len(t) == 0:
        raise ValueError("cross-entropy: no targets, so there is no mean to take")
    if t.min() < 0 or t.max() >= V:
        bad = t.min() if t.min() < 0 else t.max()
        raise ValueError(f"target id {bad} is outside the vocabulary 0…{V - 1}")
    z = z - z.max(axis=-1, keepdims=True)  # (N, V)
    log_sum = np.log(np.exp(z).sum(axis=-1))  # (N)
    losses = log_sum - z[np.arange(len(t)), t]  # (N)
    return float(losses.mean(dtype=np.float64)), (z, log_sum, t, logits.shape)


def cross_entropy_backward(dloss: float, saved: tuple) -> Array:
    r"""Gradient with softmax fused in: :math:`dz = (p - \text{onehot})\,/\,N`."""
    z, log_sum, t, shape = saved
    dz = np.exp(z - log_sum[:, None])  # (N, V)
    dz[np.arange(len(t)), t] -= 1
    dz *= dloss / len(t)
    return dz.reshape(shape)  # (..., V)


# --- drawing a token ---------------------------------------------------------------


def draw(law: Array, rng: np.random.Generator) -> Array:
    """One token a row: law (B, V) -> ids (B,), by inverting the cumulative sum."""
    u = rng.random((len(law), 1)) * law.sum(axis=-1, keepdims=True)  # (B, 1)
    cumulative = np.cumsum(law, axis=-1)  # (B, V)
    return np.minimum((cumulative <= u).sum(axis=-1), _last_possible(law))


def _last_possible(law: Array) -> Array:
    """Last id with any probability: rounding must not push a draw beyond it."""
    V = law.shape[-1]
    return V - 1 - np.argmax(law[:, ::-1] > 0, axis=-1)  # (B)


# --- the feed-forward ---------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), exact in both tails.

    Far on the left exp(-x) overflows to infinity, whose reciprocal is the right answer,
    0; NumPy would warn of it.
    """
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def silu_forward(a: Array) -> tuple[Array, tuple]:
    r"""SiLU (swish), :math:`a\,σ(a)`, elementwise."""
    s = sigmoid(a)
    return a * s, (a, s)


def silu_backward(dy: Array, saved: tuple) -> Array:
    r"""Gradient of SiLU: :math:`dy ⊙ σ(a)(1 + a(1 - σ(a)))`."""
    a, s = saved
    return dy * (s * (1 + a * (1 - s)))


def swiglu_forward(params: dict[str, Array], x: Array) -> tuple[Array, tuple]:
    r"""Gated feed-forward, :math:`W_{down}(\mathrm{silu}(W_{gate}x) ⊙ W_{up}x)`.

    Parameters: gate_proj.weight and up_proj.weight (I, D), down_proj.weight (D, I).
    Shapes: x (..., D) -> (..., D).
    """
    a, saved_gate = linear_forward(x, params["gate_proj.weight"])
    b, saved_up = linear_forward(x, params["up_proj.weight"])
    gated, saved_silu = silu_forward(a)
    y, saved_down = linear_forward(gated * b, params["down_proj.weight"])
    return y, (saved_gate, saved_up, saved_silu, gated, b, saved_down)


def swiglu_backward(dy: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    """Gradients of the gated feed-forward: a product, so each factor weighs the other.

    Returns dx (..., D) and the gradients under the parameters' names.
    """
    saved_gate, saved_up, saved_silu, gated, b, saved_down = saved
    dh, dW_down = linear_backward(dy, saved_down)
    db = dh * gated
    da = silu_backward(dh * b, saved_silu)
    dx_up, dW_up = linear_backward(db, saved_up)
    dx_gate, dW_gate = linear_backward(da, saved_gate)
    grads = {
        "gate_proj.weight": dW_gate,
        "up_proj.weight": dW_up,
        "down_proj.weight": dW_down,
    }
    return dx_up + dx_gate, grads
