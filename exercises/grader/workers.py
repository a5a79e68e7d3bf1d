"""Each answer is judged in a process of its own, with a limit on time and memory.

A fork server keeps NumPy (and torch, where an exercise needs it) loaded, so that a new
process costs some milliseconds. Where there is no fork, on Windows, a fresh Python
starts each time. This guards against accidents, not against malice.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import FrameType, ModuleType

from grader.cell import Answer
from grader.complaint import NO_ANSWER, TimeUp
from grader.judge import grade
from grader.source import EXERCISES, exercises, find
from grader.verdict import FAILED, Verdict

SECONDS = 10.0
GRACE = 2.0  # for an answer that sits in one call of C code, or swallows the signal
ENDED = "The answer ended its process"
MEMORY = 2 * 2**30  # bytes beyond what a process has when it starts
HAS_FORK = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if HAS_FORK else "spawn")


def warm_up() -> None:
    """Start the fork server in the background, so that the first check is quick."""
    if not HAS_FORK:
        return
    kinds = {exercise.kind for exercise in exercises().values()}
    preload = ["grader.preload"]
    if "torch" in kinds:  # the second is what gradcheck imports when it first runs
        preload += ["torch", "torch.fx.experimental.symbolic_shapes"]
    if "cuda" in kinds:
        preload += [f"minidsv3.gpu.{name}" for name in ("reductions", "compile")]
        preload += ["greenlet"]
    CONTEXT.set_forkserver_preload(preload)
    with surroundings(), no_main():
        forkserver.ensure_running()


def judged(
    answer: Answer, seconds: float = SECONDS, memory: int | None = MEMORY
) -> Verdict:
    """The verdict on an answer, whatever it does: loop, print, exit or crash."""
    warm_up()
    ours, theirs = CONTEXT.Pipe(duplex=False)
    limit = None if find(answer.id).kind == "cuda" else memory
    process = CONTEXT.Process(
        target=_work, args=(theirs, answer, seconds, limit), daemon=True
    )
    with surroundings(), no_main():
        process.start()
    theirs.close()
    try:
        return _wait(ours, answer, seconds)
    finally:
        process.kill()
        process.join()
        ours.close()


def _wait(ours: Connection, answer: Answer, seconds: float) -> Verdict:
    """Listen to the process until it has judged, ended or run out of time."""
    case = ""
    start_up = 0.0 if HAS_FORK else 30.0
    try:
        while ours.poll(seconds + GRACE + start_up):
            message = ours.recv()
            if isinstance(message, Verdict):
                return message
            if isinstance(message, BaseException):
                raise message
            case = message
    except EOFError:
        return Verdict(
            answer.id, FAILED, ENDED,
            "It crashed, or called os._exit, or needed more memory than there is.",
            detail=case,
        )  # fmt: skip
    return Verdict(
        answer.id, FAILED, NO_ANSWER,
        f"It was stopped after {seconds:.0f} seconds.", detail=case,
    )  # fmt: skip


def _work(theirs: Connection, answer: Answer, seconds: float, memory: int) -> None:
    """In the process: silence its files, set the limits, judge, report."""
    gc.freeze()  # a kernel's many threads make it look through all that is loaded
    _silence()
    _limit_memory(memory)
    _limit_time(seconds)
    try:
        verdict = grade(answer, theirs.send)
    except TimeUp:
        return  # between two cases: the other end says that time is up
    except (Exception, SystemExit) as error:  # ours, not the learner's: to be seen
        theirs.send(RuntimeError(f"the grader itself failed: {error!r}"))
        raise
    theirs.send(verdict)


def _silence() -> None:
    """What C code prints goes nowhere; Python's own prints are kept by the judge."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _limit_memory(more: int | None) -> None:
    if more is None or not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))


def _limit_time(seconds: float) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """A new process would first import whatever program this one is, such as pytest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """The environment of a new process.

    One thread: the cases are tiny, and a second one would only wait. And the server's
    preloading finds the grader: Python hands it ``sys.path`` and does not use it.
    """
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    paths = [str(EXERCISES), *filter(None, [os.environ.get("PYTHONPATH")])]
    new = {**dict.fromkeys(threads, "1"), "PYTHONPATH": os.pathsep.join(paths)}
    kept = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
