"""What the judge says of one answer, and how it reads."""

from dataclasses import dataclass, field, replace
from textwrap import fill, indent

TODO, FAILED, PASSED = "todo", "failed", "passed"
SIGNS = {TODO: "·", FAILED: "✗", PASSED: "✓"}
COLOURS = {TODO: "34", FAILED: "31", PASSED: "32"}  # blue, red, green
STUB = "The stub is still there."
PRINTED_LINES = 12  # of an answer's own prints, at most


@dataclass(frozen=True)
class Verdict:
    """One answer's state, and where it failed what was believed wrongly."""

    id: str
    state: str
    headline: str = ""  # one line: what it looks like
    advice: str = ""  # one or two sentences: what is right
    detail: str = ""  # the case, yours beside expected
    printed: str = ""  # what the answer printed meanwhile
    unknown_name: str = ""  # a name that the cell uses and nobody handed in
    notes: tuple[str, ...] = field(default=())  # lines below all else

    def noting(self, *lines: str) -> "Verdict":
        """The same verdict with further lines below it."""
        return replace(self, notes=(*self.notes, *lines))

    def body(self) -> str:
        """Everything but the state: the same words in the notebook and in pytest."""
        parts = [self.headline, indent(wrapped(self.advice), "  "), self.detail]
        if self.printed and self.state == FAILED:
            parts += ["your cell printed:", indent(shortened(self.printed), "  ")]
        above = "\n".join(part for part in parts if part)
        gap = [""] * bool(self.detail and self.notes)
        return "\n".join([*filter(None, [above]), *gap, *self.notes])

    def text(self, colour: bool = False) -> str:
        """What `check` prints: a line with the state, the rest indented below."""
        line = f"{state_shown(self.state, colour)}  {self.id}"
        body = self.body()
        return line + ("\n" + indent(body, "  ") if body else "")


def state_shown(state: str, colour: bool, width: int = 0) -> str:
    """A state with its sign, and in its colour."""
    text = f"{SIGNS[state]} {state:{width}}"
    return f"\033[{COLOURS[state]}m{text}\033[0m" if colour else text


def wrapped(text: str) -> str:
    """Prose in lines of a terminal's width."""
    return "\n".join(fill(line, 76) for line in text.splitlines())


def shortened(text: str) -> str:
    """The first lines of a long text, and how many more there were."""
    lines = text.rstrip("\n").splitlines()
    lines = [line if len(line) <= 100 else line[:97] + "..." for line in lines]
    if len(lines) > PRINTED_LINES:
        more = f"... and {len(lines) - PRINTED_LINES} lines more"
        lines = [*lines[:PRINTED_LINES], more]
    return "\n".join(lines)
