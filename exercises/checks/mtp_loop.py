"""Chapter 2, all of it together: the loop that drafts, checks and keeps."""

from collections.abc import Callable

import numpy as np
from grader.compare import ByName
from grader.spec import Case, Check, Wrong

from checks.draws import rng
from checks.toys import Module, Trunk, chance_of, drawing


def greedy(P: int, n: int, seed: int, V: int = 9, skill: int = 6) -> Case:
    """Laws that are sure of one token."""
    prompt = rng(seed).integers(0, V, P)
    label = f"greedy, prompt of {P}, {n} new; {skill} of 10 drafts are good"
    toys = Trunk(V, seed), Module(V, seed, skill=skill)
    return Case(label, (*toys, prompt, n, drawing(0.5), chance_of(0.5)))


def drawn(P: int, n: int, seed: int, level: float, u: float, V: int = 6) -> Case:
    """Laws of many tokens, and chances that are always the same."""
    prompt = rng(seed).integers(0, V, P)
    label = f"drawn, prompt of {P}, {n} new; chance() is always {u}"
    toys = Trunk(V, seed, greedy=False), Module(V, seed, greedy=False)
    return Case(label, (*toys, prompt, n, drawing(level), chance_of(u)))


def text_and_passes(function: Callable, trunk: Trunk, *rest: object) -> object:
    """The text, and how often the trunk was asked."""
    text = function(trunk, *rest)
    if text is ... or text is None:
        return text
    text = np.array(text) if isinstance(text, list | tuple) else text
    return ByName(text=text, passes=trunk.passes)


