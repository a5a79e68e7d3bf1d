"""Chapter 2, backwards: the entrance, and what all depths share."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng
from checks.mtp_module import pair

ENTRANCE_BACKWARD = Check(
    "mtp.3",
    returns=("dh", "de", "dg_h", "dg_e", "dW"),
    cases=lambda: [
        Case(
            "one position, two numbers",
            (
                np.array([[[1.0, -1.0]]]),
                np.array([[[1.0, 2.0]]]),
                np.array([[[0.1, -0.3]]]),
                np.array([1.0, 3.0]),
                np.array([1.0, 0.5]),
                np.array([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, -1.0]]),
                1e-6,
            ),
        ),
        Case(
            "two sequences of three",
            (normal(2, 3, 4, seed=41), *pair(2, 3, 4, 1e-6, 0.2, seed=50)),
        ),
        Case(
            "embeddings as small as eps",
            (normal(1, 4, 5, seed=42), *pair(1, 4, 5, 1e-6, 1e-3, seed=60)),
        ),
        Case(
            "a large eps",
            (normal(3, 1, 2, seed=43), *pair(3, 1, 2, 0.5, 2.0, seed=70)),
        ),
    ],
    hints=(
        "Three steps back: the product with W, the pair, the two norms. A pair laid "
        "side by side comes apart where it was joined.",
        "`dh_prime @ W` is the gradient of the pair, (B, T, 2*D); `np.split(..., 2, "
        "axis=-1)` gives the embedding's half first. dW needs the pair as it went in, "
        "so compute it again.",
        "dW is `np.einsum('btd,btj->dj', dh_prime, joined)`. Then `de, dg_e = "
        "rmsnorm_backward(de_hat, e, g_e, eps)`, and the same for h.",
    ),
    wrong=(
        Wrong(
            "the trunk detached",
            "return dh, de,",
            "return np.zeros_like(h), de,",
            "A module that is cut off from the trunk is a drafter and no more. Its "
            "loss is to change the trunk: nothing is cut.",
        ),
        Wrong(
            "the embedding detached",
            "return dh, de,",
            "return dh, np.zeros_like(e),",
            "The embedding is looked up a second time here, so it hears a second time.",
        ),
        Wrong(
            "the halves exchanged",
            "de_hat, dh_hat = np",
            "dh_hat, de_hat = np",
            "The embedding stood first in the pair, so the first D columns are its.",
        ),
        Wrong(
            "the state first, as in the report",
            "[norm(e, g_e), norm(h, g_h)]",
            "[norm(h, g_h), norm(e, g_e)]",
            "So equation (21) has it. In the released weights the first D columns of W "
            "act on the embedding, forwards and backwards.",
            (("de_hat, dh_hat = np", "dh_hat, de_hat = np"),),
        ),
        Wrong(
            "the two gains exchanged",
            "de, dg_e = rmsnorm_backward(de_hat, e, g_e, eps)",
            "de, dg_e = rmsnorm_backward(de_hat, e, g_h, eps)",
            "g_e belongs to the embedding and g_h to the state, on the way back too.",
            (
                (
                    "rmsnorm_backward(dh_hat, h, g_h, eps)",
                    "rmsnorm_backward(dh_hat, h, g_e, eps)",
                ),
            ),
        ),
        Wrong(
            "dW from what was not normalised",
            "[norm(e, g_e), norm(h, g_h)]",
            "[e, h]",
            "W was multiplied by the normalised pair; its gradient is made of that.",
        ),
        Wrong(
            "the norms skipped on the way back",
            "return dh, de,",
            "return dh_hat, de_hat,",
            "That is what arrives behind the norms. In front of them stand h and e.",
        ),
        Wrong(
            "one gradient for both",
            "return dh, de,",
            "return dh + de, dh + de,",
            "State and embedding have a half of the pair each, and each its own "
            "gradient. They add up only where one array was used twice.",
        ),
    ),
    right=(
        "def entrance_backward(dh_prime, h, e, g_h, g_e, W, eps):\n"
        "    D = W.shape[0]\n"
        "    r = [(np.mean(x * x, -1, keepdims=True) + eps) ** -0.5 for x in (e, h)]\n"
        "    n = [x * s for x, s in zip((e, h), r)]\n"
        "    rows = dh_prime.reshape(-1, D)\n"
        "    both = np.concatenate([n[0] * g_e, n[1] * g_h], -1)\n"
        "    dW = rows.T @ both.reshape(-1, 2 * D)\n"
        "    out = []\n"
        "    for x, s, half, g in zip(n, r, (W[:, :D], W[:, D:]), (g_e, g_h)):\n"
        "        dy = dh_prime @ half\n"
        "        dx = s * (dy * g - x * (dy * g * x).mean(-1, keepdims=True))\n"
        "        out += [dx, (dy * x).sum((0, 1))]\n"
        "    return out[2], out[0], out[3], out[1], dW\n",
        "def entrance_backward(dh_prime, h, e, g_h, g_e, W, eps):\n"
        "    D = len(g_h)\n"
        "    dpair = np.einsum('btd,dj->btj', dh_prime, W)\n"
        "    dh, dg_h = rmsnorm_backward(dpair[..., D:], h, g_h, eps)\n"
        "    de, dg_e = rmsnorm_backward(dpair[..., :D], e, g_e, eps)\n"
        "    he = [g * x / np.sqrt((x ** 2).mean(-1)[..., None] + eps)\n"
        "          for g, x in ((g_e, e), (g_h, h))]\n"
        "    both = ([0, 1], [0, 1])\n"
        "    dW = np.hstack([np.tensordot(dh_prime, x, both) for x in he])\n"
        "    return [dh, de, dg_h, dg_e, dW]\n",
    ),
)


def depths(B: int, T: int, V: int, D: int, n: int, lam: float, seed: int) -> Case:
    """What the head read at each depth, and what came back to the embedding."""
    head, ids = normal(V, D, seed=seed), rng(seed).integers(0, V, (B, T + 1))
    states = [normal(B, T - k, D, seed=seed + 10 + k) for k in range(n + 1)]
    de = [normal(B, T - k, D, seed=seed + 20 + k, scale=0.3) for k in range(n + 1)]
    label = f"batch of {B}, {T} positions, V={V}, D={D}, {n} modules, lam={lam}"
    return Case(label, (head, ids, states, de, lam))


SHARED = Check(
    "mtp.4",
    returns=("dhead", "dembed"),
    cases=lambda: [
        depths(B=1, T=3, V=4, D=2, n=1, lam=0.3, seed=100),
        depths(B=2, T=5, V=6, D=3, n=2, lam=0.3, seed=200),
        depths(B=3, T=4, V=3, D=5, n=3, lam=0.7, seed=300),
        depths(B=2, T=2, V=9, D=2, n=1, lam=2.0, seed=400),
        depths(B=1, T=6, V=5, D=4, n=2, lam=0.0, seed=500),
    ],
    hints=(
        "What is used at n + 1 places hears from n + 1 places, and the gradients add "
        "up. Go through the depths one after the other; only two things change: the "
        "shift, and the weight.",
        "At depth k: logits `states[k] @ head.T`, targets `ids[:, k + 1:]`, looked up "
        "was `ids[:, k:-1]`. The weight is 1 at depth 0 and `lam / n` behind it. de is "
        "weighted already.",
        "In a loop over k: `dlogits = weight * cross_entropy_backward(logits, "
        "targets)`, add `np.einsum('btv,btd->vd', dlogits, states[k])` to dhead, and "
        "`embedding_backward(de[k], ids[:, k:-1], V)` to dembed.",
    ),
    wrong=(
        Wrong(
            "lam not shared among the modules",
            "lam / n if k",
            "lam if k",
            "lam is the weight of all modules together; each has lam / n of it.",
        ),
        Wrong(
            "lam on the trunk's own loss",
            "lam / n if k else 1.0",
            "lam / n",
            "Depth 0 is the main question. Its weight is 1.",
        ),
        Wrong(
            "each depth divided by T",
            "weight = lam / n if k",
            "weight = lam / n * h.shape[1] / states[0].shape[1] if k",
            "So the report's equation (24) prints it. Here each loss is the mean over "
            "its own T - k targets.",
        ),
        Wrong(
            "every depth asked for the next token",
            "ids[:, k + 1 :]",
            "ids[:, 1 : h.shape[1] + 1]",
            "Depth k is asked for t_(i+k+1). Asked for t_(i+1), depth 1 learns to "
            "repeat what it was told.",
        ),
        Wrong(
            "every depth looks up the state's own token",
            "ids[:, k:-1]",
            "ids[:, : h.shape[1]]",
            "Depth k looked up t_(i+k), so its gradient belongs to those rows.",
        ),
        Wrong(
            "the gradient on the rows of the targets",
            "ids[:, k:-1]",
            "ids[:, k + 1 :]",
            "Looked up was what the module was told, t_(i+k), not what it is asked.",
        ),
        Wrong(
            "one mean over the targets of all depths",
            "lam / n if k else 1.0",
            "h.shape[1] / sum(s.shape[1] for s in states)",
            "Each depth's loss is a mean of its own. The trunk's counts whole, each "
            "module's lam / n.",
        ),
        Wrong(
            "the weight a second time",
            "embedding_backward(de[k]",
            "embedding_backward(weight * de[k]",
            "de is a gradient of the whole loss: the weight is in it.",
        ),
        Wrong(
            "the head taken for a copy",
            "        dhead += ",
            "        dhead += (k == 0) * ",
            "The modules speak through the trunk's own head, so it hears from all of "
            "them, not from depth 0 alone.",
        ),
        Wrong(
            "the embedding taken for a copy",
            "        dembed += ",
            "        dembed += (k == 0) * ",
            "The modules look their tokens up in the trunk's own table, so it hears "
            "from all of them.",
        ),
        Wrong(
            "the mean over the depths",
            "return dhead, dembed",
            "return dhead / (n + 1), dembed / (n + 1)",
            "What is used several times, adds; nothing divides it by their number.",
        ),
    ),
    right=(
        "def shared_gradients(head, ids, states, de, lam):\n"
        "    V, T, n = len(head), states[0].shape[1], len(states) - 1\n"
        "    dlogits, rows, looked_up = [], [], []\n"
        "    for k in range(n + 1):\n"
        "        z = np.exp(states[k] @ head.T)\n"
        "        z /= z.sum(-1, keepdims=True)\n"
        "        dz = z - np.eye(V)[ids[:, k + 1:]]\n"
        "        dz /= len(ids) * (T - k)\n"
        "        dlogits.append(dz if k == 0 else dz * (lam / n))\n"
        "        rows.append(states[k])\n"
        "        looked_up.append(ids[:, k:T])\n"
        "    join = lambda parts: np.concatenate(parts, axis=1)\n"
        "    dhead = np.tensordot(join(dlogits), join(rows), ([0, 1], [0, 1]))\n"
        "    dembed = np.zeros(head.shape)\n"
        "    np.add.at(dembed, join(looked_up), join(de))\n"
        "    return dhead, dembed\n",
        "def shared_gradients(head, ids, states, de, lam):\n"
        "    weights = [1] + [lam / len(states[1:])] * len(states[1:])\n"
        "    dhead, dembed = np.zeros_like(head), np.zeros_like(head)\n"
        "    for k, (w, h, d) in enumerate(zip(weights, states, de)):\n"
        "        for b in range(len(ids)):\n"
        "            for i in range(h.shape[1]):\n"
        "                s = head @ h[b, i]\n"
        "                p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()\n"
        "                p[ids[b, i + k + 1]] -= 1\n"
        "                dhead += w * np.outer(p, h[b, i]) / h[..., 0].size\n"
        "                dembed[ids[b, i + k]] += d[b, i]\n"
        "    return dhead, dembed\n",
    ),
)

CHECKS = [ENTRANCE_BACKWARD, SHARED]
