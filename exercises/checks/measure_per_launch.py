"""Chapter 11, the time of one launch out of timings of many."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import rng


def timings(
    label: str, counts: list[int], a: float, b: float, repeats: int, seed: int,
    moved: float = 3e6, bandwidth: float = 2e12,
) -> Case:  # fmt: skip
    """A line, noise around it, and some timings in which something else ran."""
    draws, n = rng(seed), np.array(counts)
    noise = draws.normal(0, 0.03, (len(n), repeats)) * b
    slow = (draws.random(noise.shape) < 0.25) * draws.exponential(8, noise.shape) * b
    return Case(label, (n, a + b * n[:, None] + noise + slow, moved, bandwidth))


MEDIAN = "t = np.median(seconds, axis=1)"
CENTRED = "n = counts - counts.mean()"
SLOPE = "b = np.sum(n * t) / np.sum(n * n)"
CONSTANT = "a = t.mean() - b * counts.mean()"
RESULT = "return a, b, moved / b / bandwidth"

PER_LAUNCH = Check(
    "measure.2",
    returns=("a", "b", "share"),
    cases=lambda: [
        Case(
            "three counts, three timings each",
            (
                np.array([1, 2, 4]),
                np.array([[5.0, 4.0, 9.0], [6.0, 6.5, 5.0], [8.0, 11.0, 10.0]]),
                6.0,
                10.0,
            ),
        ),
        timings("microseconds", [1, 10, 100], 8e-6, 3e-6, 9, 1),
        timings("counts in no order", [64, 2, 16, 8], 2e-5, 1e-6, 8, 2, 1e6, 3e12),
        timings("two counts", [5, 6], 1e-4, 2e-5, 11, 3),
        timings("nothing beside the launches", [3, 9, 30, 50], 0.0, 4e-3, 5, 4, 2e9),
        timings("more than the bandwidth", [2, 3, 8], 1e-6, 2e-6, 3, 6, 9e6),
        timings("one timing each", [1, 2, 3, 5, 9], 1.0, 0.25, 1, 5, 1.0, 40.0),
    ],
    hints=(
        "Three steps: one number for each count, which outliers do not move; a "
        "straight line through the K numbers; and a speed out of the slope.",
        "`np.median(seconds, axis=1)` is (K,). The slope of the least squares line is "
        "the sum of (n - mean n) t over the sum of (n - mean n)²; the line goes "
        "through the means of both. Or `np.polyfit(counts, t, 1)`.",
        "`b, a = np.polyfit(counts, np.median(seconds, axis=1), 1)`, and a launch "
        "moves `moved / b` bytes a second.",
    ),
    wrong=(
        Wrong(
            "the mean of the timings",
            MEDIAN,
            "t = np.mean(seconds, axis=1)",
            "One timing in which something else ran moves a mean as far as it likes. "
            "The median does not notice it.",
        ),
        Wrong(
            "the fastest timing",
            MEDIAN,
            "t = np.min(seconds, axis=1)",
            "The minimum is a fair choice too, but another number. Asked for is the "
            "median.",
        ),
        Wrong(
            "one median for all",
            MEDIAN,
            "t = np.full(len(counts), np.median(seconds))",
            "Each count has its own median, over its own timings: axis 1.",
        ),
        Wrong(
            "an upper median",
            MEDIAN,
            "t = np.sort(seconds, axis=1)[:, seconds.shape[1] // 2]",
            "Of an even number of timings the median is the mean of the two in the "
            "middle.",
        ),
        Wrong(
            "a line through the origin",
            SLOPE,
            "b = np.sum(counts * t) / np.sum(counts * counts)",
            "So the clock's own time is spread over the launches. The line has a "
            "constant, and that is what it is for.",
            ((CONSTANT, "a = 0.0"),),
        ),
        Wrong(
            "the time of a batch divided by its launches",
            SLOPE,
            "b = np.mean(t / counts) + 0 * n[0]",
            "In each batch the clock's own time is there once. Dividing leaves a share "
            "of it in every launch; the slope has none.",
        ),
        Wrong(
            "the largest batch divided by its launches",
            SLOPE,
            "b = t[counts.argmax()] / counts.max() + 0 * n[0]",
            "Some of the clock's own time is still in it. The slope has none.",
        ),
        Wrong(
            "only the first and the last count",
            SLOPE,
            "b = (t[-1] - t[0]) / (n[-1] - n[0])",
            "What was measured between the two counts as well: least squares over all "
            "K.",
        ),
        Wrong(
            "only the smallest and the largest count",
            SLOPE,
            "b = (t[n.argmax()] - t[n.argmin()]) / (n.max() - n.min())",
            "What was measured between the two counts as well: least squares over all "
            "K.",
        ),
        Wrong(
            "launches as a function of seconds",
            SLOPE,
            "b = np.sum((t - t.mean()) ** 2) / np.sum(n * t)",
            "The distances that are to be least are those of the times. This line has "
            "the least distances of the counts.",
        ),
        Wrong(
            "the constant at the smallest count",
            CONSTANT,
            "a = t[counts.argmin()] - b * counts.min()",
            "The least squares line goes through the means, not through a point that "
            "was measured.",
        ),
        Wrong(
            "the time of no launch left out",
            CONSTANT,
            "a = t.mean()",
            "That is the line at the mean count. a is its value at 0.",
        ),
        Wrong(
            "a and b exchanged",
            RESULT,
            "return b, a, moved / b / bandwidth",
            "First what is there beside the launches, then what one of them takes.",
        ),
        Wrong(
            "the clock counted with the launch",
            RESULT,
            "return a, b, moved / (a + b) / bandwidth",
            "The share is that of a launch: b alone.",
        ),
        Wrong(
            "times the bandwidth is missed by",
            RESULT,
            "return a, b, bandwidth * b / moved",
            "That is how many times longer than the floor it takes. The part used is "
            "the floor, moved / bandwidth, divided by b.",
        ),
        Wrong(
            "bytes a second",
            RESULT,
            "return a, b, moved / b",
            "Divide by the bandwidth: a part of it is asked for.",
        ),
    ),
    right=(
        "def per_launch(counts, seconds, moved, bandwidth):\n"
        "    b, a = np.polyfit(counts, np.median(seconds, axis=1), 1)\n"
        "    return a, b, moved / (b * bandwidth)\n",
        "def per_launch(counts, seconds, moved, bandwidth):\n"
        "    ordered = np.sort(seconds, axis=1)\n"
        "    R = ordered.shape[1]\n"
        "    t = (ordered[:, (R - 1) // 2] + ordered[:, R // 2]) / 2\n"
        "    A = np.stack([np.ones(len(counts)), counts], axis=1)\n"
        "    (a, b), *_ = np.linalg.lstsq(A, t, rcond=None)\n"
        "    return a, b, moved / bandwidth / b\n",
        "def per_launch(counts, seconds, moved, bandwidth):\n"
        "    t = [sorted(row) for row in seconds.tolist()]\n"
        "    t = [(r[len(r) // 2] + r[~(len(r) // 2)]) / 2 for r in t]\n"
        "    K, n = len(t), counts.tolist()\n"
        "    top = K * sum(i * j for i, j in zip(n, t)) - sum(n) * sum(t)\n"
        "    b = top / (K * sum(i * i for i in n) - sum(n) ** 2)\n"
        "    a = (sum(t) - b * sum(n)) / K\n"
        "    return np.array([a, b, moved / b / bandwidth])\n",
    ),
)

CHECKS = [PER_LAUNCH]
