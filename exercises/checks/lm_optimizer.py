"""Chapter 1: a step of AdamW."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

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
            "step 7, with a past, matrices of 2 by 3",
            (
                normal(2, 3, seed=1, scale=3.0),
                normal(2, 3, seed=2),
                normal(2, 3, seed=3),
                normal(2, 3, seed=4) ** 2,
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
        Case(
            "step 1000, from rate on by name",
            (
                normal(4, seed=11),
                normal(4, seed=12),
                normal(4, seed=13),
                normal(4, seed=14) ** 2,
                1000,
            ),
            kwargs={
                "rate": 0.3,
                "decay": 0.2,
                "eps": 1e-3,
                "beta1": 0.99,
                "beta2": 0.999,
            },
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
            "only m corrected",
            "v_hat = v / (1 - beta2**t)",
            "v_hat = v",
            "v began at zero too: after t steps it holds 1 - beta2^t of what it "
            "should.",
        ),
        Wrong(
            "only v corrected",
            "m_hat = m / (1 - beta1**t)",
            "m_hat = m",
            "m began at zero too: after t steps it holds 1 - beta1^t of what it "
            "should.",
        ),
        Wrong(
            "the correction without its power",
            "beta1**t",
            "beta1",
            "Divided by 1 - beta, the means are right in the first step only. After t "
            "steps they hold 1 - beta^t of what they should.",
            (("beta2**t", "beta2"),),
        ),
        Wrong(
            "beta and 1 - beta exchanged",
            "beta1 * m + (1 - beta1) * g",
            "(1 - beta1) * m + beta1 * g",
            "beta, near 1, belongs to the old mean, which forgets slowly. The new "
            "gradient gets 1 - beta.",
            (
                (
                    "beta2 * v + (1 - beta2) * g * g",
                    "(1 - beta2) * v + beta2 * g * g",
                ),
            ),
        ),
        Wrong(
            "the gradient not squared",
            "(1 - beta2) * g * g",
            "(1 - beta2) * g",
            "v is the running mean of the gradient's square.",
        ),
        Wrong(
            "no root",
            "np.sqrt(v_hat)",
            "v_hat",
            "v_hat is a mean of squares: its root has the size of a gradient, and "
            "m_hat divided by it has the size of 1.",
        ),
        Wrong(
            "a plus where the step is taken",
            "w = w - rate",
            "w = w + rate",
            "The gradient points uphill, and the loss is to go down.",
        ),
        Wrong(
            "no decay",
            " + decay * w",
            "",
            "The step has two parts: m_hat over the root of v_hat, and decay * w.",
        ),
        Wrong(
            "the results in another order",
            "return w, m, v",
            "return m, v, w",
            "The new w comes first, then m and v.",
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

CHECKS = [ADAMW]
