"""Chapter 4: YaRN's frequencies, and the scale of the scores."""

from grader.spec import Case, Check, Wrong


def stretched(d_h: int, d_R: int, s: float, L: int, *more: float) -> Case:
    """One case; more are b, n_fast and n_slow."""
    names = ("b", "n_fast", "n_slow")
    rest = "".join(f", {n}={v}" for n, v in zip(names, more, strict=False))
    return Case(f"d_h={d_h}, d_R={d_R}, s={s}, L={L}{rest}", (d_h, d_R, s, L, *more))


YARN = Check(
    "mla.5",
    returns=("theta", "alpha"),
    rtol=1e-5,
    atol=1e-9,  # the slow pairs are small beside the first
    cases=lambda: [
        stretched(4, 8, 40.0, 4096),
        stretched(128, 64, 40.0, 4096),
        stretched(16, 32, 8.0, 2048, 500_000.0),
        stretched(8, 16, 4.0, 100),
        stretched(6, 12, 10.0, 4096, 10.0, 200, 1),
        stretched(3, 24, 2.5, 8192, 10_000.0, 16, 2),
        stretched(5, 10, 1.0, 4096),
        stretched(8, 16, 4.0, 2000),  # here 31 turns are one pair further than 32
        stretched(2, 24, 16.0, 2048),  # and 33 one pair less far
    ],
    hints=(
        "Compute j for both numbers of turns first, round the two outwards, and "
        "print the ramp: zeros, a slope, ones. The first pairs are the fast ones.",
        "`j = np.arange(d_R // 2)`, `theta = b ** (-2 * j / d_R)`, the ramp is "
        "`np.clip((j - low) / (high - low), 0, 1)`. Many turns are reached by small j, "
        "so n_fast gives low.",
        "With the ramp: `theta * (1 - ramp) + theta / s * ramp`. And `m = 0.1 * "
        "np.log(s) + 1`, alpha is `m**2 * (d_h + d_R) ** -0.5`.",
    ),
    wrong=(
        Wrong(
            "m not squared",
            "m**2 * ",
            "m * ",
            "m belongs to the queries and to the keys; their product has it twice.",
        ),
        Wrong(
            "m forgotten",
            "m**2 * ",
            "",
            "A longer context spreads the softmax out; m, squared, sharpens it again.",
        ),
        Wrong(
            "divided by m squared",
            "m**2 * ",
            "m**-2 * ",
            "The scores grow: alpha is m squared over the root.",
        ),
        Wrong(
            "m from another logarithm",
            "0.1 * np.log(s)",
            "0.1 * np.log10(s)",
            "ln is the natural logarithm, `np.log`.",
        ),
        Wrong(
            "m as in DeepSeek-V2",
            "0.1 * np.log(s)",
            "0.0707 * np.log(s)",
            "That is DeepSeek-V2's factor. Version 3 has 0.1.",
        ),
        Wrong(
            "the scale of the rotated part alone",
            "(d_h + d_R) ** -0.5",
            "d_R ** -0.5",
            "A query has d_h + d_R numbers; the scale is that of the whole score.",
        ),
        Wrong(
            "the scale of the content alone",
            "(d_h + d_R) ** -0.5",
            "d_h ** -0.5",
            "A query has d_h + d_R numbers; the scale is that of the whole score.",
        ),
        Wrong(
            "every frequency divided",
            "theta * (1 - ramp) + theta / s * ramp",
            "theta / s",
            "So positions would be interpolated, and neighbours hard to tell apart. "
            "The fast pairs keep their frequency.",
        ),
        Wrong(
            "the frequencies left alone",
            "theta * (1 - ramp) + theta / s * ramp",
            "theta",
            "The slow pairs have never turned as far as the new length would turn "
            "them. Divide their frequency by s.",
        ),
        Wrong(
            "the base stretched",
            "theta * (1 - ramp) + theta / s * ramp",
            "(b * s ** (d_R / (d_R - 2))) ** (-2 * j / d_R)",
            "That is the NTK-aware scaling which YaRN replaced. YaRN looks at how "
            "often each pair turns.",
        ),
        Wrong(
            "the ramp downhill",
            "theta * (1 - ramp) + theta / s * ramp",
            "theta * ramp + theta / s * (1 - ramp)",
            "The ramp is 0 at the fast pairs, which keep their frequency, and 1 at the "
            "slow ones.",
        ),
        Wrong(
            "multiplied by s",
            "theta / s * ramp",
            "theta * s * ramp",
            "The slow pairs become slower still: s times.",
        ),
        Wrong(
            "periods blended",
            "theta * (1 - ramp) + theta / s * ramp",
            "1 / ((1 - ramp) / theta + s / theta * ramp)",
            "Blend the frequencies themselves, not their inverses.",
        ),
        Wrong(
            "blended in the exponent",
            "theta * (1 - ramp) + theta / s * ramp",
            "theta / s**ramp",
            "The blend is a weighted mean of the two frequencies themselves.",
        ),
        Wrong(
            "no blend",
            "np.clip((j - low) / (high - low), 0, 1)",
            "1.0 * (j >= high)",
            "Between low and high the ramp rises in a straight line.",
        ),
        Wrong(
            "the ramp not cut off",
            "np.clip((j - low) / (high - low), 0, 1)",
            "(j - low) / (high - low)",
            "Outside of low and high the ramp is flat, 0 and 1.",
        ),
        Wrong(
            "the bounds not rounded",
            "np.floor(pair(n_fast))",
            "pair(n_fast)",
            "low is rounded down and high rounded up, to whole pairs.",
            (("np.ceil(pair(n_slow))", "pair(n_slow)"),),
        ),
        Wrong(
            "the bounds rounded inwards",
            "np.floor(pair(n_fast))",
            "np.ceil(pair(n_fast))",
            "Outwards: low is rounded down and high up.",
            (("np.ceil(pair(n_slow))", "np.floor(pair(n_slow))"),),
        ),
        Wrong(
            "the bounds not limited",
            "low = max(np.floor(pair(n_fast)), 0)",
            "low = np.floor(pair(n_fast))",
            "low is 0 at least, and high d_R - 1 at most.",
            (
                (
                    "high = min(np.ceil(pair(n_slow)), d_R - 1)",
                    "high = np.ceil(pair(n_slow))",
                ),
            ),
        ),
        Wrong(
            "low not limited",
            "low = max(np.floor(pair(n_fast)), 0)",
            "low = np.floor(pair(n_fast))",
            "low is 0 at least. In a short context no pair turns n_fast times.",
        ),
        Wrong(
            "high not limited",
            "high = min(np.ceil(pair(n_slow)), d_R - 1)",
            "high = np.ceil(pair(n_slow))",
            "high is d_R - 1 at most.",
        ),
        Wrong(
            "high limited to the last pair",
            "d_R - 1)",
            "d_R // 2 - 1)",
            "The limit is d_R - 1, as released, though the last pair has the number "
            "d_R/2 - 1.",
        ),
        Wrong(
            "angles instead of turns",
            "(2 * np.pi * n)",
            "n",
            "A turn is 2 pi radians: n turns within L are 2 pi n = L theta.",
        ),
        Wrong(
            "many turns taken for many pairs",
            "pair(n_fast)",
            "pair(n_slow) ",
            "Fast pairs have small j, so n_fast gives low and n_slow gives high.",
            (("np.ceil(pair(n_slow))", "np.ceil(pair(n_fast))"),),
        ),
        Wrong(
            "the bounds of the new length",
            "np.log(L / (2",
            "np.log(s * L / (2",
            "What counts is how often a pair turned in training: within L, the old "
            "length.",
        ),
        Wrong(
            "10000 whatever the base",
            "theta = b **",
            "theta = 10000.0 **",
            "b is an argument, and 10000 only its default.",
            (("np.log(b)", "np.log(10000.0)"),),
        ),
        Wrong(
            "10000 in the bounds, whatever the base",
            "np.log(b)",
            "np.log(10000.0)",
            "b is an argument, and 10000 only its default. It is in j(n) too.",
        ),
        Wrong(
            "the exponent without its 2",
            "-2 * j / d_R",
            "-j / d_R",
            "theta_j is b^(-2j/d_R), with j from 0 to d_R/2 - 1.",
        ),
        Wrong(
            "the bounds rounded to the nearest",
            "np.floor(pair(n_fast))",
            "np.round(pair(n_fast))",
            "Outwards: low is rounded down and high up.",
            (("np.ceil(pair(n_slow))", "np.round(pair(n_slow))"),),
        ),
        Wrong(
            "32 turns and 1 by heart",
            "pair(n_fast)",
            "pair(32)",
            "n_fast and n_slow are arguments, and 32 and 1 only their defaults.",
            (("pair(n_slow)", "pair(1)"),),
        ),
        Wrong(
            "10000 in the frequencies, whatever the base",
            "theta = b **",
            "theta = 10000.0 **",
            "b is an argument, and 10000 only its default. It is in theta too.",
        ),
    ),
    right=(
        "def yarn(d_h, d_R, s, L, b=10000.0, n_fast=32, n_slow=1):\n"
        "    theta, out = [b ** (-i / d_R) for i in range(0, d_R, 2)], []\n"
        "    bounds = [np.log2(L / n / 2 / np.pi) / np.log2(b) * d_R / 2\n"
        "              for n in (n_fast, n_slow)]\n"
        "    low, high = int(bounds[0] // 1), -int(-bounds[1] // 1)\n"
        "    low, high = max(low, 0), min(high, d_R - 1)\n"
        "    for j, t in enumerate(theta):\n"
        "        keep = min(max((high - j) / (high - low), 0.0), 1.0)\n"
        "        out.append(t / s + (t - t / s) * keep)\n"
        "    return np.array(out), (1 + np.log(s) / 10) ** 2 / np.sqrt(d_h + d_R)\n",
        "def yarn(d_h, d_R, s, L, b=10000.0, n_fast=32, n_slow=1):\n"
        "    import math\n"
        "    def at(n):\n"
        "        return math.log(L / (n * math.tau), b) * d_R / 2\n"
        "    low, high = max(0, math.floor(at(n_fast))), math.ceil(at(n_slow))\n"
        "    j = np.linspace(0, d_R / 2 - 1, d_R // 2)\n"
        "    rho = np.interp(j, [low, min(high, d_R - 1)], [0, 1])\n"
        "    theta = np.float_power(b, -j / (d_R / 2)).astype(np.float32)\n"
        "    theta *= 1 - rho * (1 - 1 / s)\n"
        "    return theta, ((0.1 * math.log(s) + 1) / (d_h + d_R) ** 0.25) ** 2\n",
    ),
)

CHECKS = [YARN]
