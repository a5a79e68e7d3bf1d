"""A step of training in PyTorch beside Hugging Face transformers.

Each side is a process of its own, with the same weights, batches and threads, as
`book/torch_speed.py` runs them. The bars: half of transformers' time at its best, and
less memory. ``make bench ARGS="-k test_torch"``; the machine must be quiet.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "book"))

import torch_speed as speed  # noqa: E402


def test_a_step_beside_transformers() -> None:
    threads = min(2, os.cpu_count() or 1)
    wanted = ("memory kept", "oneDNN", "bfloat16", *speed.PEERS)
    rows = {arm: speed.measure(arm, threads) for arm in wanted}
    print(f"\na step of 8 x 256 tokens, 256 experts, {threads} threads, float32")
    for arm, row in rows.items():
        print(f"{arm:36} {row['ms']:7.0f} ms   {row['step_mib']:6.0f} MiB for the step")
    ours = rows["oneDNN"]
    for peer in speed.PEERS:
        times = rows[peer]["ms"] / ours["ms"]
        memory = ours["step_mib"] / rows[peer]["step_mib"]
        print(f"against {peer}: {times:.2f} x as fast (bar 2), memory {memory:.2f} "
              "of theirs (bar 1)")  # fmt: skip
