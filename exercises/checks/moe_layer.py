"""Chapter 3, all of it together: a layer, forwards and backwards."""

from collections.abc import Callable

from grader.compare import ByName, WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal

NAMES = ("W", "W_gate", "W_up", "W_down", "S_gate", "S_up", "S_down")


def layer(
    B: int, T: int, D: int, wide: int, J: int, n_group: int, size: int, open_: int,
    K: int, lam: float, alpha: float, seed: int,
) -> Case:  # fmt: skip
    """A layer of n_group groups of a size, and what arrives at its answer."""
    E = n_group * size
    shapes = [
        (E, D), (E, wide, D), (E, wide, D), (E, D, wide), (J, D), (J, D), (D, J),
    ]  # fmt: skip
    params = {
        name: normal(*shape, seed=100 * seed + number, scale=0.7)
        for number, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    params["b"] = normal(E, seed=100 * seed + 50, scale=0.4) - 0.8
    u, dy = (normal(B, T, D, seed=100 * seed + n) for n in (51, 52))
    label = f"batch of {B}, {T} positions, D={D}, {K} of {E} experts, alpha={alpha}"
    return Case(label, (params, u, dy, K, n_group, open_, lam, alpha))


def by_name(function: Callable, *args: object) -> object:
    """y, du and the gradients in one dictionary: each is compared by its name."""
    value = function(*args)
    if value is ... or value is None:
        return value
    if not (isinstance(value, tuple) and len(value) == 3 and type(value[2]) is dict):
        raise WrongForm(
            "Return three things: `return y, du, grads`, two arrays and a dict."
        )
    return ByName(y=value[0], du=value[1], **value[2])


LAYER = Check(
    "moe.8",
    returns=("y", "du", *NAMES),
    call=by_name,
    cases=lambda: [
        layer(1, 3, 2, 3, 2, 2, 2, 1, 2, 2.5, 0.1, seed=1),
        layer(2, 4, 3, 2, 5, 4, 2, 2, 3, 2.5, 0.5, seed=2),
        layer(3, 1, 4, 5, 1, 1, 5, 1, 2, 1.0, 2.0, seed=3),
        # One expert a token: its gate is lam, and W hears from the balance alone.
        layer(2, 3, 5, 2, 3, 3, 3, 2, 1, 1.5, 0.3, seed=4),
        layer(1, 2, 3, 4, 4, 5, 4, 3, 4, 16.0, 0.0, seed=5),
    ],
    hints=(
        "Forwards: route, mix, and the shared expert beside it. Backwards, u was read "
        "by three: the experts, the router and the shared expert. The affinities were "
        "read by two: the gates and the balance loss.",
        "`route` wants a function of one argument: `lambda choice: choose(choice, K, "
        "n_group, topk_group)`. `mix` wants `lambda i, x: swiglu(x, p['W_gate'][i], "
        "p['W_up'][i], p['W_down'][i])`. `balance` wants s as (B, T, E), and "
        "`route_backward` its answer as (N, E).",
        "`experts_backward(dy_rows, rows, experts, gates, ...)` gives du, dgates and "
        "three gradients; `route_backward(dgates, ds.reshape(N, E), rows, p['W'], "
        "experts, s, lam)` another du, and W's. The shared expert: "
        "`experts_backward(dy_rows, rows, np.zeros((N, 1), int), np.ones((N, 1)), "
        "*shared)`, of whose gradients you take `[0]`. The three du add up.",
    ),
    wrong=(
        Wrong(
            "the shared expert left out of the answer",
            '    y = y + swiglu(rows, p["S_gate"], p["S_up"], p["S_down"])\n',
            "",
            "Every token goes to the shared expert as well, and its answer is added.",
        ),
        Wrong(
            "the shared expert behind a gate",
            'y + swiglu(rows, p["S_gate"], p["S_up"], p["S_down"])',
            'y + lam * swiglu(rows, p["S_gate"], p["S_up"], p["S_down"])',
            "The shared expert has no gate, and lam belongs to the gates.",
            (("np.ones(everybody.shape)", "lam * np.ones(everybody.shape)"),),
        ),
        Wrong(
            "the shared expert silent on the way back",
            "du + du_router + du_shared",
            "du + du_router",
            "u was read by three: the routed experts, the router and the shared "
            "expert. Three gradients add.",
        ),
        Wrong(
            "the router silent on the way back",
            "du + du_router + du_shared",
            "du + du_shared",
            "u was read by three: the routed experts, the router and the shared "
            "expert. Three gradients add.",
        ),
        Wrong(
            "the balance loss without effect",
            "dgates, ds.reshape(N, E), rows",
            "dgates, np.zeros(s.shape), rows",
            "The balance loss is part of the loss, and the affinities that it read "
            "hear from it.",
        ),
        Wrong(
            "the router cut off from the experts",
            "dgates, ds.reshape(N, E), rows",
            "0 * dgates, ds.reshape(N, E), rows",
            "The router learns who answers well through its gates: dgates goes to "
            "`route_backward`.",
        ),
        Wrong(
            "alpha a second time",
            "dgates, ds.reshape(N, E), rows",
            "dgates, alpha * ds.reshape(N, E), rows",
            "What `balance` returns is weighed with alpha already.",
        ),
        Wrong(
            "the sigmoid's slope a second time",
            "dgates, ds.reshape(N, E), rows",
            "dgates, ds.reshape(N, E) * s * (1 - s), rows",
            "`route_backward` takes ds through the sigmoid, together with what comes "
            "from the gates.",
        ),
        Wrong(
            "the balance of the batch as one text",
            "balance(s.reshape(B, T, E), K, alpha)",
            "balance(s[None], K, alpha)",
            "f and P belong to one sequence: give `balance` the affinities as "
            "(B, T, E).",
        ),
        Wrong(
            "every position a sequence of its own",
            "balance(s.reshape(B, T, E), K, alpha)",
            "balance(s[:, None], K, alpha)",
            "f counts over the T positions of a sequence: give `balance` the "
            "affinities as (B, T, E).",
        ),
        Wrong(
            "the balance of biased affinities",
            "balance(s.reshape(B, T, E), K, alpha)",
            'balance((s + p["b"]).reshape(B, T, E), K, alpha)',
            "The report's balance loss reads s, without bias.",
        ),
        Wrong(
            "the groups left out",
            "choose(choice, K, n_group, topk_group)",
            "choose(choice, K, 1, 1)",
            "Only experts of the best topk_group groups may be chosen.",
        ),
        Wrong(
            "the stream added",
            "return y.reshape(u.shape)",
            "return u + y.reshape(u.shape)",
            "The block adds the stream, and what it adds was not normalised. The layer "
            "returns its own answer.",
        ),
        Wrong(
            "the stream added, there and back",
            "return y.reshape(u.shape), du.reshape(u.shape)",
            "return u + y.reshape(u.shape), dy + du.reshape(u.shape)",
            "The block adds the stream, and what it adds was not normalised. The layer "
            "returns its own answer.",
        ),
        Wrong(
            "the gates of one",
            "= experts_backward(dy_rows, rows, experts, gates, *stacks)",
            "= experts_backward(dy_rows, rows, experts, np.ones_like(gates), *stacks)",
            "Each routed expert hears dy weighed with its gate.",
        ),
        Wrong(
            "the bias left out",
            'p["b"]',
            '0 * p["b"]',
            "Who is chosen is decided by s + b: hand `route` the bias.",
        ),
        Wrong(
            "n_group and topk_group exchanged",
            "n_group, topk_group)\n",
            "topk_group, n_group)\n",
            "`choose` takes n_group first, then topk_group.",
        ),
    ),
    right=(
        "def layer(params, u, dy, K, n_group, topk_group, lam, alpha):\n"
        "    p, (B, T, D) = params, u.shape\n"
        "    x, g, E = u.reshape(B * T, D), dy.reshape(B * T, D), len(p['b'])\n"
        "    def ours(choice):\n"
        "        return choose(choice, K, n_group, topk_group)\n"
        "    def ffn(i, rows):\n"
        "        a = rows @ p['W_gate'][i].T\n"
        "        h = a * (rows @ p['W_up'][i].T) / (1 + np.exp(-a))\n"
        "        return h @ p['W_down'][i].T\n"
        "    e, gates, s = route(x, p['W'], p['b'], lam, ours)\n"
        "    a, b = u @ p['S_gate'].T, u @ p['S_up'].T\n"
        "    sig = 1 / (1 + np.exp(-a))\n"
        "    h = a * sig * b\n"
        "    y = h @ p['S_down'].T + mix(x, e, gates, ffn, E).reshape(B, T, D)\n"
        "    dh = dy @ p['S_down']\n"
        "    da, db = dh * b * sig * (1 + a * (1 - sig)), dh * a * sig\n"
        "    grads = {\n"
        "        'S_gate': np.einsum('btj,btd->jd', da, u),\n"
        "        'S_up': np.einsum('btj,btd->jd', db, u),\n"
        "        'S_down': np.einsum('btd,btj->dj', dy, h),\n"
        "    }\n"
        "    du = (da @ p['S_gate'] + db @ p['S_up']).reshape(B * T, D)\n"
        "    names = 'W_gate', 'W_up', 'W_down'\n"
        "    back = experts_backward(g, x, e, gates, *(p[n] for n in names))\n"
        "    grads.update(zip(names, back[2:]))\n"
        "    ds = balance(s.reshape(B, T, E), K, alpha)[1].reshape(B * T, E)\n"
        "    dr, dW = route_backward(back[1], ds, x, p['W'], e, s, lam)\n"
        "    grads['W'] = dW\n"
        "    return y, (du + back[0] + dr).reshape(B, T, D), grads\n",
    ),
)

CHECKS = [LAYER]
