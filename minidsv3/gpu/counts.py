"""What a kernel asks of memory, warp by warp, and what that takes.

A warp's load or store is one request to memory for all its lanes. What it costs depends
on the addresses that they ask for together, by two models:

* Global memory moves in sectors of 32 bytes: "the concurrent accesses of the threads of
  a warp will coalesce into a number of transactions equal to the number of 32-byte
  transactions necessary to service all of the threads of the warp" (CUDA C++ Best
  Practices Guide, Coalesced Access to Global Memory). Caches are left out: a sector
  that two requests touch counts twice.
* Shared memory "has 32 banks that are organized such that successive 32-bit words map
  to successive banks"; two words of one bank go one after the other, and a word that
  several lanes want goes once (CUDA C++ Programming Guide, Compute Capability 5.x,
  Shared Memory). The banks give 128 bytes in one pass, so 8 bytes for each lane go half
  a warp at a time and 16 bytes a quarter, and only lanes of one part can be in conflict
  (for 8 bytes that guide's Compute Capability 2.x; for 16, `ld.shared.v4` as NVIDIA's
  profiler counts it). Atomics that meet in a word are served one by one: "each
  read/modify/write to that location occurs and they are all serialized" (SIMT
  Architecture).

Which lanes act together is `watching.Turn`'s approximation.
"""

from collections import Counter
from dataclasses import dataclass

from minidsv3.gpu.warps import WARP_SIZE
from minidsv3.gpu.watching import Event, Site, Turn

SECTOR = 32  # bytes
BANKS, BANK_WIDTH = 32, 4  # bytes

Lanes = list[tuple[int, int]]  # of one request: lane, and offset in bytes


@dataclass(frozen=True)
class Access:
    """All that one instruction of a kernel did to one array, summed over the launch.

    function, line, text: where. expression: the piece of the line, like ``x[i]``, empty
    where Python does not know it. array: the whole array's name, also where a view was
    used. space: "global" or "shared". kind: "read", "write" or "atomic".

    requests: how many instructions of warps. threads: in how many lanes. bytes: what
    the lanes asked for. needed: the same, with bytes that several lanes of a request
    want counted once. sectors: of 32 bytes that the requests touched, 0 for shared
    memory. passes: how often they went to the banks, 0 for global memory. least: the
    fewest sectors or passes that could have done.
    """

    function: str
    line: int
    text: str
    expression: str
    array: str
    space: str
    kind: str
    requests: int
    threads: int
    bytes: int
    needed: int
    sectors: int
    passes: int
    least: int

    @property
    def efficiency(self) -> float:
        """The part that was of use, 0 … 1.

        In global memory of the bytes moved, in shared memory of the passes.
        """
        if self.space == "global":
            return self.needed / (SECTOR * self.sectors)
        return self.least / self.passes

    @property
    def conflicts(self) -> int:
        """Passes that only bank conflicts made necessary."""
        return self.passes - self.least if self.space == "shared" else 0


class Counts:
    """Listens to a `watching.Watch`, and adds up the requests of each instruction."""

    def __init__(self) -> None:
        self.requests: dict[tuple[int, Turn], Lanes] = {}
        self.sums: dict[tuple, Counter[str]] = {}
        self.sites: dict[tuple, Site] = {}

    def hear(self, event: Event) -> None:
        """Put a thread's access to those of its warp."""
        if event.turn.space in ("global", "shared"):
            thread = event.thread
            lanes = self.requests.setdefault((id(thread.warp), event.turn), [])
            lanes.append((thread.lane, event.offset))

    def end_block(self) -> None:
        """Count the requests of a block that is over."""
        for (_, turn), lanes in self.requests.items():
            code, instruction = turn.site.calls[0]
            key = (id(code), instruction, turn.array, turn.space, turn.op)
            self.sites.setdefault(key, turn.site)
            self.sums.setdefault(key, Counter()).update(cost(turn, lanes))
        self.requests.clear()

    def accesses(self) -> tuple[Access, ...]:
        """In the order of the source."""
        found = []
        for key, sums in self.sums.items():
            site, (_, instruction, array, space, kind) = self.sites[key], key
            place = site.place
            where = (place.file, place.line, instruction, array, space, kind)
            access = Access(
                place.function,
                place.line,
                place.text,
                site.expression,
                array,
                space,
                kind,
                **sums,
            )
            found.append((where, access))
        return tuple(access for _, access in sorted(found, key=lambda pair: pair[0]))


def cost(turn: Turn, lanes: Lanes) -> dict[str, int]:
    """What one request asks for and what that takes, under `Access`'s names."""
    needed = turn.width * len({offset for _, offset in lanes})  # aligned: none overlap
    sectors = passes = 0
    if turn.space == "global":
        sectors, least = sectors_of(lanes, turn.width), -(-needed // SECTOR)
    else:
        passes, least = passes_of(lanes, turn.width, turn.op == "atomic")
    return {
        "requests": 1,
        "threads": len(lanes),
        "bytes": len(lanes) * turn.width,
        "needed": needed,
        "sectors": sectors,
        "passes": passes,
        "least": least,
    }


def sectors_of(lanes: Lanes, width: int) -> int:
    """How many sectors the lanes touch, each with width bytes from its offset on."""
    return len({s for _, offset in lanes for s in _units(offset, width, SECTOR)})


def passes_of(lanes: Lanes, width: int, atomic: bool) -> tuple[int, int]:
    """How often the warp must go to the banks, and how often without conflicts."""
    together = max(1, BANKS * BANK_WIDTH // max(width, BANK_WIDTH))  # lanes of a pass
    passes = least = 0
    for first in range(0, WARP_SIZE, together):
        part = [offset for lane, offset in lanes if 0 <= lane - first < together]
        words = [w for offset in part for w in _units(offset, width, BANK_WIDTH)]
        if words:
            banks = Counter(w % BANKS for w in (words if atomic else set(words)))
            passes += max(banks.values())
            least += 1
    return passes, least


def _units(offset: int, width: int, unit: int) -> range:
    """Which sectors or words the bytes from offset on lie in."""
    return range(offset // unit, (offset + width - 1) // unit + 1)


HEADS = ("requests", "bytes", "sectors", "passes", "efficiency")


def table(accesses: tuple[Access, ...]) -> str:
    """The accesses as text: a line of source, and below it what it does to memory."""
    rows, place = [("", *HEADS)], None
    for access in accesses:
        here = (access.function, access.line)
        if here != place:
            text = access.text or access.function
            rows.append((f"line {access.line}: {text}",))
            place = here
        rows.append(_row(access))
    width = max((len(row[0]) for row in rows if len(row) > 1), default=0)
    return "\n".join(_aligned(row, width) for row in rows)


def _row(access: Access) -> tuple[str, ...]:
    what = access.expression or access.array
    if not what.startswith(access.array):
        what += f" of {access.array}"
    shared = access.space == "shared"
    return (
        f"  {access.kind} {what}, {access.space}",
        str(access.requests),
        str(access.bytes),
        "–" if shared else str(access.sectors),
        str(access.passes) if shared else "–",
        f"{access.efficiency:.1%}",
    )


def _aligned(row: tuple[str, ...], width: int) -> str:
    if len(row) == 1:
        return row[0]
    numbers = [
        n.rjust(max(len(head), 9)) for n, head in zip(row[1:], HEADS, strict=True)
    ]
    return "  ".join([row[0].ljust(width), *numbers]).rstrip()
