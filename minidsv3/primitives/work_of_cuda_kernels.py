r"""What the first kernels have to do: bytes of each array, operations of each number.

From these and a machine's rates `gpu.roofline` says how fast a kernel could be. Each
function has the name of its kernel, which comes plain and fast, and takes a shape and
the bytes of an element (`BFLOAT16` or `FLOAT32`). Counted is what the kernels' source
says: additions, multiplications and comparisons for each number of a row, without the
few dozen that a row needs once for its sum; a change of sign is free.

What is asked for twice need not come from memory twice: between the two lies a cache.
A kernel's floor has each byte once.
"""

from dataclasses import dataclass

from minidsv3.gpu.roofline import Work

FLOAT32, BFLOAT16 = 4, 2
VECTOR = 16
"""Bytes that a fast kernel moves at once."""
INDEX = 8
"""Bytes of a target."""


@dataclass(frozen=True)
class Stream:
    """One array of a kernel, in one direction: kind is "read" or "write".

    bytes: different ones, which memory must bring or take. asked: by all requests of
    warps together, what several lanes of a request want counted once. spread: bytes of
    the sectors that the requests touch, for each byte asked. It is 2 where even and
    odd elements go apart, and where eight float32 go in two moves of 16 bytes, beside
    eight bfloat16 that go in one: the other half of each sector is the next request's.
    """

    array: str
    kind: str
    bytes: int
    asked: int
    spread: int = 1


@dataclass(frozen=True)
class Job:
    """A kernel's whole work on one shape.

    streams: its arrays but those with one word a row, whose bytes are words.
    operations, special: as in `gpu.roofline.Work`.
    """

    streams: tuple[Stream, ...]
    operations: float
    special: float = 0
    words: int = 0

    @property
    def bytes(self) -> int:
        """To and from memory, each once."""
        return sum(stream.bytes for stream in self.streams) + self.words

    @property
    def loads(self) -> float:
        """The share of loads in the bytes of its arrays."""
        read = sum(stream.bytes for stream in self.streams if stream.kind == "read")
        return read / sum(stream.bytes for stream in self.streams)

    @property
    def work(self) -> Work:
        """What `gpu.roofline.floor` takes."""
        return Work(self.bytes, self.operations, self.special)


def _reads(size: int, **arrays: tuple[int, int]) -> list[Stream]:
    """Of each array: how many numbers, and how often the kernel asks for them all."""
    return [
        Stream(name, "read", n * size, n * size * times)
        for name, (n, times) in arrays.items()
    ]


def _writes(size: int, **arrays: int) -> list[Stream]:
    return [Stream(name, "write", n * size, n * size) for name, n in arrays.items()]


def _beside(size: int) -> int:
    """The spread of a fast kernel's float32 beside numbers of this size."""
    return FLOAT32 // size


def rmsnorm(rows: int, width: int, size: int, fast: bool = True) -> Job:
    """RMSNorm: two operations a number for the squares, two for the gain.

    The plain kernel asks for x twice. Both ask for g in every row.
    """
    n = rows * width
    streams = (
        *_reads(size, x=(n, 1 if fast else 2), g=(width, rows)),
        *_writes(size, y=n),
    )
    return Job(streams, 4 * n, words=rows * FLOAT32)


def add(n: int, size: int) -> Job:
    """The add before a norm as a kernel of its own, which is plain."""
    reads = _reads(size, x=(n, 1), residual=(n, 1))
    return Job((*reads, *_writes(size, total=n)), n)


def add_rmsnorm(rows: int, width: int, size: int) -> Job:
    """Add and norm in one pass, which is fast: total is written and never read."""
    n = rows * width
    streams = (
        *_reads(size, x=(n, 1), residual=(n, 1), g=(width, rows)),
        *_writes(size, total=n, y=n),
    )
    return Job(streams, 5 * n, words=rows * FLOAT32)


def rmsnorm_backward(
    rows: int, width: int, size: int, blocks: int, fast: bool = True
) -> Job:
    """RMSNorm's gradient by so many blocks; words are each row's r.

    The plain kernel asks for dy, x and g twice, and in every row adds to partial in
    memory, ten operations a number. The fast one writes partial once and keeps dy g:
    nine.
    """
    n, share, times = rows * width, blocks * width, 1 if fast else 2
    bytes, again = share * FLOAT32, n * FLOAT32
    partial = [Stream("partial", "write", bytes, bytes, _beside(size))]
    if not fast:
        partial = [
            Stream("partial", "read", 0, again),  # its own, from a cache
            Stream("partial", "write", bytes, bytes + again),
        ]
    streams = (
        *_reads(size, dy=(n, times), x=(n, times), g=(width, rows * times)),
        *_writes(size, dx=n),
        *partial,
    )
    return Job(streams, (9 if fast else 10) * n, words=rows * FLOAT32)


def rope(
    tokens: int, heads: int, rotary: int, period: int, size: int, warps: int = 8,
    fast: bool = True,
) -> Job:  # fmt: skip
    """RoPE in place, of the rotary last numbers of each head; seven operations a pair.

    Six turn it; the seventh gives the sine its sign. period rows of turns are float32.
    The fast kernel's warps, so many a token, ask for their row once; the plain one asks
    for it in each head, counted for a rotary of 64: a warp a head.
    """
    n, row = tokens * heads * rotary, rotary * FLOAT32
    asked = tokens * row * (warps if fast else heads)
    apart = 1 if fast else 2
    streams = (
        Stream("x", "read", n * size, n * size, apart),
        Stream("turns", "read", period * row, asked, _beside(size) if fast else 2),
        Stream("x", "write", n * size, n * size, apart),
    )
    return Job(streams, 7 * n / 2)


def swiglu(n: int, size: int) -> Job:
    """SwiGLU, plain or fast: four operations and two special functions a number."""
    reads = _reads(size, gate=(n, 1), up=(n, 1))
    return Job((*reads, *_writes(size, h=n)), 4 * n, 2 * n)


def swiglu_backward(n: int, size: int) -> Job:
    """SwiGLU's gradient: ten operations and two special functions a number."""
    reads = _reads(size, dh=(n, 1), gate=(n, 1), up=(n, 1))
    return Job((*reads, *_writes(size, dgate=n, dup=n)), 10 * n, 2 * n)


def cross_entropy(rows: int, width: int, size: int, fast: bool = True) -> Job:
    """Cross-entropy: four operations and an exp2 a number; words are four a row.

    The plain kernel asks for the logits twice. The fast one adjusts its sum once in 16
    bytes: three operations and an exp2 more. The logit of the target is asked for once
    more, in both.
    """
    n = rows * width
    streams = (
        *_reads(size, logits=(n, 1 if fast else 2)),
        Stream("logits", "read", 0, rows * size, 32 // size),
    )
    words = rows * (3 * FLOAT32 + INDEX)
    adjusted = n * size / VECTOR if fast else 0
    return Job(streams, 4 * n + 3 * adjusted, n + adjusted, words)


def cross_entropy_backward(rows: int, width: int, size: int) -> Job:
    """Its gradient in place of the logits: four operations and an exp2 a number."""
    n = rows * width
    streams = (
        *_reads(size, logits=(n, 1)),
        *_writes(size, logits=n),
    )
    return Job(streams, 4 * n, n, rows * (3 * FLOAT32 + INDEX))
