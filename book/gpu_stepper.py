"""The figure that steps through what one warp does: a trace of the simulator as HTML.

    stats = launch(kernel, grid, block, *arrays, trace=(0, 0))
    display(HTML(stepper(kernel, stats.trace, caption="What to see.")))

The page's script, `_static/warp-stepper.js`, draws what is worked out here.
"""

import ast
import html
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np

from minidsv3.gpu.counts import SECTOR, cost
from minidsv3.gpu.intrinsics import float_of
from minidsv3.gpu.traces import Step, Trace
from minidsv3.gpu.warps import WARP_OPS, WARP_SIZE
from minidsv3.gpu.watching import Turn

VERBS = {"read": "read", "write": "write", "atomic": "update atomically"}


def stepper(kernel: Callable[..., None], trace: Trace, caption: str = "") -> str:
    """The movable figure `<warp-stepper>` of a launch's trace, with its caption.

    kernel is what was launched. Steps in a thread's own arrays are left out: on a GPU
    these are registers. uint16 is shown as the bfloat16 whose bits it holds. In the
    caption, which is plain text, what stands between `…` is set as code. Without
    JavaScript a reader sees the steps as a list.

    ValueError if no step is left, or the trace is another kernel's.
    """
    data = as_data(kernel, trace)
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    listed = "".join(f"<li>{html.escape(step['say'])}</li>" for step in data["steps"])
    words = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(caption, quote=False))
    below = f"<figcaption>{words}</figcaption>" if caption else ""
    return (
        f'<figure><warp-stepper><script type="application/json">{text}</script>'
        "<p>This figure moves: it needs JavaScript. What the warp does, in a list:</p>"
        f"<ol>{listed}</ol></warp-stepper>{below}</figure>"
    )


def as_data(kernel: Callable[..., None], trace: Trace) -> dict[str, Any]:
    """What the script draws: sources as lists of [number, line], and the steps."""
    kernel = getattr(kernel, "py_func", kernel)
    if kernel.__name__ != trace.kernel:
        raise ValueError(
            f"the trace is of {trace.kernel}, not of {kernel.__name__}: hand over the "
            "kernel that was launched"
        )
    steps = [step for step in trace.steps if step.space != "local"]
    if not steps:
        raise ValueError(f"the trace of {trace.kernel} has no step to show")
    functions = {f.__name__: f for f in [*_functions(kernel)][::-1]}  # the first wins
    sources: dict[str, list] = {kernel.__name__: _lines(kernel)}
    for step in steps:
        if step.function not in sources:
            known = functions.get(step.function)
            sources[step.function] = _lines(known) if known else []
        if step.line not in dict(sources[step.function]):
            sources[step.function].append([step.line, step.text])
    names = list(sources)
    return {
        **{name: trace.as_dict()[name] for name in ("kernel", "block", "warp")},
        "threads": trace.threads,
        "sources": [{"name": name, "lines": sorted(sources[name])} for name in names],
        "steps": [_drawn(step, names.index(step.function), trace) for step in steps],
    }


def _functions(kernel: FunctionType) -> Iterator[FunctionType]:
    """The kernel and what it calls by name, directly or not."""
    waiting, seen = [kernel], set()
    while waiting:
        function = waiting.pop(0)
        if function in seen:
            continue
        seen.add(function)
        yield function
        known = dict(inspect.getclosurevars(function).nonlocals)
        known = {**function.__globals__, **known}
        named = (known.get(name) for name in dict.fromkeys(_names(function)))
        called = (getattr(one, "py_func", one) for one in named)
        waiting += [one for one in called if isinstance(one, FunctionType)]


def _names(function: FunctionType) -> tuple[str, ...]:
    return function.__code__.co_names + function.__code__.co_freevars


def _lines(function: FunctionType) -> list[list]:
    """[number, text] of a function's source, without its docstring."""
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:  # there is no file
        return []
    text = textwrap.dedent("".join(lines))
    body = ast.parse(text).body[0].body
    left_out = range(0)
    if ast.get_docstring(ast.parse(text).body[0]) is not None and len(body) > 1:
        left_out = range(body[0].lineno, body[0].end_lineno + 1)
    numbered = enumerate(text.rstrip().split("\n"), 1)
    return [[n + first - 1, line] for n, line in numbered if n not in left_out]


def _drawn(step: Step, source: int, trace: Trace) -> dict[str, Any]:
    """A step as the script draws it; values are lists of 32, null where none is."""
    gives, gets = map(_readable, (step.operands, step.answers))
    votes = step.op in ("ballot_sync", "any_sync", "all_sync")
    if step.op.startswith("shfl") or votes:
        gives = tuple(one and one[0] for one in gives)
    if step.op.startswith("sync"):
        gives = gets = (None,) * WARP_SIZE
    plain = replace(step, operands=gives, answers=gets).as_dict()
    return {
        "source": source,
        **{name: plain[name] for name in ("line", "op", "space", "array", "lanes")},
        "say": _sentence(step, trace.kernel),
        "gives": plain["operands"],
        "gets": None if votes else plain["answers"],
        "indices": plain["indices"] if _names_element(step) else None,
        "offsets": plain["offsets"],
        "width": step.width,
        "from": _senders(step),
        **(_cost(step) if step.space else {}),
    }


