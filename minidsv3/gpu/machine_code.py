"""What a compiled kernel waits for: its machine code read in order.

A load from device memory gives its value hundreds of cycles later. The thread goes on
until an instruction names the register that the value shall come to, and there it
waits. So what counts is how many loads stand before the first such instruction, and
that is to be seen in `compile.Compiled.sass` without a GPU.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<name>[A-Z][A-Z0-9_.]*)(?P<operands>[^;/]*);",
    re.MULTILINE,
)
REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?\b")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One of a kernel: name in full (``LDG.E.128``), guard the predicate it is under.

    registers: which of the thread's it names, in order.
    """

    address: int
    guard: str
    name: str
    operands: str
    registers: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The name without its modifiers: LDG."""
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for each thread."""
        parts = self.name.split(".")
        return next((WIDTHS[part] for part in parts if part in WIDTHS), 4)

    @property
    def loaded(self) -> range:
        """Registers that a load fills."""
        first = self.registers[0]
        return range(first, first + max(1, self.width // 4))


def instructions(sass: str) -> Iterator[Instruction]:
    """Those of a kernel, in the order in which they stand in its code."""
    for found in LINE.finditer(sass):
        named: list[int] = []
        for first, wide in REGISTER.findall(found["operands"]):
            named += range(int(first), int(first) + (2 if wide else 1))
        yield Instruction(
            int(found["address"], 16), found["guard"] or "", found["name"],
            found["operands"].strip(), tuple(named),
        )  # fmt: skip


def loads_under_way(sass: str) -> list[int]:
    """Bytes that a thread has under way at each place where it waits for a load.

    In the order of the code, as if no branch were taken; so it is right for code whose
    branches go round single loads, and of a loop it sees one turn. What is loaded after
    the last wait counts as one more place.
    """
    waits, pending = [], {}
    for each in instructions(sass):
        if pending.keys() & set(each.registers):
            waits.append(sum(pending.values()))
            pending.clear()
        if each.kind == "LDG":
            share = each.width / len(each.loaded)
            pending.update(dict.fromkeys(each.loaded, share))
    if pending:
        waits.append(sum(pending.values()))
    return [int(bytes) for bytes in waits]
