"""How long a model takes to load, and how much memory, beside safetensors' own reading.

A synthetic model of some hundred megabytes, from a warm file, each reading in a process
of its own: its peak is what the process held more than before, resident and anonymous
(on Linux: pages of the mapped file are the system's, and may be taken back any time).
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minidsv3 import checkpoints, parameters
from minidsv3.config import TINY
from tests.learner import ROOT

BIG = dataclasses.replace(
    TINY, vocab_size=8_000, hidden_size=1_024, intermediate_size=3_000,
    moe_intermediate_size=1_024, n_routed_experts=16, num_hidden_layers=3,
)  # fmt: skip
MEASURE = """
import json, sys, threading, time
import ml_dtypes
from safetensors.numpy import load_file
from minidsv3 import checkpoints

def held():
    with open("/proc/self/status") as file:
        words = dict(line.split(":", 1) for line in file)
    return [int(words[kind].split()[0]) * 1024 for kind in ("RssAnon", "VmRSS")]

def watch():
    global peaks
    while not done:
        peaks = list(map(max, peaks, held()))
        time.sleep(0.002)

folder, how = sys.argv[1:]
calls = {
    "load_file": lambda: load_file(folder + "/model.safetensors"),
    "float32": lambda: checkpoints.load(folder),
    "as it is": lambda: checkpoints.load(folder, None),
    "bfloat16": lambda: checkpoints.load(folder, ml_dtypes.bfloat16),
    "opened": lambda: checkpoints.open_lazily(folder, None),
}
peaks = before = held()
done = False
threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
result = calls[how]()
seconds = time.perf_counter() - began
done = True
more = [max(pair) - b for *pair, b in zip(peaks, held(), before)]
print(json.dumps([seconds, *more]))
"""


def best(folder: Path, how: str, turns: int = 3) -> tuple[float, float, float]:
    """Seconds of the fastest turn, and the least of both peaks, in megabytes."""
    command = [sys.executable, "-c", MEASURE, str(folder), how]
    rows = []
    for _ in range(turns):
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        rows.append(json.loads(ran.stdout))
    seconds, anonymous, resident = map(min, zip(*rows, strict=True))
    return seconds, anonymous / 1e6, resident / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("saved", checkpoints.SAVED_AS)
def test_loading(tmp_path: Path, saved: str) -> None:
    checkpoints.save(tmp_path, BIG, parameters.initialise(BIG, 0, 0.02), saved)
    size = (tmp_path / checkpoints.WEIGHTS).stat().st_size / 1e6
    print(f"\n{parameters.count(BIG) / 1e6:.0f}M parameters in {saved}, {size:.0f} MB")
    ways = ["load_file", "opened", "as it is", "bfloat16", "float32"]
    for how in ways[saved == "float8_e4m3fn" :]:  # load_file gives NumPy no FP8
        seconds, anonymous, resident = best(tmp_path, how)
        print(f"{how:10} {1e3 * seconds:7.0f} ms   peak {anonymous:6.0f} MB, with the "
              f"mapped file {resident:6.0f} MB")  # fmt: skip
