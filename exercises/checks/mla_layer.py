"""Chapter 4, all of it together: the layer and its gradient, in both forms."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from grader.compare import ByName, WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal

NAMES = ("W_DQ", "g_Q", "W_UQ", "W_DKV", "g_KV", "W_UKV", "W_O")


def block(
    B: int,
    at: list[int],
    N_h: int,
    widths: tuple[int, ...],
    seed: int,
    *rest: float,
) -> Case:
    """A layer at some positions; widths are D, d_h, d_R, d_v, d_c and the queries'."""
    D, d_h, d_R, d_v, d_c, d_cq = widths
    shapes = [
        (d_cq, D), (d_cq,), (N_h * (d_h + d_R), d_cq), (d_c + d_R, D), (d_c,),
        (N_h * (d_h + d_v), d_c), (D, N_h * d_v),
    ]  # fmt: skip
    params = {
        name: normal(*shape, seed=100 * seed + number, scale=0.8)
        for number, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    x, dy = normal(B, len(at), D, seed=seed), normal(B, len(at), D, seed=seed + 1)
    form = "absorbed" if rest and rest[0] else "naive"
    label = (
        f"{form}, B={B}, positions {at}, D={D}, {N_h} heads, d_h={d_h}, d_R={d_R}, "
        f"d_v={d_v}, d_c={d_c}"
    )
    alpha = 1.3 * (d_h + d_R) ** -0.5
    return Case(label, (params, x, dy, np.array(at), N_h, alpha, *rest))


@contextmanager
def other_form_refused(function: Callable, absorb: bool) -> Iterator[None]:
    """While this holds, calls of the other form raise WrongForm: its numbers are the
    same, so nothing else would show it.
    """
    space = getattr(function, "__globals__", {})
    form = "naive" if absorb else "absorbed"
    taken = {name: space.get(name) for name in (f"{form}_forward", f"{form}_backward")}

    def refused(name: str) -> Callable:
        def call(*args: object, **kwargs: object) -> None:
            raise WrongForm(
                f"`{name}` was called though absorb is {absorb}. Call `attend` and "
                "`attend_backward`."
            )

        return call

    space.update({name: refused(name) for name in taken})
    try:
        yield
    finally:
        space.update(taken)


def all_by_name(function: Callable, *given: object) -> object:
    """Output, dx and gradients in one dictionary: each is compared by its name."""
    with other_form_refused(function, absorb=bool(given[6:7] and given[6])):
        value = function(*given)
    if value is ... or value is None:
        return value
    if not (isinstance(value, tuple) and len(value) == 3 and type(value[2]) is dict):
        raise WrongForm(
            "Return three things: `return y, dx, grads`, two arrays and a dict."
        )
    return ByName(y=value[0], dx=value[1], **value[2])


DQ = "np.concatenate([dq_C, rope(dq_R, -positions)], axis=-1)"
DK = "dk = rope(dkept[:, :, None, d_c:], -positions)[:, :, 0]"

LAYER = Check(
    "mla.8",
    returns=("y", "dx", *NAMES),
    call=all_by_name,
    joint_scale=True,
    cases=lambda: [
        block(1, [0, 1], 1, (2, 1, 2, 1, 2, 2), 1),
        block(2, [3, 0, 200], 2, (5, 3, 2, 4, 3, 6), 2),
        block(2, [5, 6, 7], 3, (4, 2, 4, 1, 6, 3), 3, True),
        block(1, [9, 30, 2, 11], 2, (3, 3, 4, 3, 4, 4), 4, False, 0.1),
        block(3, [40], 2, (4, 2, 2, 3, 5, 2), 5, True, 0.1),
    ],
    hints=(
        "Forwards are three lines, two of them calls. Then from the last line to the "
        "first, down two branches that meet in dx: what is kept, and the queries.",
        "`attend_backward` returns `dq_C, dq_R, dkept, dW_UKV`. Of dkept, the first "
        "d_c go through `rmsnorm_backward`, which wants what went into the norm: make "
        "`a` again, `x @ W.T` with the first d_c rows of W_DKV. The rest turns back.",
        "`dq` is dq_C beside `rope(dq_R, -positions)`, then W_UQ, `rmsnorm_backward("
        "dc_Q, a_Q, ...)`, W_DQ: the first half of dx. `dk` is `rope(dkept[:, :, None, "
        "d_c:], -positions)[:, :, 0]`; behind `da` it goes through W_DKV: the second "
        "half.",
    ),
    wrong=(
        Wrong(
            "dq and dk not turned back",
            DQ,
            "np.concatenate([dq_C, dq_R], axis=-1)",
            "Queries and key were turned after their projections; their gradients "
            "must be turned back before.",
            ((DK, "dk = dkept[..., d_c:]"),),
        ),
        Wrong(
            "dq not turned back",
            DQ,
            "np.concatenate([dq_C, dq_R], axis=-1)",
            "The queries were turned after their projection; their gradient must be "
            "turned back before.",
        ),
        Wrong(
            "dk not turned back",
            DK,
            "dk = dkept[..., d_c:]",
            "The key was turned after its projection; its gradient must be turned back "
            "before.",
        ),
        Wrong(
            "turned forwards on the way back",
            DQ,
            "np.concatenate([dq_C, rope(dq_R, positions)], axis=-1)",
            "The gradient of a rotation is the rotation back: positions with a minus, "
            "for queries and key.",
            ((DK, "dk = rope(dkept[:, :, None, d_c:], positions)[:, :, 0]"),),
        ),
        Wrong(
            "dq turned forwards",
            DQ,
            "np.concatenate([dq_C, rope(dq_R, positions)], axis=-1)",
            "The gradient of a rotation is the rotation back: positions with a minus.",
        ),
        Wrong(
            "dk turned forwards",
            DK,
            "dk = rope(dkept[:, :, None, d_c:], positions)[:, :, 0]",
            "The gradient of a rotation is the rotation back: positions with a minus.",
        ),
        Wrong(
            "the norm's output handed to its backward",
            '    a = x @ p["W_DKV"][:d_c].T',
            "    a = kept[..., :d_c]",
            "rmsnorm_backward wants what went into the norm. What came out, with gain, "
            "is what is kept.",
        ),
        Wrong(
            "the norm's input guessed from its output",
            '    a = x @ p["W_DKV"][:d_c].T',
            '    a = kept[..., :d_c] / p["g_KV"]',
            "Divided by the gain, what is kept still has size one: the norm took its "
            "size away. Make a again, from x.",
        ),
        Wrong(
            "the queries' norm backwards from its output",
            "rmsnorm_backward(dc_Q, a_Q,",
            "rmsnorm_backward(dc_Q, c_Q,",
            "rmsnorm_backward wants what went into the norm, a_Q.",
        ),
        Wrong(
            "both norms backwards from their outputs",
            "rmsnorm_backward(dc_Q, a_Q,",
            "rmsnorm_backward(dc_Q, c_Q,",
            "rmsnorm_backward wants what went into a norm: a_Q, and a, made again.",
            (('    a = x @ p["W_DKV"][:d_c].T', "    a = kept[..., :d_c]"),),
        ),
        Wrong(
            "the latent's norm skipped on the way back",
            "    dk = rope(",
            "    da = dkept[..., :d_c]\n    dk = rope(",
            "dkept is the gradient behind the norm; W_DKV stands in front of it.",
        ),
        Wrong(
            "the queries' norm skipped on the way back",
            'dx = linear_backward("W_DQ", da_Q, x)',
            'dx = linear_backward("W_DQ", dc_Q, x)',
            "dc_Q is the gradient behind the norm; W_DQ stands in front of it.",
        ),
        Wrong(
            "the queries' way back alone",
            "    dx = dx + linear",
            "    linear",
            "x was read twice, for queries and for what is kept: two gradients add up.",
        ),
        Wrong(
            "the queries' way back forgotten",
            "    dx = dx + linear",
            "    dx = linear",
            "x was read twice, for queries and for what is kept: two gradients add up, "
            "and none replaces the other.",
        ),
        Wrong(
            "the key's way back forgotten",
            "np.concatenate([da, dk], axis=-1)",
            "np.concatenate([da, 0 * dk], axis=-1)",
            "The last d_R rows of W_DKV made the key, and hear from it.",
        ),
        Wrong(
            "eps not handed on",
            'p["g_KV"], positions, eps)',
            'p["g_KV"], positions)',
            "`latents` has eps 1e-6 unless it is told otherwise. The layer has been.",
        ),
        Wrong(
            "keys at positions 0, 1, 2, ...",
            'p["g_KV"], positions, eps)',
            'p["g_KV"], np.arange(T), eps)',
            "The positions are an argument. Keys have the same as the queries.",
        ),
        Wrong(
            "heads dealt out like cards",
            'do = linear_backward("W_O", dy, o).reshape(B, T, N_h, -1)',
            'do = linear_backward("W_O", dy, o)\n'
            "    do = do.reshape(B, T, -1, N_h).swapaxes(2, 3)",
            "The heads' outputs lie head by head, as they were joined: undo it with "
            "(B, T, N_h, -1).",
        ),
        Wrong(
            "the stream added",
            "return y, dx, grads",
            "return x + y, dx, grads",
            "The block adds the stream, and what it adds was not normalised. The "
            "layer returns its own answer.",
        ),
        Wrong(
            "the stream added, there and back",
            "return y, dx, grads",
            "return x + y, dx + dy, grads",
            "The block adds the stream, and what it adds was not normalised. The "
            "layer returns its own answer.",
        ),
    ),
    right=(
        "def layer(params, x, dy, positions, N_h, alpha, absorb=False, eps=1e-6):\n"
        "    W_DQ, g_Q, W_UQ, W_DKV, g, W_UKV, W_O = (params[n] for n in (\n"
        "        'W_DQ', 'g_Q', 'W_UQ', 'W_DKV', 'g_KV', 'W_UKV', 'W_O'))\n"
        "    attend, back = naive_forward, naive_backward\n"
        "    if absorb:\n"
        "        attend, back = absorbed_forward, absorbed_backward\n"
        "    (B, T, D), d_c, at = x.shape, len(g), np.negative(positions)\n"
        "    d_R = len(W_DKV) - d_c\n"
        "    rows = lambda z: z.reshape(B * T, -1)\n"
        "    a_Q = x @ W_DQ.T\n"
        "    c_Q = a_Q / np.sqrt(np.square(a_Q).mean(-1)[..., None] + eps) * g_Q\n"
        "    q = (c_Q @ W_UQ.T).reshape(B, T, N_h, -1)\n"
        "    q_C, q_R = q[..., :-d_R], rope(q[..., -d_R:], positions)\n"
        "    kept = latents(x, W_DKV, g, positions, eps)\n"
        "    o, P = attend(q_C, q_R, kept, W_UKV, alpha)\n"
        "    y = np.tensordot(o.reshape(B, T, -1), W_O, (2, 1))\n"
        "    do = (dy @ W_O).reshape(o.shape)\n"
        "    dq_C, dq_R, dkept, dW = back(do, q_C, q_R, kept, W_UKV, P, alpha)\n"
        "    dq = np.append(dq_C, rope(dq_R, at), -1).reshape(B, T, -1)\n"
        "    da_Q, dg_Q = rmsnorm_backward(dq @ W_UQ, a_Q, g_Q, eps)\n"
        "    dkv = np.empty((B, T, d_c + d_R))\n"
        "    dkv[..., :d_c], dg = rmsnorm_backward(\n"
        "        dkept[..., :d_c], np.einsum('btd,cd->btc', x, W_DKV[:d_c]), g, eps)\n"
        "    dkv[..., d_c:] = rope(dkept[..., None, d_c:], at).reshape(B, T, d_R)\n"
        "    grads = dict(\n"
        "        g_Q=dg_Q, g_KV=dg, W_UKV=dW, W_O=rows(dy).T @ rows(o),\n"
        "        W_UQ=rows(dq).T @ rows(c_Q), W_DQ=rows(da_Q).T @ rows(x),\n"
        "        W_DKV=rows(dkv).T @ rows(x))\n"
        "    return y, da_Q @ W_DQ + dkv @ W_DKV, grads\n",
        "def layer(params, x, dy, positions, N_h, alpha, absorb=False, eps=1e-6):\n"
        "    p, B, T = params, len(x), x.shape[1]\n"
        "    d_c = p['g_KV'].size\n"
        "    f = [(naive_forward, naive_backward), (absorbed_forward,\n"
        "         absorbed_backward)][bool(absorb)]\n"
        "    kept = latents(x, p['W_DKV'], p['g_KV'], positions, eps)\n"
        "    d_R = kept.shape[-1] - d_c\n"
        "    a = x @ p['W_DQ'].T\n"
        "    r = (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5\n"
        "    q = np.einsum('btc,oc->bto', p['g_Q'] * a * r, p['W_UQ'])\n"
        "    q = q.reshape(B, T, N_h, -1)\n"
        "    q_R = rope(q[..., q.shape[-1] - d_R:], positions)\n"
        "    q_C = q[..., :q.shape[-1] - d_R]\n"
        "    o, P = f[0](q_C, q_R, kept, p['W_UKV'], alpha)\n"
        "    W_O = p['W_O'].reshape(-1, *o.shape[2:])\n"
        "    y = np.einsum('bthv,dhv->btd', o, W_O)\n"
        "    g = {'W_O': np.einsum('btd,bthv->dhv', dy, o).reshape(len(W_O), -1)}\n"
        "    do = np.einsum('btd,dhv->bthv', dy, W_O)\n"
        "    dq_C, dq_R, dkept, g['W_UKV'] = f[1](\n"
        "        do, q_C, q_R, kept, p['W_UKV'], P, alpha)\n"
        "    dq_R = rope(dq_R, -positions)\n"
        "    dq = np.concatenate([dq_C, dq_R], 3).reshape(B, T, -1)\n"
        "    g['W_UQ'] = np.einsum('bto,btc->oc', dq, p['g_Q'] * a * r)\n"
        "    da, g['g_Q'] = rmsnorm_backward(dq @ p['W_UQ'], a, p['g_Q'], eps)\n"
        "    g['W_DQ'] = np.einsum('btc,btd->cd', da, x)\n"
        "    W_C, W_R = p['W_DKV'][:d_c], p['W_DKV'][d_c:]\n"
        "    dc, g['g_KV'] = rmsnorm_backward(dkept[..., :d_c], x @ W_C.T,\n"
        "                                     p['g_KV'], eps)\n"
        "    dk = rope(dkept[..., d_c:].reshape(B, T, 1, d_R), -positions)[:, :, 0]\n"
        "    both = [np.einsum('btc,btd->cd', z, x) for z in (dc, dk)]\n"
        "    g['W_DKV'] = np.concatenate(both)\n"
        "    return y, da @ p['W_DQ'] + dc @ W_C + dk @ W_R, g\n",
    ),
)

CHECKS = [LAYER]
