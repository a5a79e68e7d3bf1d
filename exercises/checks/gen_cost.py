"""Chapter 9, the bill: what a pass over one token reads, and over two."""

from grader.spec import Case, Check, Wrong

VISITED = "E * (1 - (1 - K / E) ** tokens)"
READ = "dense + visited * expert + N * cache"
ONE = "read(N), read(2 * N)"
QUOTIENT = "(1 + a) * one / (two + draft)"


def bill(
    E: int, K: int, N: int, a: float, dense: float, expert: float, cache: float,
    draft: float,
) -> Case:  # fmt: skip
    """Texts and experts in the label, the bytes in the arguments."""
    texts = f"{N} text{'s' * (N > 1)}"
    label = f"{texts}, {K} of {E} experts, a = {a}, drafts for {draft:g} bytes"
    return Case(label, (E, K, dense, expert, cache, draft, a, N))


GAIN = Check(
    "gen.5",
    returns=("one", "two", "gain"),
    cases=lambda: [
        bill(4, 1, 1, 0.5, 10.0, 4.0, 2.0, 3.0),
        bill(256, 8, 1, 0.85, 16.2e9, 2.55e9, 0.3e9, 1.6e9),
        bill(256, 8, 64, 0.85, 16.2e9, 2.55e9, 0.3e9, 11.0e9),
        bill(8, 2, 3, 0.6, 5.0, 1.5, 0.7, 2.0),
        bill(8, 2, 40, 0.6, 5.0, 1.5, 0.7, 2.0),
        bill(6, 6, 2, 0.9, 7.0, 3.0, 1.0, 0.5),
        bill(16, 1, 5, 0.0, 2.0, 1.0, 0.1, 0.4),
        bill(10, 3, 2, 1.0, 0.5, 6.0, 9.0, 0.0),
        bill(1, 1, 1, 0.7, 4.0, 8.0, 0.0, 1.0),
        bill(64, 6, 7, 0.75, 0.0, 1.0, 30.0, 5.0),
    ],
    hints=(
        "Write one small function for a pass over some number of tokens, and call it "
        "twice. Which of its three parts grow with the tokens, which with the texts?",
        "A pass over `tokens` reads `dense`, `E * (1 - (1 - K / E) ** tokens)` times "
        "`expert`, and `N * cache`. Speed is tokens over bytes, so the gain is a "
        "quotient of two speeds.",
        "`one = read(N)` and `two = read(2 * N)`. Without drafts a text gets 1 token "
        "for `one` bytes, with drafts 1 + a for `two + draft`: `(1 + a) * one / (two + "
        "draft)`.",
    ),
    wrong=(
        Wrong(
            "no two tokens visit the same expert",
            VISITED,
            "K * tokens",
            "They meet more and more often, the more tokens there are; soon it would "
            "be more experts than the layer has.",
        ),
        Wrong(
            "no two meet while there are experts left",
            VISITED,
            "min(K * tokens, E)",
            "Tokens do not keep out of each other's way. Some meet from the second on, "
            "and some experts are still unvisited when K T is E.",
        ),
        Wrong(
            "two tokens a text, twice the experts",
            VISITED,
            "E * (1 - (1 - K / E) ** N) * tokens / N",
            "Some experts of the second tokens have been read for the first ones: put "
            "2N into the exponent.",
        ),
        Wrong(
            "each text reads its experts for itself",
            VISITED,
            "N * E * (1 - (1 - K / E) ** (tokens / N))",
            "An expert that two texts visit in one pass is read once, for both. All "
            "tokens of the pass belong into one exponent: N of them, or 2N.",
        ),
        Wrong(
            "all tokens visit the same experts",
            VISITED,
            "K + 0 * tokens",
            "Then drafts would cost nothing more. Each token chooses for itself.",
        ),
        Wrong(
            "all tokens of a text visit the same experts",
            VISITED,
            "E * (1 - (1 - K / E) ** (0 * tokens + N))",
            "The second token of a text chooses for itself, just as another text's "
            "would: N tokens in one kind of pass, 2N in the other.",
        ),
        Wrong(
            "every expert read in every pass",
            VISITED,
            "E + 0 * tokens",
            "An expert that no token visits stays in memory, unread. That is why so "
            "large a model can be fast at all.",
        ),
        Wrong(
            "the choices of one token independent of each other",
            VISITED,
            "E * (1 - (1 - 1 / E) ** (K * tokens))",
            "A token visits K *different* experts, so it leaves a given one alone with "
            "1 - K/E. Only different tokens do not know of each other.",
        ),
        Wrong(
            "the experts left alone",
            VISITED,
            "E * (1 - K / E) ** tokens",
            "Those are the ones that nobody visits. The others are read.",
        ),
        Wrong(
            "the share of the experts, not their number",
            VISITED,
            "1 - (1 - K / E) ** tokens",
            "That is how probably one expert is visited. There are E of them.",
        ),
        Wrong(
            "dense weights read once a token",
            READ,
            "tokens * dense + visited * expert + N * cache",
            "A weight that is there is used for all tokens of the pass. That is what "
            "makes a second one cheap.",
        ),
        Wrong(
            "dense weights read once a text",
            READ,
            "N * dense + visited * expert + N * cache",
            "All texts are read by the same weights, in one pass.",
        ),
        Wrong(
            "a text's cache read once a token",
            READ,
            "dense + visited * expert + tokens * cache",
            "Both new tokens of a text look at the same cache, which is read once for "
            "both.",
        ),
        Wrong(
            "one cache for all texts",
            READ,
            "dense + visited * expert + cache",
            "Weights are shared among the texts. A cache belongs to one of them: N "
            "texts, N caches.",
        ),
        Wrong(
            "the caches forgotten",
            READ,
            "dense + visited * expert",
            "A pass reads the cache of each text too, once.",
        ),
        Wrong(
            "one text's tokens",
            ONE,
            "read(1), read(2)",
            "A pass takes a token of *each* text: N without drafts, 2N with them.",
        ),
        Wrong(
            "one draft for all texts",
            ONE,
            "read(N), read(N + 1)",
            "Each text has a draft of its own: 2N tokens.",
        ),
        Wrong(
            "two passes over one token instead of one over two",
            ONE,
            "read(N), 2 * read(N)",
            "Both tokens are read in *one* pass, which takes the dense weights and the "
            "caches once.",
        ),
        Wrong(
            "a pass over two tokens at the price of one",
            QUOTIENT,
            "(1 + a) * one / (one + draft)",
            "That is mtp.6, and true where nothing but dense weights is read. The pass "
            "that checks a draft reads `two`.",
        ),
        Wrong(
            "the draft in the bytes of the pass",
            ONE,
            "read(N), read(2 * N) + draft",
            "`two` is what the trunk's pass over two tokens reads. The module's bytes "
            "come on top only where the gain is asked for.",
            ((QUOTIENT, "(1 + a) * one / two"),),
        ),
        Wrong(
            "how much faster, not how many times as fast",
            QUOTIENT,
            QUOTIENT + " - 1",
            "As fast as before is 1, twice as fast is 2.",
        ),
        Wrong(
            "one token a round",
            QUOTIENT,
            "one / (two + draft)",
            "A round yields the trunk's own token and, a times of 1, one more: 1 + a.",
        ),
        Wrong(
            "two tokens a round",
            QUOTIENT,
            "2 * one / (two + draft)",
            "Only a of the drafts are kept. A round yields 1 + a.",
        ),
        Wrong(
            "only kept drafts counted",
            QUOTIENT,
            "a * one / (two + draft)",
            "Where a draft falls the trunk's own token takes its place: no round ends "
            "with nothing. 1 + a.",
        ),
        Wrong(
            "drafts without end",
            QUOTIENT,
            "one / (1 - a) / (two + draft)",
            "1 + a + a^2 + ... is for a module that drafts on and on. This one drafts "
            "one token a round.",
        ),
        Wrong(
            "drafts for nothing",
            QUOTIENT,
            "(1 + a) * one / two",
            "The module reads `draft` bytes in every round.",
        ),
        Wrong(
            "only kept drafts are paid for",
            QUOTIENT,
            "(1 + a) * one / (two + a * draft)",
            "A draft that falls has cost as much as one that is kept.",
        ),
        Wrong(
            "the draft paid for by both",
            QUOTIENT,
            "(1 + a) * (one + draft) / (two + draft)",
            "Without drafts the module reads nothing.",
        ),
        Wrong(
            "a draft paid for in each text",
            QUOTIENT,
            "(1 + a) * one / (two + N * draft)",
            "`draft` is what the module reads in a round, for all texts together.",
        ),
        Wrong(
            "time instead of speed",
            QUOTIENT,
            "(two + draft) / one / (1 + a)",
            "That is how much of the time is still needed. Asked for is how many times "
            "as fast.",
        ),
    ),
    right=(
        "def gain(E, K, dense, expert, cache, draft, a, N):\n"
        "    passes = []\n"
        "    for T in (1, 2):\n"
        "        unvisited = 1.0\n"
        "        for _ in range(T * N):\n"
        "            unvisited *= (E - K) / E\n"
        "        experts = (E - E * unvisited) * expert\n"
        "        passes.append(dense + cache * N + experts)\n"
        "    one, two = passes\n"
        "    speed, faster = 1 / one, (1 + a) / (two + draft)\n"
        "    return one, two, faster / speed\n",
        "def gain(E, K, dense, expert, cache, draft, a, N):\n"
        "    tokens = np.array([N, 2 * N], np.float32)\n"
        "    visited = np.zeros(2)\n"
        "    for t in range(2 * N):\n"
        "        visited += (t < tokens) * K * (1 - visited / E)\n"
        "    one, two = np.dot([[expert]], visited[None])[0] + dense + N * cache\n"
        "    return [one, two, one / (two + draft) + a * one / (two + draft)]\n",
        "def gain(E, K, dense, expert, cache, draft, a, N):\n"
        "    rest = 1 - K / E\n"
        "    one = dense + N * cache + expert * E * (1 - rest**N)\n"
        "    more = expert * E * rest**N * (1 - rest**N)\n"
        "    faster = (1 + a) / (1 + (more + draft) / one)\n"
        "    return np.array([one, one + more, faster])\n",
    ),
)

CHECKS = [GAIN]
