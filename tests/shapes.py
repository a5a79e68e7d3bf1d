"""A tracer that holds shape comments to the truth: ``q = …  # (B, T, N_h, d_h)``.

Inside ``with checked_shapes(module):`` each statement of the module that ends in such a
comment is compared with what it really made, when it is run. Comments can be written

* after an assignment to one name or to several: ``k, v = …  # (B, S, d), (B, S, d_v)``
  (shapes may be fewer than names: those first are meant), or after a ``return``;
* with numbers, symbols and arithmetic: ``(B, 2*d_R, T + 1)``, ``d_R/2``, ``d_c'``;
* with any leading axes: ``(..., D)``; ``()`` is a scalar; words may follow.

A symbol is one number throughout a call of a function. It is the value of the local
integer of that name, or what the local ``config`` or ``c``, or that of ``self``, says
of the book's alphabet, or else what it was when first seen: ``R*T`` teaches R where T
is known.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Number
from pathlib import Path
from types import CodeType, FrameType, ModuleType

from minidsv3.config import Config

RESHAPING = {"reshape", "transpose", "einsum", "swapaxes", "moveaxis"}
ALPHABET = {
    "V": "vocab_size",
    "D": "hidden_size",
    "L": "num_hidden_layers",
    "N_h": "num_attention_heads",
    "N_kv": "num_key_value_heads",
    "d_R": "qk_rope_head_dim",
    "d_v": "v_head_dim",
    "d_c": "kv_lora_rank",
    "d_c_prime": "q_lora_rank",
    "E": "n_routed_experts",
    "K": "num_experts_per_tok",
}


@dataclass(frozen=True)
class Statement:
    """One statement that ends in a shape comment."""

    file: str
    first: int
    last: int
    targets: tuple[tuple[CodeType, ...], ...]  # none for a return
    shapes: tuple[str, ...]


@dataclass
class Report:
    """What is annotated, what was run, and what was wrong."""

    annotated: dict[tuple[str, int], Statement]  # by file and line
    exercised: set[Statement] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    @property
    def unexercised(self) -> set[Statement]:
        """Annotated statements that no call has reached."""
        return set(self.annotated.values()) - self.exercised


@contextmanager
def checked_shapes(*modules: ModuleType) -> Iterator[Report]:
    """Check the shape comments of `modules` while the block runs.

    Raises AssertionError at the end of the block, naming each wrong line, its comment,
    the true shape and the symbols' values.
    """
    files = {module.__file__ for module in modules}
    found = [s for f in files for s in annotated(Path(f).read_text("utf-8"), f)]
    lines = {(s.file, n): s for s in found for n in range(s.first, s.last + 1)}
    report = Report(lines)

    def trace(frame: FrameType, event: str, arg: object) -> object:
        code = frame.f_code  # <listcomp>, <lambda> stand inside a statement: pass over
        ours = code.co_filename in files and not code.co_name.startswith("<")
        return _Call(report).trace if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield report
    finally:
        sys.settrace(before)
    assert not report.wrong, "\n".join(dict.fromkeys(report.wrong))


def annotated(source: str, file: str) -> Iterator[Statement]:
    """The statements of functions that end in a shape comment."""
    comments = _shape_comments(source)
    for statement in _simple_statements(source):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if shapes := comments.get(statement.end_lineno):
            names = tuple(_parts(target) for target in targets if target)
            yield Statement(file, statement.lineno, statement.end_lineno, names, shapes)


def unannotated(source: str) -> list[int]:
    """Lines of statements that reshape, transpose or einsum and say no shape."""
    comments = _shape_comments(source)
    calls = [
        (statement, getattr(node.func, "attr", getattr(node.func, "id", "")))
        for statement in _simple_statements(source)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and statement.end_lineno not in comments
    ]
    return sorted({s.lineno for s, function in calls if function in RESHAPING})


def parse_shapes(comment: str) -> tuple[str, ...]:
    """The shapes at the start of a comment; none if it is prose in brackets."""
    shapes, rest = [], comment.lstrip("# ")
    while match := re.match(r"\([^()]*\)", rest):
        try:
            _axes(match[0])
        except SyntaxError:
            break
        shapes.append(match[0])
        rest = rest[match.end() :].lstrip(" ,")
    return tuple(shapes)


class _Call:
    """One call of a traced function: its symbols, and the statement under way."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seen: dict[str, int] = {}
        self.running: Statement | None = None
        self.returning: Statement | None = None

    def trace(self, frame: FrameType, event: str, arg: object) -> object:
        if event == "exception":
            self.running = self.returning = None
        elif event == "line":
            now, place = self.running, (frame.f_code.co_filename, frame.f_lineno)
            if now and not now.first <= frame.f_lineno <= now.last:
                self.finish(frame)
            self.running = self.report.annotated.get(place, self.running)
        elif event == "return":
            self.finish(frame)
            if self.returning:
                values = arg if isinstance(arg, tuple) else (arg,)
                self.compare(self.returning, values, frame)
        return self.trace

    def finish(self, frame: FrameType) -> None:
        statement, self.running = self.running, None
        if statement and not statement.targets:
            self.returning = statement  # its value comes with the event "return"
        for parts in statement.targets if statement else ():
            values = [eval(part, frame.f_globals, frame.f_locals) for part in parts]
            self.compare(statement, values, frame)

    def compare(self, statement: Statement, values: list, frame: FrameType) -> None:
        self.report.exercised.add(statement)
        symbols = self.seen | _known(frame.f_locals)
        problems = [f"there are {len(values)} value(s)"]
        if len(statement.shapes) <= len(values):
            pairs = zip(statement.shapes, values, strict=False)
            problems = [self.problem(*pair, symbols) for pair in pairs]
        for problem in filter(None, problems):
            self.report.wrong.append(
                f"{statement.file}:{statement.first}: the comment says "
                f"{', '.join(statement.shapes)}, but {problem} "
                f"({', '.join(f'{k}={v}' for k, v in symbols.items())})"
            )

    def problem(self, shape: str, value: object, symbols: dict[str, int]) -> str | None:
        """Say what is wrong with a value, or learn the symbols that it teaches."""
        actual = () if isinstance(value, Number) else getattr(value, "shape", None)
        if actual is None:
            return f"the value is a {type(value).__name__}"
        axes, sizes = _axes(shape), tuple(actual)
        if axes and axes[0] is None:
            axes = axes[1:]
            sizes = sizes[max(len(sizes) - len(axes), 0) :]
        if len(axes) != len(sizes):
            return f"the shape is {tuple(actual)}"
        pairs = zip(axes, sizes, strict=True)
        for axis, size in sorted(pairs, key=lambda pair: len(pair[0].co_names)):
            unknown = set(axis.co_names) - symbols.keys()
            if len(unknown) > 1:
                return f"nothing says how large {' and '.join(sorted(unknown))} are"
            trials = [{name: n} for name in unknown for n in range(4 * size + 17)]
            fits = [t for t in trials or [{}] if eval(axis, {}, symbols | t) == size]
            if not fits:
                return f"the shape is {tuple(actual)}"
            if len(fits) == 1:
                symbols |= fits[0]
                self.seen |= fits[0]
        return None


