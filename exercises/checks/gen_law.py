"""Chapter 9, the draw: temperature first, then the cut."""

from grader.spec import Check, Wrong

from checks.cases import law_cases

LAW = "law = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)"
GREEDY = "np.eye(logits.shape[1])[logits.argmax(axis=1)]"
LINE = "before < top_p"
RETURN = "return kept / kept.sum(axis=1, keepdims=True)"

NEXT_TOKEN_LAW = Check(
    "gen.1",
    returns=("law",),
    cases=law_cases,
    hints=(
        "Rank every row. A token stays as long as those *before* it have not reached "
        "`top_p`; so the first one always stays, and so does the one that crosses.",
        '`np.argsort(-law, axis=1, kind="stable")` ranks and leaves equals in order. '
        "`np.take_along_axis` fetches the probabilities in that order, `np.cumsum(..., "
        "axis=1)` adds them up, `np.put_along_axis` brings them home.",
        "Subtract each row's maximum, divide by the temperature, softmax. With "
        "`ranked` and `before = np.cumsum(ranked, axis=1) - ranked`, put "
        "`np.where(before < top_p, ranked, 0.0)` at `order` into zeros of the law's "
        "shape; divide by each row's sum. At temperature 0 none of that: "
        "`np.eye(V)[logits.argmax(axis=1)]`.",
    ),
    wrong=(
        Wrong(
            "the probabilities divided, not the logits",
            "(logits - logits.max(axis=1, keepdims=True)) / temperature",
            "logits - logits.max(axis=1, keepdims=True)",
            "Divided by one number and scaled to sum to 1, a law is what it was. The "
            "temperature divides the logits.",
        ),
        Wrong(
            "multiplied by the temperature",
            "keepdims=True)) / temperature",
            "keepdims=True)) * temperature",
            "Hot is flat: a large temperature brings the logits nearer to each other. "
            "It divides.",
        ),
        Wrong(
            "cut before the temperature",
            "before = np.cumsum(ranked, axis=1) - ranked",
            "cold = np.exp(z * temperature)\n"
            "    cold = cold / cold.sum(axis=1, keepdims=True)\n"
            "    cold = np.take_along_axis(cold, order, axis=1)\n"
            "    before = np.cumsum(cold, axis=1) - cold",
            "You add up the probabilities of temperature 1. The temperature comes "
            "first; its law is cut.",
        ),
        Wrong(
            "the token that crosses the line left out",
            LINE,
            "before + ranked <= top_p",
            "What is kept must *reach* top_p: the token that brings it there stays. "
            "Without it, a row whose first token is above top_p has none left.",
        ),
        Wrong(
            "the token that crosses left out, unless it is the first",
            LINE,
            "(before + ranked <= top_p) | (np.arange(law.shape[1]) == 0)",
            "What is kept must *reach* top_p: the token that brings it there stays, "
            "whether it is the first or not.",
        ),
        Wrong(
            "one token more where top_p is met",
            LINE,
            "before <= top_p",
            "Where the sum is top_p already, it has been reached: nothing more is "
            "kept.",
        ),
        Wrong(
            "not scaled after the cut",
            RETURN,
            "return kept",
            "A law sums to 1. What was kept sums to top_p or a little more.",
        ),
        Wrong(
            "divided by top_p",
            RETURN,
            "return kept / top_p",
            "What was kept sums to *at least* top_p, for the last token crosses the "
            "line. Divide by the sum.",
        ),
        Wrong(
            "a softmax of what was kept",
            RETURN,
            "kept = np.exp(kept) * (kept > 0)\n    " + RETURN,
            "They are probabilities already, and only too small together. Divide by "
            "their sum; a second softmax flattens them.",
        ),
        Wrong(
            "a bar for each single token",
            LINE,
            "ranked >= top_p",
            "top_p is about a sum. A single token is seldom that probable, and the "
            "rest is not therefore wrong.",
        ),
        Wrong(
            "a bar at a share of the best token",
            LINE,
            "ranked >= top_p * ranked[:, :1]",
            "That is another rule, min-p. top_p is reached by a sum, from the most "
            "probable token on.",
        ),
        Wrong(
            "top_p taken for what is cut",
            LINE,
            "before <= 1 - top_p",
            "It is what is kept: 0.9 keeps nine tenths and cuts the last one off.",
        ),
        Wrong(
            "a share of the tokens",
            LINE,
            "np.arange(law.shape[1]) < top_p * law.shape[1]",
            "You keep a share of the *number* of tokens. What must reach top_p is the "
            "sum of their probabilities.",
        ),
        Wrong(
            "as many in every row as in the first",
            LINE,
            "(before < top_p)[:1]",
            "A row that is sure keeps one token, a flat one many. Count in each row by "
            "itself.",
        ),
        Wrong(
            "one ranking for all rows",
            'np.argsort(-law, axis=1, kind="stable")',
            'np.argsort(-law, axis=1, kind="stable")[:1].repeat(len(law), 0)',
            "Each row has its own most probable tokens.",
        ),
        Wrong(
            "the least probable first",
            'np.argsort(-law, axis=1, kind="stable")',
            'np.argsort(law, axis=1, kind="stable")',
            "argsort goes from small to large, so that you keep the tail. Rank the "
            "negative probabilities.",
        ),
        Wrong(
            "left in the order of the ranking",
            "np.put_along_axis(kept, order, np.where(before < top_p, ranked, 0.0), "
            "axis=1)",
            "kept = np.where(before < top_p, ranked, 0.0)",
            "The place in a row is the token's id. Put each probability back where it "
            "came from.",
        ),
        Wrong(
            "of equals the higher id",
            'np.argsort(-law, axis=1, kind="stable")',
            'np.argsort(law, axis=1, kind="stable")[:, ::-1]',
            "Turned round, a ranking turns equals round too. Rank the negative "
            "probabilities, and the lower id comes first.",
        ),
        Wrong(
            "a sort that mixes equals",
            ', kind="stable"',
            "",
            'Unless it is told `kind="stable"`, argsort may leave equals in any order: '
            "it does so in rows of more than sixteen.",
        ),
        Wrong(
            "equals stay together",
            "np.where(before < top_p, ranked, 0.0), axis=1)",
            "np.where(before < top_p, ranked, 0.0), axis=1)\n"
            "    least = kept.min(axis=1, where=kept > 0, initial=1, keepdims=True)\n"
            "    kept = np.where(law >= least, law, 0.0)",
            "All that are as probable as the last one kept come along. Count: of "
            "equals, those with the lower ids stay until top_p is reached.",
        ),
        Wrong(
            "no cut",
            LINE,
            "before < 1",
            "The law of that temperature is right. Now keep only as many of the most "
            "probable tokens as reach top_p.",
        ),
        Wrong(
            "one softmax over the batch",
            LAW,
            "law = np.exp(z) / np.exp(z).sum()",
            "Each row is a law of its own and sums to 1: `axis=1, keepdims=True`.",
        ),
        Wrong(
            "the largest logit of the whole batch subtracted",
            "logits.max(axis=1, keepdims=True)",
            "logits.max()",
            "Then a row far below the others becomes 0/0. Subtract each row's own "
            "maximum.",
        ),
        Wrong(
            "the largest logit not subtracted",
            "(logits - logits.max(axis=1, keepdims=True)) / temperature",
            "logits / temperature",
            "e^800 is no number any more. Subtract each row's maximum before anything "
            "else; the law does not change.",
        ),
        Wrong(
            "temperature 0 divides",
            "if temperature == 0:\n        return " + GREEDY,
            "temperature = float(temperature)",
            "Nothing can be divided by 0. Temperature 0 is the greedy law: all on the "
            "largest logit.",
        ),
        Wrong(
            "temperature 0 taken for a tiny one",
            "if temperature == 0:\n        return " + GREEDY,
            "temperature = max(temperature, 1e-8)",
            "Then equal largest logits share the law, as far as top_p lets them. "
            "Greedy is one token, the first among equals.",
        ),
        Wrong(
            "greedy shared among equals",
            GREEDY,
            "(ties := 1.0 * (logits == logits.max(axis=1, keepdims=True))) "
            "/ ties.sum(axis=1, keepdims=True)",
            "Greedy is one token: of equal logits the first gets all, as argmax has "
            "it.",
        ),
        Wrong(
            "the first place where the sum reaches top_p, though there may be none",
            LINE,
            "np.arange(law.shape[1]) "
            "<= (before + ranked >= top_p).argmax(axis=1)[:, None]",
            "Rounded, all probabilities together may be less than 1, and so less than "
            "a top_p of 1. `argmax` of nothing but False is 0: one token stays. Ask "
            "instead what the tokens before have: `before < top_p`.",
        ),
        Wrong(
            "greedy by the last of equals",
            "logits.argmax(axis=1)",
            "logits.shape[1] - 1 - logits[:, ::-1].argmax(axis=1)",
            "Of equal logits the first gets all, as argmax has it.",
        ),
    ),
    right=(
        "def next_token_law(logits, temperature, top_p):\n"
        "    law = np.zeros(logits.shape)\n"
        "    for row, z in zip(law, logits):\n"
        "        if temperature == 0:\n"
        "            row[z.argmax()] = 1\n"
        "            continue\n"
        "        weight = np.exp((z - z.max()) / temperature)\n"
        "        p, total = weight / weight.sum(), 0.0\n"
        "        for i in sorted(range(len(z)), key=lambda i: -p[i]):\n"
        "            row[i] = p[i]\n"
        "            total += p[i]\n"
        "            if total >= top_p:\n"
        "                break\n"
        "        row /= total\n"
        "    return law\n",
        "def next_token_law(logits, temperature, top_p):\n"
        "    z = logits.astype(np.float32)\n"
        "    B, V = z.shape\n"
        "    if not temperature:\n"
        "        top_p, temperature = 1e-9, 1.0\n"
        "    z = (z - z.max(1)[:, None]) / np.float32(temperature)\n"
        "    order = np.lexsort((np.broadcast_to(np.arange(V), z.shape), -z))\n"
        "    z = z[np.arange(B)[:, None], order]\n"
        "    p = np.exp(z - np.log(np.exp(z).sum(-1, keepdims=True)))\n"
        "    keep = np.array([np.searchsorted(c, top_p) for c in p.cumsum(-1)])\n"
        "    z[np.arange(V) > keep[:, None]] = -np.inf\n"
        "    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)\n"
        "    return p[np.arange(B)[:, None], np.argsort(order, axis=1)]\n",
        "def next_token_law(logits, temperature, top_p):\n"
        "    if temperature == 0:\n"
        "        first = logits.argmax(-1)[:, None]\n"
        "        return (np.arange(logits.shape[1]) == first).astype(float)\n"
        "    z = logits.astype(float) - logits.max(-1, keepdims=True)\n"
        "    p = np.exp(z / temperature)\n"
        "    p = p / p.sum(-1, keepdims=True)\n"
        "    mine, other = p[:, :, None], p[:, None, :]\n"
        "    i = np.arange(p.shape[1])\n"
        "    ahead = (other > mine) | ((other == mine) & (i < i[:, None]))\n"
        "    p = p * ((other * ahead).sum(-1) < top_p)\n"
        "    return p / p.sum(-1, keepdims=True)\n",
    ),
)

CHECKS = [NEXT_TOKEN_LAW]
