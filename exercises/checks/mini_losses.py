"""Chapter 5, the whole model: main, MTP and balance losses in one number."""

from types import SimpleNamespace

from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng
from checks.mini_block import MIDDLE, OTHER, SMALL, Widths, config, parameters


def whole(
    B: int, T: int, V: int, L: int, n: int, c: SimpleNamespace, widths: Widths,
    lam: float, alpha: float, seed: int, *eps: float,
) -> Case:  # fmt: skip
    """A model of L blocks and n modules, and a batch."""
    D, N_h = widths[0], c.num_attention_heads
    first = 1000 * seed

    def block(number: int) -> dict:
        return parameters(N_h, widths, 20 * seed + number)

    def module(number: int) -> dict:
        at = first + 10 * number
        return {
            "g_h": normal(D, seed=at),
            "g_e": normal(D, seed=at + 1),
            "M": normal(D, 2 * D, seed=at + 2),
            "block": block(L + number),
            "norm": normal(D, seed=at + 3),
        }

    p = {
        "embed": normal(V, D, seed=first + 900),
        "blocks": [block(layer) for layer in range(L)],
        "norm": normal(D, seed=first + 901),
        "head": normal(V, D, seed=first + 902),
        "modules": [module(k) for k in range(n)],
    }
    ids = rng(first + 903).integers(0, V, (B, T + 1))
    label = (
        f"{L} blocks, {c.first_k_dense_replace} dense, {n} modules, B={B}, T={T}, "
        f"V={V}, D={D}, lam={lam}, alpha={alpha}"
    )
    return Case(label, (p, ids, c, lam, alpha, *eps))


FINAL = 'h = norm(x, p["norm"])'
OWN = 'h = norm(x, own["norm"])'

