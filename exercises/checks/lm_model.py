"""Chapter 1, all of it together: the gradient of a model of one block."""

from collections.abc import Callable

from grader.compare import ByName, WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng

NAMES = (
    "embed", "norm_1", "W_q", "W_k", "W_v", "W_o", "norm_2", "W_gate", "W_up",
    "W_down", "head",
)  # fmt: skip


def model(
    B: int, T: int, V: int, D: int, d: int, wide: int, H: int, eps: float, seed: int
) -> Case:
    """Parameters and ids of a model of one block."""
    shapes = [
        (V, D), (D,), (H * d, D), (d, D), (d, D), (D, H * d), (D,), (wide, D),
        (wide, D), (D, wide), (V, D),
    ]  # fmt: skip
    params = {
        name: normal(*shape, seed=100 * seed + number, scale=0.7)
        for number, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    ids = rng(seed).integers(0, V, (B, T + 1))
    label = f"batch of {B}, {T} positions, V={V}, D={D}, {H} heads of {d}, I={wide}"
    return Case(label, (params, ids, H, eps))


def by_default(case: Case) -> Case:
    """The same call without H and eps, which have defaults."""
    return Case(f"{case.label}; H and eps left out", case.args[:2])


def loss_beside_grads(function: Callable, params: dict, *rest: object) -> object:
    """The loss and the gradients in one dictionary: each is compared by its name."""
    value = function(params, *rest)
    if value is ... or value is None:
        return value
    if not (isinstance(value, tuple) and len(value) == 2 and type(value[1]) is dict):
        raise WrongForm("Return two things: `return loss, grads`, a number and a dict.")
    return ByName(loss=value[0], **value[1])


ASSEMBLED = Check(
    "lm.11",
    returns=("loss", *NAMES),
    call=loss_beside_grads,
    joint_scale=True,
    cases=lambda: [
        model(B=1, T=3, V=4, D=6, d=4, wide=5, H=2, eps=1e-6, seed=1),
        model(B=2, T=5, V=7, D=4, d=6, wide=3, H=3, eps=1e-2, seed=2),
        model(B=3, T=1, V=3, D=8, d=2, wide=9, H=1, eps=1e-6, seed=3),
        model(B=2, T=4, V=5, D=3, d=2, wide=4, H=4, eps=1e-6, seed=4),
        by_default(model(B=1, T=2, V=3, D=4, d=2, wide=3, H=2, eps=1e-6, seed=12)),
    ],
    hints=(
        "Read the forward pass from its last line to its first. Each product with a "
        "W is two lines: `grads[name] = ...`, and the gradient of what went in.",
        "For `y = x @ W.T`: `grads[name]` is `np.einsum('bto,bti->oi', dy, x)`, dx "
        "is `dy @ W`. u1 is read three times, u2 twice, x1 by the norm and by the "
        "addition. Undo each reshape and swapaxes on the way.",
        "Order: head, W_down, `swiglu_backward`, W_gate and W_up, `rmsnorm_backward` "
        "plus the stream, W_o, `attention_backward`, `rope(..., -positions)` for dq "
        "and dk, then W_q, W_k and W_v, `rmsnorm_backward` plus the stream, "
        "`embedding_backward`, and `return loss, grads`.",
    ),
    wrong=(
        Wrong(
            "the stream lost at the feed-forward",
            "    dx1 = dx1 + dx2\n",
            "",
            "x2 = x1 + ...: the gradient of x2 reaches x1 also unchanged, past the "
            "feed-forward.",
        ),
        Wrong(
            "the stream lost at attention",
            "embedding_backward(dx0 + dx1,",
            "embedding_backward(dx0,",
            "x1 = x0 + ...: the gradient of x1 reaches x0 also unchanged, past "
            "attention.",
        ),
        Wrong(
            "turned forwards on the way back",
            "dq = rope(dq.swapaxes(1, 2), -positions)",
            "dq = rope(dq.swapaxes(1, 2), positions)",
            "The gradient of a rotation is the rotation back: positions with a minus, "
            "for dq and for dk.",
            (
                (
                    "dk = rope(dk[:, :, None], -positions)",
                    "dk = rope(dk[:, :, None], positions)",
                ),
            ),
        ),
        Wrong(
            "dq turned forwards",
            "dq = rope(dq.swapaxes(1, 2), -positions)",
            "dq = rope(dq.swapaxes(1, 2), positions)",
            "The gradient of a rotation is the rotation back: positions with a minus, "
            "for dq as for dk.",
        ),
        Wrong(
            "dk turned forwards",
            "dk = rope(dk[:, :, None], -positions)",
            "dk = rope(dk[:, :, None], positions)",
            "The gradient of a rotation is the rotation back: positions with a minus, "
            "for dk as for dq.",
        ),
        Wrong(
            "dk not turned back",
            "    dk = rope(dk[:, :, None], -positions)[:, :, 0]\n",
            "",
            "k was rotated too, after its projection; its gradient must be rotated "
            "back before, as that of q.",
        ),
        Wrong(
            "dq and dk not turned back",
            "    dq = rope(dq.swapaxes(1, 2), -positions).reshape(B, T, H * d)\n"
            "    dk = rope(dk[:, :, None], -positions)[:, :, 0]\n",
            "    dq = dq.swapaxes(1, 2).reshape(B, T, H * d)\n",
            "q and k were rotated after their projections; their gradients must be "
            "rotated back before.",
        ),
        Wrong(
            "the gate's way back alone",
            'linear_backward("W_gate", da, u2) + linear_backward("W_up", db, u2)',
            'linear_backward("W_gate", da, u2)\n    linear_backward("W_up", db, u2)',
            "u2 was read twice, for gate and up: two gradients add up.",
        ),
        Wrong(
            "the values' way back alone",
            'du1 = du1 + linear_backward("W_v", dv, u1)',
            'du1 = linear_backward("W_v", dv, u1)',
            "u1 was read three times, for queries, keys and values: three gradients "
            "add up, and none replaces the others.",
        ),
        Wrong(
            "the norm's output handed to its backward",
            "rmsnorm_backward(du2, x1,",
            "rmsnorm_backward(du2, u2,",
            "rmsnorm_backward wants what went into the norm: x0 and x1, not u1 and u2.",
            (("rmsnorm_backward(du1, x0,", "rmsnorm_backward(du1, u1,"),),
        ),
        Wrong(
            "u2 handed to the backward of its norm",
            "rmsnorm_backward(du2, x1,",
            "rmsnorm_backward(du2, u2,",
            "rmsnorm_backward wants what went into the norm, x1, not u2, which came "
            "out of it.",
        ),
        Wrong(
            "the gradient given to the targets' rows",
            "embedding_backward(dx0 + dx1, past,",
            "embedding_backward(dx0 + dx1, targets,",
            "The table was read at the ids that went in, past; the targets are read by "
            "the loss.",
        ),
        Wrong(
            "the values' way back forgotten",
            '    du1 = du1 + linear_backward("W_v", dv, u1)\n',
            '    linear_backward("W_v", dv, u1)\n',
            "u1 was read three times, for queries, keys and values: three gradients "
            "add up.",
        ),
    ),
    right=(
        "def loss_and_grads(params, ids, H=2, eps=1e-6):\n"
        "    n = lambda x: (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5\n"
        "    w, past, (B, T) = params, ids[:, :-1], ids[:, 1:].shape\n"
        "    d, D = len(w['W_k']), len(w['norm_1'])\n"
        "    x, pos = w['embed'][past], np.arange(T)\n"
        "    u = w['norm_1'] * x * n(x)\n"
        "    flat = lambda a: a.reshape(B * T, -1)\n"
        "    q = rope((u @ w['W_q'].T).reshape(B, T, H, d), pos)\n"
        "    q = q.transpose(0, 2, 1, 3)\n"
        "    k = rope((u @ w['W_k'].T).reshape(B, T, 1, d), pos).reshape(B, T, d)\n"
        "    v = u @ w['W_v'].T\n"
        "    P = causal_weights(q @ k[:, None].swapaxes(2, 3) / d**0.5)\n"
        "    o = (P @ v[:, None]).transpose(0, 2, 1, 3).reshape(B, T, H * d)\n"
        "    y = x + o @ w['W_o'].T\n"
        "    t = w['norm_2'] * y * n(y)\n"
        "    a, b = t @ w['W_gate'].T, t @ w['W_up'].T\n"
        "    h = a * b / (1 + np.exp(-a))\n"
        "    z = y + h @ w['W_down'].T\n"
        "    s = z @ w['head'].T\n"
        "    g, ds = {}, cross_entropy_backward(s, ids[:, 1:])\n"
        "    m = s.max(-1)\n"
        "    lse = m + np.log(np.exp(s - m[..., None]).sum(-1))\n"
        "    loss = (lse - np.take_along_axis(s, ids[:, 1:, None], 2)[..., 0]).mean()\n"
        "    g['head'] = flat(ds).T @ flat(z)\n"
        "    dz = ds @ w['head']\n"
        "    g['W_down'] = flat(dz).T @ flat(h)\n"
        "    da, db = swiglu_backward(dz @ w['W_down'], a, b)\n"
        "    g['W_gate'], g['W_up'] = flat(da).T @ flat(t), flat(db).T @ flat(t)\n"
        "    dt = da @ w['W_gate'] + db @ w['W_up']\n"
        "    dy, g['norm_2'] = rmsnorm_backward(dt, y, w['norm_2'], eps)\n"
        "    dy += dz\n"
        "    g['W_o'] = flat(dy).T @ flat(o)\n"
        "    do = (dy @ w['W_o']).reshape(B, T, H, d).transpose(0, 2, 1, 3)\n"
        "    dq, dk, dv = attention_backward(do, q, k, v, P, d**-0.5)\n"
        "    dq = rope(dq.transpose(0, 2, 1, 3), -pos).reshape(B, T, H * d)\n"
        "    dk = rope(dk.reshape(B, T, 1, d), -pos).reshape(B, T, d)\n"
        "    for name, dd in zip(('W_q', 'W_k', 'W_v'), (dq, dk, dv)):\n"
        "        g[name] = flat(dd).T @ flat(u)\n"
        "    du = dq @ w['W_q'] + dk @ w['W_k'] + dv @ w['W_v']\n"
        "    dx, g['norm_1'] = rmsnorm_backward(du, x, w['norm_1'], eps)\n"
        "    g['embed'] = embedding_backward(dx + dy, past, len(w['embed']))\n"
        "    return loss, g\n",
    ),
)

CHECKS = [ASSEMBLED]
