"""Chapter 1: SwiGLU backwards, and a step of AdamW."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

SWIGLU = Check(
    "lm.9",
    returns=("da", "db"),
    cases=lambda: [
        Case(
            "three units",
            (
                np.array([1.0, 2.0, -1.0]),
                np.array([0.0, 2.0, -1.0]),
                np.array([3.0, -1.0, 0.5]),
            ),
        ),
        Case(
            "two axes in front",
            tuple(normal(2, 3, 5, seed=s, scale=2.0) for s in (1, 2, 3)),
        ),
        Case(
            "gates far to either side",
            (
                np.array([[1.0, -2.0, 3.0]]),
                np.array([[-800.0, 800.0, -20.0]]),
                np.array([[2.0, 1.0, -1.0]]),
            ),
        ),
    ],
    hints=(
        "h is a product of silu(a) and b: each factor's gradient is weighed by the "
        "other factor. And silu(a) is itself a product, a times sigmoid(a).",
        "With s the sigmoid of a, whose derivative is `s * (1 - s)`, silu has the "
        "derivative `s + a * s * (1 - s)`. All arrays have the same shape, and "
        "nothing is summed.",
        "`da = dh * b * s * (1 + a * (1 - s))` and `db = dh * a * s`.",
    ),
    wrong=(
        Wrong(
            "half of silu' forgotten",
            "s * (1 + a * (1 - s))",
            "s",
            "silu(a) = a s(a) is a product: besides s there is a s (1 - s). A model "
            "trains without it, only not as well.",
        ),
        Wrong(
            "the sigmoid's derivative instead of silu's",
            "s * (1 + a * (1 - s))",
            "s * (1 - s)",
            "s (1 - s) is the derivative of the sigmoid; silu is a times the sigmoid.",
        ),
        Wrong(
            "b weighed by a instead of silu(a)",
            "db = dh * a * s",
            "db = dh * a",
            "In h = silu(a) * b the factor beside b is silu(a) = a s, not a.",
        ),
        Wrong(
            "the two gradients exchanged",
            "return da, db",
            "return db, da",
            "da comes first: the gradient of a, which goes through silu.",
        ),
        Wrong(
            "the other factor forgotten",
            "da = dh * b * s",
            "da = dh * s",
            "h is silu(a) times b, so what reaches silu(a) is dh * b.",
        ),
    ),
    right=(
        "def swiglu_backward(dh, a, b):\n"
        "    s = np.where(a < 0, np.exp(-abs(a)), 1.0) / (1 + np.exp(-np.abs(a)))\n"
        "    silu = a * s\n"
        "    return dh * b * (silu + s * (1 - silu)), dh * silu\n",
        "def swiglu_backward(dh, a, b):\n"
        "    s = (1 + np.tanh(a / 2)) / 2\n"
        "    da = (s + a * s * (1 - s)) * b * dh\n"
        "    return da.astype(np.float32), (a * s * dh).astype(np.float32)\n",
    ),
)

ADAMW = Check(
    "lm.10",
    returns=("w", "m", "v"),
    cases=lambda: [
        Case(
            "the first step",
            (
                np.array([1.0, -2.0]),
                np.array([0.5, -0.1]),
                np.zeros(2),
                np.zeros(2),
                1,
                0.1,
            ),
        ),
        Case(
            "step 7, with a past",
            (
                normal(5, seed=1, scale=3.0),
                normal(5, seed=2),
                normal(5, seed=3),
                normal(5, seed=4) ** 2,
                7,
                0.01,
            ),
        ),
        Case(
            "gradients as small as eps",
            (
                normal(4, seed=5),
                normal(4, seed=6, scale=1e-8),
                np.zeros(4),
                np.zeros(4),
                1,
                0.5,
            ),
        ),
        Case(
            "betas below a half, another eps and decay",
            (
                normal(3, seed=7),
                normal(3, seed=8),
                normal(3, seed=9),
                normal(3, seed=10) ** 2,
                3,
                0.2,
                0.4,
                0.3,
                0.3,
                0.5,
            ),
        ),
    ],
    hints=(
        "A mean that starts at zero has seen only `1 - beta**t` of what it should "
        "have after t steps. And the decay is about the weight, not about its "
        "gradient's noise.",
        "m and v are returned as running means, uncorrected; the corrected copies "
        "`m_hat` and `v_hat` are used for this step only.",
        "`w - rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)`",
    ),
    wrong=(
        Wrong(
            "the running means uncorrected",
            "    m_hat = m / (1 - beta1**t)\n    v_hat = v / (1 - beta2**t)\n",
            "    m_hat, v_hat = m, v\n",
            "Both means began at zero; after t steps they hold 1 - beta^t of what "
            "they should. Divide by that.",
        ),
        Wrong(
            "the decay inside the gradient",
            "    m = beta1 * m",
            "    g = g + decay * w\n    decay = 0\n    m = beta1 * m",
            "That is L2 in Adam: sqrt(v) divides the decay away. The W in AdamW is a "
            "decay beside the update.",
        ),
        Wrong(
            "eps under the root",
            "(np.sqrt(v_hat) + eps)",
            "np.sqrt(v_hat + eps)",
            "eps is added to the root. Under it, 1e-8 would act like 1e-4.",
        ),
        Wrong(
            "steps counted from 0",
            "    m_hat = m / (1 - beta1**t)\n    v_hat = v / (1 - beta2**t)\n",
            "    m_hat = m / (1 - beta1 ** (t + 1))\n"
            "    v_hat = v / (1 - beta2 ** (t + 1))\n",
            "t is 1 in the first step, when the means hold 1 - beta of the gradient.",
        ),
        Wrong(
            "the decay without the learning rate",
            "rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)",
            "rate * m_hat / (np.sqrt(v_hat) + eps) - decay * w",
            "The learning rate multiplies both: a decay of 0.1 a step would be the "
            "end of every weight.",
        ),
        Wrong(
            "the corrected means returned",
            "return w, m, v",
            "return w, m_hat, v_hat",
            "Keep the running means as they are; the correction is for this step, "
            "and would be applied again in the next.",
        ),
    ),
    right=(
        "def adamw_step(w, g, m, v, t, rate, beta1=.9, beta2=.95, eps=1e-8,\n"
        "               decay=.1):\n"
        "    m = m + (1 - beta1) * (g - m)\n"
        "    v = v + (1 - beta2) * (g ** 2 - v)\n"
        "    root = np.sqrt(v) / np.sqrt(1 - beta2 ** t) + eps\n"
        "    step = m / root / (1 - beta1 ** t)\n"
        "    return (1 - rate * decay) * w - rate * step, m, v\n",
        "def adamw_step(w, g, m, v, t, rate, *rest, **more):\n"
        "    names = dict(zip(('beta1', 'beta2', 'eps', 'decay'), rest), **more)\n"
        "    o = dict(beta1=.9, beta2=.95, eps=1e-8, decay=.1) | names\n"
        "    m = o['beta1'] * m + (1 - o['beta1']) * g\n"
        "    v = o['beta2'] * v + (1 - o['beta2']) * np.square(g)\n"
        "    a, b = m / (1 - o['beta1'] ** t), v / (1 - o['beta2'] ** t)\n"
        "    w = w - rate * a / (b ** 0.5 + o['eps']) - rate * o['decay'] * w\n"
        "    return w, m, v\n",
    ),
)

CHECKS = [SWIGLU, ADAMW]