WRITE = Check(
    "mtp.7",
    returns=("text", "passes"),
    call=text_and_passes,
    cases=lambda: [
        greedy(P=3, n=6, seed=1),
        greedy(P=1, n=1, seed=2),
        greedy(P=2, n=2, seed=3),
        greedy(P=4, n=25, seed=4),
        greedy(P=1, n=24, seed=5),
        greedy(P=2, n=7, seed=6, skill=10),
        greedy(P=2, n=8, seed=7, skill=10),
        greedy(P=5, n=6, seed=8, skill=0),
        drawn(P=2, n=21, seed=9, level=0.4, u=0.6),
        drawn(P=3, n=20, seed=10, level=0.55, u=0.75),
    ],
    hints=(
        "At the start of a round both caches hold everything settled but the last "
        "token. Write down what they hold after a kept draft, and after a refused one; "
        "then make it true again.",
        "The trunk's two laws: `laws[0]` judges d, `laws[1]` is for the token after d, "
        "if d stands. What the module reads next is the trunk's last states and the "
        "new tokens: two pairs after a kept draft, one after a refused one.",
        "`q = module(states, new)[-1]`, `d = draw(q)`, `states, laws = "
        "trunk([text[-1], d])`, then your verdict on `laws[0]`. Kept: `new = [d, "
        "draw(laws[1])]`. Refused: `new = [draw(law)]`, only `states[:1]` counts, and "
        "`trunk.crop(trunk.length - 1)`.",
    ),
    wrong=(
        Wrong(
            "one token a pass, without a draft",
            "    while len(text) + 1 < n:\n",
            "    while len(text) < n:\n"
            "        states, laws = trunk(text[-1:])\n"
            "        text.append(draw(laws[-1]))\n"
            "    while len(text) + 1 < n:\n",
            "The text is right, and nothing is gained: let the module draft.",
        ),
        Wrong(
            "two passes where one would do",
            "        states, laws = trunk([text[-1], d])",
            "        one, two = trunk(text[-1:]), trunk([d])\n"
            "        states, laws = map(np.concatenate, zip(one, two))",
            "The gain is that one pass reads both, the last settled token and d.",
        ),
        Wrong(
            "the favourite where a draw belongs",
            "d = draw(q)",
            "d = q.argmax()",
            "Every token is drawn from its law, with `draw`: the draft from q, the "
            "replacement from what your verdict gives, the second token from laws[1].",
            (("draw(laws[1])", "laws[1].argmax()"), ("[draw(law)]", "[law.argmax()]")),
        ),
        Wrong(
            "held against a draw of the trunk's own",
            "kept, law = verdict(laws[0], q, d, chance())",
            "y = draw(laws[0])\n        kept, law = y == d, np.eye(len(q))[y]",
            "So the law is right, but only the sum of p q is kept. Your verdict keeps "
            "the sum of min(p, q).",
        ),
        Wrong(
            "a refused draft left in the trunk's cache",
            "            trunk.crop(trunk.length - 1)\n",
            "",
            "The trunk goes on as if the text held the draft. Crop its cache by one "
            "after a refusal.",
        ),
        Wrong(
            "the second token from the law that judged the first",
            "new = [d, draw(laws[1])]",
            "new = [d, draw(laws[0])]",
            "laws[0] is about the place of d. The token after d is drawn from laws[1].",
        ),
        Wrong(
            "a kept draft brings no second token",
            "            new = [d, draw(laws[1])]\n",
            "            new = [d]\n            states = states[:1]\n"
            "            trunk.crop(trunk.length - 1)\n",
            "The trunk has read d and has a law for what comes after it: take a token "
            "from there too. That is the whole gain.",
        ),
        Wrong(
            "the module fed with the state of a refused draft",
            "states = states[:1]",
            "states = states[1:]",
            "The second state has read the draft that fell. The token that replaced it "
            "stands behind the first.",
        ),
        Wrong(
            "the module fed with the newest pair only",
            "module(states, new)[-1]",
            "module(states[-1:], new[-1:])[-1]",
            "It wants every settled pair once, in order: the whole prompt's first, and "
            "two after a kept draft. A gap stays in its cache for ever.",
        ),
        Wrong(
            "the replacement drawn from p",
            "new = [draw(law)]",
            "new = [draw(laws[0])]",
            "A refused draft is replaced from the law that your verdict gives, what p "
            "has beyond q.",
        ),
        Wrong(
            "a draft where one token is missing",
            "while len(text) + 1 < n",
            "while len(text) < n",
            "A kept draft brings two tokens. Where one is missing, let the trunk give "
            "it alone; the text has exactly n.",
        ),
        Wrong(
            "p and q exchanged",
            "verdict(laws[0], q, d, chance())",
            "verdict(q, laws[0], d, chance())",
            "The trunk's law is p, the module's q: the trunk is the judge.",
        ),
    ),
    right=(
        "def write(trunk, module, prompt, n, draw, chance):\n"
        "    states, laws = trunk(prompt)\n"
        "    settled = [int(t) for t in prompt] + [draw(laws[-1])]\n"
        "    end = len(prompt) + n\n"
        "    q = module(states, settled[1:])[-1]\n"
        "    while len(settled) < end:\n"
        "        if len(settled) == end - 1:\n"
        "            _, (p,) = trunk(settled[-1:])\n"
        "            return settled[len(prompt):] + [draw(p)]\n"
        "        d, at = draw(q), len(settled)\n"
        "        (h, g), (p, after) = trunk(np.array([settled[-1], d]))\n"
        "        kept, law = verdict(p, q, d, chance())\n"
        "        if not kept:\n"
        "            trunk.crop(at)\n"
        "            settled.append(draw(law))\n"
        "            q = module([h], settled[-1:])[0]\n"
        "            continue\n"
        "        settled += [d, draw(after)]\n"
        "        module(np.array([h]), [d])\n"
        "        q = module(np.array([g]), settled[-1:])[-1]\n"
        "    return settled[len(prompt):]\n",
        "def write(trunk, module, prompt, n, draw, chance):\n"
        "    states, laws = trunk(prompt)\n"
        "    h = list(states)\n"
        "    text = np.array([*prompt, draw(laws[-1])])\n"
        "    P, fed = len(prompt), 0\n"
        "    while (missing := P + n - len(text)) > 0:\n"
        "        if missing == 1:\n"
        "            _, laws = trunk(text[-1:])\n"
        "            text = np.append(text, draw(laws[0]))\n"
        "            break\n"
        "        q = module(np.array(h[fed:]), text[fed + 1:])[-1]\n"
        "        fed = len(h)\n"
        "        d = draw(q)\n"
        "        states, laws = trunk([text[-1], d])\n"
        "        kept, law = verdict(laws[0], q, d, chance())\n"
        "        more = [d, draw(laws[1])] if kept else [draw(law)]\n"
        "        h += list(states[:len(more)])\n"
        "        text = np.append(text, more)\n"
        "        trunk.crop(len(text) - 1)\n"
        "    return text[P:]\n",
    ),
)

CHECKS = [WRITE]
