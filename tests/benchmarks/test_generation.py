"""A token beside Hugging Face transformers, and what drafts bring: chapter 9's rows.

Each side is a process of its own with the same weights, prompt and threads, as
`book/generation_speed.py` runs them. The bars: 5 times transformers' tokens at 64 of
context, 15 times at 8,192; within 1.5 times of reading the weights once; with drafts
1.4 times the tokens, 80 % kept; a token dearer by context no faster than the cache.
``make bench ARGS="-k test_generation"``; the machine must be quiet.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "book"))

import generation_speed as speed  # noqa: E402

THREADS = min(2, os.cpu_count() or 1)


def test_a_token_by_context() -> None:
    print(f"\nmilliseconds a token, 256 experts of 64, {THREADS} threads, float32")
    ms: dict[tuple[str, int], float] = {}
    for context in speed.CONTEXTS:
        for arm in speed.ARMS:
            if (arm, context) not in ms:
                ms[arm, context] = speed.token(arm, context, THREADS)["ms"]
        said = ", ".join(f"{arm} {ms[arm, context]:.2f}" for arm in speed.ARMS)
        faster = ms["transformers", context] / ms["compiled", context]
        print(f"{context:6,} behind it: {said}; {faster:.1f} x transformers")
    near, far = speed.CONTEXTS[0], speed.CONTEXTS[-1]
    for arm in speed.READING:
        read = ms["compiled", near] / ms[arm, near]
        print(f"at {near} {read:.2f} x the time of {arm} of its weights (bar 1.5)")
    a, b, c = (ms["compiled", n] for n in speed.CONTEXTS)
    _, middle, _ = speed.CONTEXTS
    growth = (c - b) / (b - a) / ((far - middle) / (middle - near))
    print(f"dearer by context {growth:.2f} x as fast as the cache grows (bar 1)")


def test_drafts() -> None:
    print("\nthe shipped MINI, with drafts and without")
    for engine in speed.ENGINES:
        for row in speed.in_a_process("speculation", THREADS, "--arm", engine):
            gain = row["plain_ms"] / row["speculative_ms"]
            print(
                f"{engine:9} {row['kind']:14} T = {row['temperature']}: "
                f"{row['acceptance']:.0%} kept, {row['plain_ms']:.3f} ms a token, "
                f"{gain:.2f} x as fast with drafts (bar 1.4)"
            )
