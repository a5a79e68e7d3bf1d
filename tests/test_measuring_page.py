"""What chapter 11 measures and shows: never how long, always whether it is right."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import measuring_page as page  # noqa: E402

from minidsv3.gpu.roofline import H100, H200  # noqa: E402


def test_a_stream_keeps_the_order_and_does_not_wait() -> None:
    stream, gate, seen = page.Stream(), threading.Event(), []
    stream.launch(gate.wait)
    for n in range(3):
        stream.launch(lambda n=n: seen.append(n))
    assert seen == []  # the worker stands at the gate, and we are here
    gate.set()
    stream.synchronize()
    assert seen == [0, 1, 2]


def test_every_try_is_timed_in_its_turn() -> None:
    seen: list[str] = []
    assert page.times(lambda: seen.append("a"), 3).shape == (3,)
    found = page.in_turns([lambda: seen.append("a"), lambda: seen.append("b")], 4)
    assert found.shape == (2, 4) and (found > 0).all()
    assert "".join(seen) == "aaa" + "abababab"


@pytest.mark.parametrize("turns", [False, True])
def test_a_contest_has_equal_numbers_of_tries(turns: bool) -> None:
    count = []
    found = page.against_itself(lambda: count.append(1), 10, turns)
    assert found.shape == (2, 10) and len(count) == 20


def test_neighbours_run_while_inside_and_are_gone_after(monkeypatch) -> None:
    begun = []

    class Watched(page.subprocess.Popen):
        def __init__(self, *args, **how) -> None:
            super().__init__(*args, **how)
            begun.append(self)

    monkeypatch.setattr(page.subprocess, "Popen", Watched)
    with page.neighbours(2):
        assert len(begun) == 2
        assert all(program.poll() is None for program in begun)
    assert all(program.poll() is not None for program in begun)


ORPHANING = """
import os, signal, sys
sys.path.insert(0, "book")
import measuring_page as page
with page.neighbours(1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals and /proc are Unix's")
def test_a_neighbour_does_not_outlive_who_began_it() -> None:
    """It has the pipe open, too, and so the pipe ends when both have."""
    program = subprocess.Popen(
        [sys.executable, "-c", ORPHANING], cwd=BOOK.parent, stderr=subprocess.PIPE
    )
    _, said = program.communicate(timeout=60)
    assert program.returncode == -signal.SIGKILL and said == b""


def test_one_core_is_taken_and_given_back(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 3}, raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda _, cores: asked.append(cores), raising=False
    )
    with page.one_core() as count:
        assert asked == [{3}] and count == 1
    assert asked == [{3}, {3, 5}]


def test_without_affinity_every_core_gets_a_neighbour(monkeypatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with page.one_core() as count:
        assert count == os.cpu_count()


def test_rates_count_what_is_read_and_written(monkeypatch) -> None:
    """A clock on which each try takes a second: a rate is twice the size."""
    monkeypatch.setattr(page, "times", lambda run, tries: np.ones(tries))
    assert page.copying(1000) == 2000
    assert page.copying_anew(1000, all_of=10_000) == 2000


def test_copying_anew_meets_no_byte_twice(monkeypatch) -> None:
    copied = np.zeros(1024, int)

    def copyto(target, source) -> None:
        at = (
            (target.ctypes.data - target.base.ctypes.data)
            if target.base is not None
            else 0
        )
        copied[at : at + len(target)] += 1

    monkeypatch.setattr(page.np, "copyto", copyto)
    page.copying_anew(100, all_of=1024)
    assert copied.tolist() == [1] * 1000 + [0] * 24


def test_a_tick_is_the_least_that_is_none(monkeypatch) -> None:
    looks = iter([7.0, 7.0, 9.0, 9.0, 10.0])
    monkeypatch.setattr(page.time, "perf_counter", lambda: next(looks))
    assert page.tick(5) == 1.0


def test_until() -> None:
    order = "LDG*4 FFMA*32 BAR*2 FFMA STG"
    assert page.until(order) == "LDG*4 FFMA*32"
    assert page.until(order, "STG") == "LDG*4 FFMA*32 BAR*2 FFMA"
    assert page.until(order, "LDL") == order


def test_the_desk_gets_what_it_was_given() -> None:
    presets = [{"name": 'a "b" & c', "registers": 48}]
    text = page.desk(presets, (H200, H100), 700e-9)
    given = dict(re.findall(r'(\w+)="(.*?)"', text))
    assert json.loads(html.unescape(given["presets"])) == presets
    machines = json.loads(html.unescape(given["machines"]))
    assert [m["name"] for m in machines] == ["H200", "H100"]
    assert machines[1]["bandwidth"] == H100.bandwidth
    assert given["latency"] == "700"


def test_the_source_of_rows_fits_the_page(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    words = " ".join(f"word{n}" for n in range(20))
    (tmp_path / "some.csv").write_text(f"# python some.py\n# {words}\na,b\n1,2\n")
    first, *others = page.source("some").split("\n")
    assert first == "# python some.py"
    assert max(map(len, others)) <= 78
    assert " ".join(line.strip("# ") for line in others) == words


def test_measured_rows_stand_beside_the_predicted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    predicted = {"kernel": "rope", "how": "fast", "dtype": "bfloat16"}
    assert page.measured() == {}
    assert page.heading({}) == page.beside(predicted, {}) == ""
    row = {"arm": "fast", "us": 520.4, "of_copy": 0.968} | predicted
    row.pop("how")
    (tmp_path / "kernel_speed.csv").touch()
    monkeypatch.setattr(page, "read", lambda table: [row])
    rows = page.measured()
    assert page.beside(predicted, rows).split() == ["520", "97%"]
    assert page.beside(predicted | {"how": "plain"}, rows) == ""
    assert len(page.heading(rows)) == len(page.beside(predicted, rows))