LOSSES = Check(
    "mini.2",
    returns=("main", "mtp", "balance", "total"),
    cases=lambda: [
        whole(1, 2, 3, 1, 1, config(1, 1), SMALL, 0.5, 0.1, 1),
        whole(2, 5, 7, 3, 2, config(2, 1, 3, 4, 2), MIDDLE, 0.3, 0.7, 2),
        whole(2, 4, 4, 2, 1, config(3, 2, 2, 3, 2), OTHER, 1.7, 2.0, 3, 0.1),
        whole(3, 4, 5, 2, 3, config(2, 0, 2, 3, 1, 1.5), OTHER, 0.9, 0.3, 4, 0.2),
        whole(1, 3, 6, 1, 2, config(2, 1, 1, 4, 3), MIDDLE, 0.2, 0.0, 5),
    ],
    hints=(
        "Go along with the tokens: embedding, blocks, final norm, head; then each "
        "module with the state of the one before. Collect a balance loss wherever a "
        "block is called.",
        "`shifted(h, ids, k)` gives states, tokens and targets of depth k. "
        "`entrance(states, e, g_h, g_e, M, eps)` wants the embedding of those tokens, "
        "and its answer goes into `block(own['block'], x, L + k - 1, c, eps)`.",
        "For k = 1, 2, …: `h, tokens, targets = shifted(h, ids, k)`, then entrance and "
        "block, `h = norm(x, own['norm'])`, and `nats(h, targets)` into a list. The "
        "four numbers: `nats(norm(x, p['norm']), ids[:, 1:])` of the trunk, the list's "
        "mean, the sum of all that the blocks returned as balance, and main + lam * "
        "mtp + alpha * balance.",
    ),
    wrong=(
        Wrong(
            "the final norm missing",
            FINAL,
            "h = x",
            "Head and first module read the state behind the final norm.",
        ),
        Wrong(
            "the final norm missing before the module",
            FINAL + "\n    main = nats(h, ids[:, 1:])",
            'h = x\n    main = nats(norm(x, p["norm"]), ids[:, 1:])',
            "The first module reads h behind the final norm, as the head does; that it "
            "normalises once more is its own affair.",
        ),
        Wrong(
            "the module's last norm missing",
            OWN,
            "h = x",
            "Behind its block a module has a norm of its own; the head, and the module "
            "behind, read what comes out of it.",
        ),
        Wrong(
            "the final norm in the module's place",
            OWN,
            'h = norm(x, p["norm"])',
            "Head and embedding are shared, the last norm is not: own['norm'].",
        ),
        Wrong(
            "the module's balance forgotten",
            f"        loads.append(load)\n        {OWN}",
            f"        {OWN}",
            "The module's block has experts too: its balance loss is one of the sum.",
        ),
        Wrong(
            "the balance of the last layer alone",
            "sum(loads)",
            "loads[-1]",
            "Each layer of experts has its balance loss, and all of them add up.",
        ),
        Wrong(
            "the balance averaged over the layers",
            "sum(loads)",
            "np.mean(loads)",
            "The balance losses of the layers are added; alpha is the weight of each.",
        ),
        Wrong(
            "lam not divided by n",
            "np.mean(further)",
            "sum(further)",
            "lam is the weight of the modules together: each has lam / n.",
        ),
        Wrong(
            "lam left out",
            "lam * mtp",
            "mtp",
            "The modules' losses are weighed with lam.",
        ),
        Wrong(
            "alpha left out",
            "alpha * load",
            "load",
            "The balance losses are weighed with alpha.",
        ),
        Wrong(
            "lam and alpha exchanged",
            "lam * mtp + alpha * load",
            "alpha * mtp + lam * load",
            "lam belongs to the modules' losses, alpha to the balance.",
        ),
        Wrong(
            "the balance loss without effect",
            " + alpha * load",
            "",
            "The balance losses are part of the total.",
        ),
        Wrong(
            "the modules without effect",
            " + lam * mtp",
            "",
            "The modules' losses are part of the total.",
        ),
        Wrong(
            "a module told the token beside its state",
            'e = p["embed"][tokens]',
            'e = p["embed"][ids[:, : -k - 1]]',
            "t_i is what the state has read already. Depth k is told t_(i+k): the "
            "tokens that `shifted` gives.",
        ),
        Wrong(
            "a module told its target",
            'e = p["embed"][tokens]',
            'e = p["embed"][targets]',
            "Depth k is told t_(i+k) and asked for t_(i+k+1), one place further.",
        ),
        Wrong(
            "a module asked for the token that it was told",
            "further.append(nats(h, targets))",
            "further.append(nats(h, tokens))",
            "Depth k is told t_(i+k) and asked for t_(i+k+1), one place further.",
        ),
        Wrong(
            "every module reads the trunk's state",
            "h, tokens, targets = shifted(h, ids, k)",
            "h, tokens, targets = shifted(h_0[:, : len(ids[0]) - k], ids, k)",
            "Depth k reads the states that depth k - 1 has made.",
            ((FINAL, "h_0 = " + FINAL),),
        ),
        Wrong(
            "the modules' blocks counted from 0",
            'block(own["block"], x, layer,',
            'block(own["block"], x, k - 1,',
            "A module stands behind all L blocks: its number is L + k - 1, and it has "
            "experts.",
        ),
        Wrong(
            "the blocks counted from 1",
            "block(own, x, layer, c, eps)",
            "block(own, x, layer + 1, c, eps)",
            "Layers count from 0: block 0 is the first to be dense.",
        ),
        Wrong(
            "the trunk's last block in the module",
            'block(own["block"], x',
            'block(p["blocks"][-1], x',
            "A module shares embedding and head with the model. Its block is its own.",
        ),
        Wrong(
            "the gains of the entrance exchanged",
            'own["g_h"], own["g_e"]',
            'own["g_e"], own["g_h"]',
            "`entrance` takes g_h, the gain of the state, before g_e.",
        ),
        Wrong(
            "the embedding not told to the module",
            "entrance(h, e, own",
            "entrance(h, h, own",
            "A module reads two things: the state, and the embedding of t_(i+k).",
        ),
        Wrong(
            "eps not handed on to the blocks",
            "block(own, x, layer, c, eps)",
            "block(own, x, layer, c)",
            "All norms of the model have the same eps: hand it to `block`.",
            (('own["block"], x, layer, c, eps)', 'own["block"], x, layer, c)'),),
        ),
    ),
    right=(
        "def losses(p, ids, c, lam, alpha, eps=1e-6):\n"
        "    D, T = len(p['norm']), ids.shape[1] - 1\n"
        "    def norm(x, g):\n"
        "        return x / np.sqrt(np.sum(x * x / D, -1)[..., None] + eps) * g\n"
        "    def through(x, g, blocks, first=0):\n"
        "        load = 0.0\n"
        "        for number, own in enumerate(blocks, first):\n"
        "            x, more = block(own, x, number, c, eps)\n"
        "            load = load + more\n"
        "        return norm(x, g), load\n"
        "    def paid(h, asked):\n"
        "        z = h @ p['head'].T\n"
        "        top = z.max(-1)\n"
        "        one = np.eye(len(p['head']))[asked]\n"
        "        total = np.log(np.exp(z - top[..., None]).sum(-1)) + top\n"
        "        return (total - (z * one).sum(-1)).mean()\n"
        "    e = p['embed'][ids]\n"
        "    h, load = through(e[:, :T], p['norm'], p['blocks'])\n"
        "    main, mtp, n = paid(h, ids[:, 1:]), 0.0, len(p['modules'])\n"
        "    for k in range(n):\n"
        "        m, left = p['modules'][k], T - k - 1\n"
        "        u = norm(e[:, k + 1 : k + 1 + left], m['g_e'])\n"
        "        v = norm(h[:, :left], m['g_h'])\n"
        "        x = u @ m['M'][:, :D].T + v @ m['M'][:, D:].T\n"
        "        number = len(p['blocks']) + k\n"
        "        h, more = through(x, m['norm'], [m['block']], number)\n"
        "        mtp += paid(h, ids[:, k + 2 :]) / n\n"
        "        load += more\n"
        "    return main, mtp, load, main + lam * mtp + alpha * load\n",
    ),
)

CHECKS = [LOSSES]
