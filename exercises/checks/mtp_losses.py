"""Chapter 2, what all depths share: the gradients of the head and of the embedding."""

from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


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

CHECKS = [SHARED]
