"""Chapter 1, where gradients begin and end: the loss, the embedding."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

CROSS_ENTROPY = Check(
    "lm.4",
    returns=("dlogits",),
    cases=lambda: [
        Case(
            "two positions, three ids",
            (np.array([[[1.0, 0.0, -1.0], [2.0, 2.0, 0.0]]]), np.array([[0, 2]])),
        ),
        Case(
            "three sequences of two",
            (normal(3, 2, 5, seed=1), np.array([[4, 0], [1, 1], [3, 2]])),
        ),
        Case(
            "very sure and wrong",
            (np.array([[[0.0, 800.0, 0.0, -5.0]]]), np.array([[0]])),
        ),
        Case(
            "two sequences of four",
            (normal(2, 4, 3, seed=2), np.array([[0, 1, 2, 2], [1, 1, 0, 2]])),
        ),
    ],
    hints=(
        "Write the loss of one position as the logarithm of the sum of all `exp(z)`, "
        "minus the target's z, and take the derivative of each term.",
        "`softmax(logits)` has the shape of the answer. `np.eye(V)[targets]` is "
        "one-hot and has it too. The loss is a mean over how many positions?",
        "`(softmax(logits) - np.eye(V)[targets]) / targets.size`, with V the last "
        "axis of `logits`.",
    ),
    wrong=(
        Wrong(
            "the gradient of the sum, not of the mean",
            " / targets.size",
            "",
            "The loss is a mean over all B*T positions, so each position's gradient "
            "is divided by B*T.",
        ),
        Wrong(
            "divided by the number of sequences",
            "targets.size",
            "len(targets)",
            "len(targets) is B. The mean runs over all B*T positions: targets.size.",
        ),
        Wrong(
            "divided by the number of positions of one sequence",
            "targets.size",
            "targets.shape[1]",
            "That is T. The mean runs over all B*T positions: targets.size.",
        ),
        Wrong(
            "divided by the number of logits",
            "targets.size",
            "logits.size",
            "The loss is a mean over B*T positions, one term each. The V logits of a "
            "position are no terms of it.",
        ),
        Wrong(
            "only what was expected divided",
            "(softmax(logits) - onehot) / targets.size",
            "softmax(logits) - onehot / targets.size",
            "The mean divides the whole difference: a pair of brackets is missing.",
        ),
        Wrong(
            "only what came divided",
            "(softmax(logits) - onehot) / targets.size",
            "softmax(logits) / targets.size - onehot",
            "The mean divides the whole difference, the 1 at the target too.",
        ),
        Wrong(
            "every target struck at every position",
            "np.eye(logits.shape[-1])[targets]",
            "np.zeros(logits.shape)\n    onehot[:, :, targets] = 1.0",
            "[:, :, targets] means all positions, each with all targets. One target "
            "for each position: index with b and t too, or use one-hot rows.",
        ),
        Wrong(
            "what came minus what was expected",
            "softmax(logits) - onehot",
            "onehot - softmax(logits)",
            "That is the direction in which to move. The gradient points uphill, and "
            "the update subtracts it.",
        ),
        Wrong(
            "only the target's logit moves",
            "softmax(logits) - onehot",
            "(softmax(logits) - 1) * onehot",
            "The sum inside the logarithm contains every logit, so each other one "
            "has gradient p, not 0.",
        ),
    ),
    right=(
        "def cross_entropy_backward(logits, targets):\n"
        "    z = logits - logits.max(-1, keepdims=True)\n"
        "    dz = np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True)))\n"
        "    b, t = np.indices(targets.shape)\n"
        "    dz[b, t, targets] -= 1\n"
        "    dz /= targets.shape[0] * targets.shape[1]\n"
        "    return dz\n",
        "def cross_entropy_backward(logits, targets):\n"
        "    hit = targets[..., None] == np.arange(logits.shape[-1])\n"
        "    dz = np.where(hit, softmax(logits) - 1, softmax(logits))\n"
        "    return (dz / hit[..., 0].size).astype(np.float32)\n",
    ),
)

EMBEDDING = Check(
    "lm.5",
    returns=("dW",),
    cases=lambda: [
        Case(
            "id 1 twice, id 3 once, of four",
            (
                np.array([[[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]]),
                np.array([[1, 3, 1]]),
                4,
            ),
        ),
        Case(
            "repeats within and between sequences",
            (normal(2, 5, 3, seed=1), np.array([[6, 2, 2, 0, 6], [6, 1, 6, 6, 2]]), 8),
        ),
        Case("one id everywhere", (normal(3, 2, 4, seed=2), np.full((3, 2), 1), 2)),
        Case("last id of the table", (normal(1, 1, 2, seed=3), np.array([[9]]), 10)),
    ],
    hints=(
        "A lookup is a product with one-hot rows. What is used twice, adds.",
        "Start with zeros of shape (V, D). `dW[ids] += dy` computes all sums from "
        "the old rows and then writes them one over the other. NumPy has an "
        "`add.at`.",
        "`dW = np.zeros((V, D))`, then `np.add.at(dW, ids, dy)`.",
    ),
    wrong=(
        Wrong(
            "each occurrence replaces the one before",
            "np.add.at(dW, ids, dy)",
            "dW[ids] += dy",
            "Where an id occurs more than once, only the last gradient is left. dW[i] "
            "= ... does that, and so does dW[ids] += dy: NumPy reads all rows first.",
        ),
        Wrong(
            "repeats within a sequence lost",
            "    np.add.at(dW, ids, dy)\n",
            "    for row, d in zip(ids, dy):\n        dW[row] += d\n",
            "An id may occur twice in one sequence, and dW[ids[b]] += dy[b] then keeps "
            "the last gradient of that sequence only.",
        ),
        Wrong(
            "repeats between sequences lost",
            "    np.add.at(dW, ids, dy)\n",
            "    for t in range(ids.shape[1]):\n        dW[ids[:, t]] += dy[:, t]\n",
            "Two sequences may have the same id at the same place, and dW[ids[:, t]] "
            "+= dy[:, t] then keeps the gradient of the last one only.",
        ),
        Wrong(
            "divided by the number of positions",
            "    return dW\n",
            "    return dW / ids.size\n",
            "If the loss is a mean, its 1/(B*T) is in dy already. Here the gradients "
            "only add up.",
        ),
        Wrong(
            "the mean over the occurrences",
            "    return dW\n",
            "    counts = np.bincount(ids.ravel(), minlength=V)[:, None]\n"
            "    return dW / np.maximum(counts, 1)\n",
            "The row was used once for each occurrence, so its gradients add up; "
            "nothing divides them.",
        ),
        Wrong(
            "only the first occurrence counts",
            "    np.add.at(dW, ids, dy)\n",
            "    seen, first = np.unique(ids, return_index=True)\n"
            "    dW[seen] = dy.reshape(-1, dy.shape[-1])[first]\n",
            "Every position that read the row adds its gradient, not only the first.",
        ),
        Wrong(
            "no sum over the sequences",
            "    np.add.at(dW, ids, dy)\n",
            "    np.add.at(dW, ids[0], dy[0])\n",
            "All B sequences read the same table, so all of them contribute.",
        ),
    ),
    right=(
        "def embedding_backward(dy, ids, V):\n"
        "    return np.einsum('btv,btd->vd', np.eye(V)[ids], dy)\n",
        "def embedding_backward(dy, ids, V):\n"
        "    dW = np.zeros((V, dy.shape[-1]), np.float32)\n"
        "    for row, i in zip(dy.reshape(-1, dy.shape[-1]), ids.ravel()):\n"
        "        dW[i] += row\n"
        "    return dW\n",
    ),
)

CHECKS = [CROSS_ENTROPY, EMBEDDING]