def _names_element(step: Step) -> bool:
    """Whether the indices count in the whole array, and not in a view of it."""
    if step.expression.startswith(f"{step.array}["):
        return True
    lane = step.lanes[0]
    value = step.operands[lane] if step.op == "write" else step.answers[lane]
    size = step.width // len(value) if isinstance(value, tuple) else step.width
    index = step.indices[lane]
    return isinstance(index, int) and index * size == step.offsets[lane]


def _readable(value: Any) -> Any:
    """Values as people read them: bfloat16 for its bits, six digits."""
    if isinstance(value, tuple):
        return tuple(map(_readable, value))
    if isinstance(value, np.uint16):
        value = float_of(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}")
    return value


def _senders(step: Step) -> list[int | None] | None:
    """For a shuffle, whose value each lane gets: the shuffle of the lanes' numbers."""
    if not step.op.startswith("shfl"):
        return None
    numbers = {lane: (lane, step.operands[lane][1]) for lane in step.lanes}
    found = WARP_OPS[step.op](numbers)
    return [found.get(lane) for lane in range(WARP_SIZE)]


def _cost(step: Step) -> dict[str, int]:
    turn = Turn(None, step.op, step.space, step.array, step.width)
    return cost(turn, [(lane, step.offsets[lane]) for lane in step.lanes])


# --- sentences ------------------------------------------------------------------------


def _sentence(step: Step, kernel: str) -> str:
    n = len(step.lanes)
    who = "All 32 lanes" if n == WARP_SIZE else f"{n} of 32 lanes"
    if n == 1:
        who = f"Lane {step.lanes[0]} alone"
    elif n < WARP_SIZE and step.lanes[-1] - step.lanes[0] == n - 1:
        who = f"Lanes {step.lanes[0]} to {step.lanes[-1]}"
    where = "" if step.function == kernel else f", in {step.function},"
    return f"{who}{where} {_deed(step, n == 1)}"


def _deed(step: Step, alone: bool) -> str:
    """What they do, from the verb on."""
    if step.space:
        verb = VERBS[step.op]
        if alone:
            verb = verb.replace(" ", "s ", 1) if " " in verb else verb + "s"
        return f"{verb} {_memory(step, alone)}"
    if step.op.startswith("shfl"):
        return f"{'shuffles' if alone else 'shuffle'}: {_exchange(step)}."
    answer = step.answers[step.lanes[0]]
    return {
        "syncthreads": "come to a barrier, and wait for every thread of the block.",
        "syncwarp": "wait for each other: none goes on before all have come.",
        "ballot_sync": f"vote: bit n of the answer {_hex(answer)} is lane n's.",
        "any_sync": f"ask whether it is true for any of them: {_yes(answer)}.",
        "all_sync": f"ask whether it is true for all of them: {_yes(answer)}.",
        "mma_bf16": "multiply on the tensor cores: each hands in its words of A and B "
        "and its numbers of C, and gets four numbers of D = A B + C.",
    }.get(step.op, "load four 8 × 8 matrices from shared memory, spread over the warp.")


def _memory(step: Step, alone: bool) -> str:
    found = _cost(step)
    each = "" if alone else " each"
    what = f"{step.width} byte{'s' * (step.width != 1)}{each}"
    if not alone and len({step.offsets[lane] for lane in step.lanes}) == 1:
        what = f"the same {step.width} bytes"
    start = f"{what} of {step.array}, in {step.space} memory: "
    if step.space == "global":
        sectors, moved = found["sectors"], SECTOR * found["sectors"]
        used = f"{found['needed']} of {moved} bytes are of use"
        if found["needed"] == moved:
            used = "every byte is of use"
        return f"{start}{_many(sectors, 'sector')} of 32 bytes, {used}."
    passes, least = found["passes"], found["least"]
    if passes == least:
        return f"{start}{_many(passes, 'pass')} over the 32 banks, no conflict."
    return (
        f"{start}{_many(passes, 'pass')} over the 32 banks where {least} would do: "
        "a bank conflict."
    )


def _exchange(step: Step) -> str:
    asked = {int(step.operands[lane][1]) for lane in step.lanes}
    if len(asked) > 1:
        return "each gets the value of a lane that it names"
    (n,) = asked
    return {
        "shfl_sync": f"everybody gets the value of lane {n % WARP_SIZE}",
        "shfl_xor_sync": f"lane n and lane n xor {n} exchange values",
        "shfl_up_sync": f"lane n gets the value of lane n − {n}, if there is one",
        "shfl_down_sync": f"lane n gets the value of lane n + {n}, if there is one",
    }[step.op]


def _many(n: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{n} {what}{plural * (n != 1)}"


def _hex(answer: Any) -> str:
    return f"0x{int(answer or 0) & 0xFFFFFFFF:08x}"


def _yes(answer: Any) -> str:
    return "yes" if answer else "no"
