"""Chapter 1, backwards: SwiGLU."""

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
            "only the second half of silu'",
            "s * (1 + a * (1 - s))",
            "s * a * (1 - s)",
            "silu(a) = a s(a) is a product: besides a s (1 - s), from the sigmoid, "
            "there is s, from the a in front.",
        ),
        Wrong(
            "silu itself in place of its derivative",
            "s * (1 + a * (1 - s))",
            "s * a",
            "a s is silu(a), and belongs in db. da needs its derivative, s + a s (1 - "
            "s).",
        ),
        Wrong(
            "s where 1 - s belongs",
            "(1 + a * (1 - s))",
            "(1 + a * s)",
            "The sigmoid's derivative is s (1 - s): silu' = s + a s (1 - s).",
        ),
        Wrong(
            "b weighed by the sigmoid alone",
            "db = dh * a * s",
            "db = dh * s",
            "In h = silu(a) * b the factor beside b is silu(a) = a s, not s.",
        ),
        Wrong(
            "what arrives forgotten",
            "da = dh * b",
            "da = b",
            "Those are the derivatives of h. The gradients are dh times them, for da "
            "and for db.",
            (("db = dh * a", "db = a"),),
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

CHECKS = [SWIGLU]