def _axes(shape: str) -> list[CodeType | None]:
    """One expression an axis, None for any leading axes. SyntaxError if no shape."""
    plain = shape.strip("()").replace("'", "_prime").replace("·", "*")
    texts = [text.strip() for text in plain.removesuffix(",").split(",")]
    if texts == [""]:
        return []
    leading = [None] if texts[0] in ("...", "…") else []
    if not all(re.fullmatch(r"[\w\s+*/-]+", text) for text in texts[len(leading) :]):
        raise SyntaxError(f"{shape} is no shape")
    return leading + [compile(text, shape, "eval") for text in texts[len(leading) :]]


def _known(local: dict) -> dict[str, int]:
    """Symbols that the frame itself defines: the config's sizes, and integers."""
    known = {}
    places = (local.get("config"), local.get("c"), local.get("self"))
    configs = [getattr(place, "config", place) for place in places]
    if config := next((one for one in configs if isinstance(one, Config)), None):
        known = {symbol: getattr(config, name) for symbol, name in ALPHABET.items()}
    for name, value in local.items():
        if isinstance(value, Integral) and not isinstance(value, bool):
            known[name] = int(value)
    return {symbol: size for symbol, size in known.items() if size is not None}


def _shape_comments(source: str) -> dict[int, tuple[str, ...]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    shapes = {token.start[0]: parse_shapes(token.string) for token in comments}
    return {line: found for line, found in shapes.items() if found}


def _simple_statements(source: str) -> Iterator[ast.stmt]:
    """The assignments and returns inside functions, except those that yield."""
    simple = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)
    yields = (ast.Yield, ast.YieldFrom, ast.Await)
    functions = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)
    ]
    found = {
        n.lineno: n for f in functions for n in ast.walk(f) if isinstance(n, simple)
    }
    for statement in found.values():
        if not any(isinstance(node, yields) for node in ast.walk(statement)):
            yield statement


def _parts(target: ast.expr) -> tuple[CodeType, ...]:
    parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
    return tuple(compile(ast.unparse(part), "target", "eval") for part in parts)
