"""What chapter 11 measures on its page, on the processor: clocks, caches, company."""

import contextlib
import html
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
from rows import RESULTS, Row, read

Array = np.ndarray
Run = Callable[[], object]
SPINNING = """\
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""  # never rests, but does not outlive who began it


# --- a queue, and clocks --------------------------------------------------------------


class Stream:
    """One worker that does what it is told, in order, while you go on, like a GPU."""

    def __init__(self) -> None:
        self.orders: SimpleQueue[Run] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.orders.get()()

    def launch(self, run: Run) -> None:
        """Order a run, and return at once."""
        self.orders.put(run)

    def synchronize(self) -> None:
        """Wait until all that was ordered before is done."""
        done = threading.Event()
        self.launch(done.set)
        done.wait()


def times(run: Run, tries: int) -> Array:
    """Seconds of each try, in order: (tries,)."""
    found = np.empty(tries)
    for n in range(tries):
        began = time.perf_counter()
        run()
        found[n] = time.perf_counter() - began
    return found


def in_turns(runs: Sequence[Run], tries: int) -> Array:
    """Seconds of each try of each run, the runs taking turns: (len(runs), tries)."""
    found = np.empty((len(runs), tries))
    for n in range(tries):
        for i, run in enumerate(runs):
            found[i, n] = times(run, 1)[0]
    return found


def tick(looks: int = 100_000) -> float:
    """Seconds between two looks at the clock: the least that was seen, not zero."""
    seen = np.array([time.perf_counter() for _ in range(looks)])
    steps = np.diff(seen)
    return float(steps[steps > 0].min())


def copying(size: int, seconds: float = 0.03) -> float:
    """Bytes a second, read and written, of copying ``size`` bytes again and again."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    np.copyto(target, source)
    one = float(times(lambda: np.copyto(target, source), 3).min())
    tries = max(3, int(seconds / one))
    return 2 * size / float(np.median(times(lambda: np.copyto(target, source), tries)))


def copying_anew(size: int, all_of: int = 256 * 2**20, most: int = 400) -> float:
    """As `copying`, but each time from and to memory that was not touched lately.

    Source and target walk through two arrays of ``all_of`` bytes.
    """
    source, target = np.ones(all_of, np.uint8), np.ones(all_of, np.uint8)

    def copy_from(place: int) -> None:
        part = slice(place, place + size)
        np.copyto(target[part], source[part])

    places = range(0, all_of - size + 1, size)[:most]
    found = [times(partial(copy_from, place), 1)[0] for place in places]
    return 2 * size / float(np.median(found))


# --- a neighbour on the same core -----------------------------------------------------


@contextlib.contextmanager
def one_core() -> Iterator[int]:
    """While inside, this thread keeps to one core, where the system can do that.

    Gives the number of programs that it takes to fill the cores it may run on.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 1
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield 1
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """While inside, so many programs that never rest run where this one runs."""
    command = [sys.executable, "-S", "-c", SPINNING]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()  # it has begun
        yield
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def against_itself(run: Run, tries: int, turns: bool) -> Array:
    """Seconds of a run as first and as second contestant: (2, tries).

    A neighbour comes when half of all tries are done. One after the other, it meets the
    second alone; in turns, it meets both.
    """
    half = tries // 2
    with one_core() as count:
        if turns:
            quiet = in_turns([run, run], half)
            with neighbours(count):
                busy = in_turns([run, run], tries - half)
            return np.concatenate([quiet, busy], axis=1)
        first = times(run, tries)
        with neighbours(count):
            return np.stack([first, times(run, tries)])


# --- what the page shows --------------------------------------------------------------

STATE = (
    "None of the kernels of this book had run on a GPU when this page was built. For a "
    "chapter on measuring that is an odd place to stand, and a good one: what you say "
    "about a kernel before its first run can be wrong, and what you say afterwards "
    "cannot.",
    "The predictions were committed before the first kernel ran on a GPU: what you say "
    "about it before can be wrong, and what you say afterwards cannot.",
)
"""What the chapter says without and with measured rows."""
VERDICT = (
    "Nothing in this table was timed. Once there are measured times, they stand "
    "beside it.",
    "The left part of this table was committed before the right one was measured.",
)


def measured() -> dict[tuple, Row]:
    """Rows of ``kernel_speed.csv`` by kernel, arm, dtype; none if nobody measured."""
    if not (RESULTS / "kernel_speed.csv").is_file():
        return {}
    return {(r["kernel"], r["arm"], r["dtype"]): r for r in read("kernel_speed")}


def heading(rows: dict[tuple, Row]) -> str:
    """The heads of the measured columns, where there are any."""
    return "  clock  of copy" if rows else ""


def beside(predicted: Row, rows: dict[tuple, Row]) -> str:
    """What was measured of a kernel, for its line in the table of predictions."""
    found = rows.get(tuple(predicted[name] for name in ("kernel", "how", "dtype")))
    if found is None:
        return ""
    return f"{found['us']:7.0f}{found['of_copy']:9.0%}"


def source(table: str, width: int = 78) -> str:
    """Where the rows of a table come from: the first lines of its file, broken."""
    lines = (RESULTS / f"{table}.csv").read_text(encoding="utf-8").splitlines()
    head = (line.removeprefix("# ") for line in lines if line.startswith("#"))
    how = {"initial_indent": "# ", "subsequent_indent": "#   "}
    return "\n".join("\n".join(textwrap.wrap(line, width, **how)) for line in head)


def desk(presets: Sequence[Row], machines: Sequence[Any], latency: float) -> str:
    """The movable `<little-desk>` with kernels and machines of `gpu.roofline`.

    presets: name, registers, threads, shared, asked. latency in seconds.
    """
    given = {
        "presets": json.dumps(list(presets)),
        "machines": json.dumps(
            [{"name": m.name, "bandwidth": m.bandwidth} for m in machines]
        ),
        "latency": f"{1e9 * latency:.0f}",
    }
    words = " ".join(f'{name}="{html.escape(text)}"' for name, text in given.items())
    return (
        f"<little-desk {words}><p>This figure moves: it needs JavaScript.</p>"
        "</little-desk>"
    )


def until(order: str, stop: str = "BAR") -> str:
    """The beginning of an order of instructions, up to the first of these."""
    words = order.split()
    ends = (n for n, word in enumerate(words) if word.split("*")[0] == stop)
    return " ".join(words[: next(ends, len(words))])
