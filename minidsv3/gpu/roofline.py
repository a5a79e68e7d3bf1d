r"""How fast a kernel could be, from its bytes and operations and the machine's limits.

The roofline: work of b bytes and n operations takes at least
:math:`\max(b/\text{bandwidth}, n/\text{rate})` on a machine, whatever the kernel does.
Which of the two is larger depends on the intensity n/b; where they are equal is the
machine's ridge (Williams, Waterman, Patterson 2009). Whether a kernel comes near its
floor depends on how many bytes it has under way, and so on its occupancy: how many of
its warps fit on a multiprocessor.

Everything here is arithmetic. Nothing was measured by us on a GPU unless a docstring
says "seen".
"""

from dataclasses import dataclass

WARP_SIZE = 32
LATENCY = 700e-9
"""Seconds from a load to its value on a busy GPU of this kind. An assumption for
`in_flight`, of the right order; measure it before you build on it."""


@dataclass(frozen=True)
class Machine:
    """A GPU's rates, a second, and the limits of one of its multiprocessors.

    bandwidth: bytes read and written together, of device memory, in a copy.
    sheet_bandwidth: what the data sheet promises. float32: additions and
    multiplications on the CUDA cores, one with the other (FMA) counted as two. tensor:
    the same for bfloat16 on the tensor cores. special: exp2, reciprocal, rsqrt, log2.

    Of a multiprocessor: registers (32-bit), warps, blocks and shared (bytes) are what
    it has; shared_of_block what one block may have of it. Registers are given out for
    a warp, in multiples of register_unit, by each of its four parts to the warps it
    runs; shared memory in multiples of shared_unit, with shared_reserved bytes for the
    system in each block. Defaults are compute capability 9.0's: CUDA C++ Programming
    Guide, Technical Specifications per Compute Capability; the units and the reserved
    kilobyte are those of ``cuda_occupancy.h`` in CUDA 13.0.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    sheet_bandwidth: float
    float32: float
    tensor: float
    special: float
    registers: int = 65_536
    most_registers: int = 255
    warps: int = 64
    blocks: int = 32
    threads_of_block: int = 1024
    shared: int = 228 * 1024
    shared_of_block: int = 227 * 1024
    parts: int = 4
    register_unit: int = 256
    shared_unit: int = 128
    shared_reserved: int = 1024


SXM_CLOCK = 67e12 / (132 * 128 * 2)
"""Cycles a second, 1.98e9: what the data sheets' 67 TFLOP/s take, with 132
multiprocessors and 128 FMA each a cycle."""

H200 = Machine(
    name="H200",
    multiprocessors=132,
    bandwidth=4.3e12,
    sheet_bandwidth=4.8e12,
    float32=67e12,
    tensor=780e12,
    special=16 * 132 * SXM_CLOCK,
)
"""NVIDIA H200 SXM. Seen on one: 4.3 TB/s in a copy, 780 TFLOP/s in a product of bf16
matrices (the sheet promises 989 without sparsity). From the data sheet: 4.8 TB/s, 67
TFLOP/s. Special functions: 16 a cycle and multiprocessor (CUDA C++ Programming Guide,
Throughput of Native Arithmetic Instructions, 9.0), at the clock of those 67 TFLOP/s."""

H100 = Machine(
    name="H100",
    multiprocessors=132,
    bandwidth=3.0e12,
    sheet_bandwidth=3.35e12,
    float32=67e12,
    tensor=989e12,
    special=16 * 132 * SXM_CLOCK,
)
"""NVIDIA H100 SXM. Nothing of it was seen by us. Data sheet: 3.35 TB/s, 67 TFLOP/s, 989
TFLOP/s of bf16 without sparsity. 3.0 TB/s is what DeepSeek report of FlashMLA on an
H800, which has the same memory."""

MACHINES = (H200, H100)


@dataclass(frozen=True)
class Work:
    """What a kernel cannot avoid.

    bytes: to and from device memory, each needed byte once. operations: additions,
    multiplications and comparisons of float32. special: exp2, reciprocal, rsqrt.
    """

    bytes: float
    operations: float
    special: float = 0


@dataclass(frozen=True)
class Floor:
    """The least time, in seconds, and what sets it: see `floor`."""

    seconds: float
    bound: str


def floor(machine: Machine, work: Work, tensor: bool = False) -> Floor:
    """The least seconds that work takes, and the bound: the slowest of its parts.

    bound is "memory", "arithmetic" ("tensor cores" where the operations run there) or
    "special functions". The parts overlap perfectly: real kernels are slower.
    """
    rate, name = machine.float32, "arithmetic"
    if tensor:
        rate, name = machine.tensor, "tensor cores"
    parts = {
        "memory": work.bytes / machine.bandwidth,
        name: work.operations / rate,
        "special functions": work.special / machine.special,
    }
    bound = max(parts, key=lambda part: parts[part])
    return Floor(parts[bound], bound)


def intensity(work: Work) -> float:
    """Operations for each byte."""
    return work.operations / work.bytes


def ridge(machine: Machine, tensor: bool = False) -> float:
    """The intensity from which on a kernel is not bound by memory."""
    return (machine.tensor if tensor else machine.float32) / machine.bandwidth


@dataclass(frozen=True)
class Occupancy:
    """What of a kernel is on one multiprocessor at a time.

    blocks, and their warps; fraction of the warps that the multiprocessor can have;
    limited_by: "registers", "shared memory", "warps" or "blocks", the first of them
    that forbids one more block.
    """

    blocks: int
    warps: int
    fraction: float
    limited_by: str


def occupancy(
    machine: Machine, registers: int, threads: int, shared: int = 0
) -> Occupancy:
    """How many blocks of a kernel fit on a multiprocessor at once.

    registers: of a thread. threads, shared (bytes, static and dynamic together): of a
    block. Assumes that the driver gives shared memory all that it may have of the L1
    cache. Raises ValueError for what no block may have. Source: ``cuda_occupancy.h``.
    """
    for what, given, least, most in (
        ("registers", registers, 1, machine.most_registers),
        ("threads", threads, 1, machine.threads_of_block),
        ("shared", shared, 0, machine.shared_of_block),
    ):
        if not least <= given <= most:
            raise ValueError(
                f"{what} is {given}: a block on {machine.name} has {least} to {most}"
            )
    warps = -(-threads // WARP_SIZE)
    of_warp = _up(registers * WARP_SIZE, machine.register_unit)
    fitting = machine.parts * (machine.registers // machine.parts // of_warp)
    of_block = _up(shared + machine.shared_reserved, machine.shared_unit)
    limits = {
        "warps": machine.warps // warps,
        "registers": fitting // warps,
        "shared memory": machine.shared // of_block,
        "blocks": machine.blocks,
    }
    limit = min(limits, key=lambda what: limits[what])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / machine.warps, limit)


def _up(n: int, unit: int) -> int:
    """N, or the next multiple of unit above it."""
    return -(-n // unit) * unit


def in_flight(machine: Machine, latency: float = LATENCY, loads: float = 1.0) -> float:
    """Bytes of loads that a multiprocessor must have under way to reach the bandwidth.

    Little's law: what is in a pipe is its rate times the time through it. latency in
    seconds. loads: their share of all bytes that a kernel moves, for nobody waits for
    a store. A kernel that loads fewer bytes before it waits stays below.
    """
    return loads * machine.bandwidth * latency / machine.multiprocessors


def reachable(
    machine: Machine,
    bytes_under_way: float,
    latency: float = LATENCY,
    loads: float = 1.0,
) -> float:
    """The part of the bandwidth, at most 1, that so many bytes under way can fill.

    bytes_under_way: of one multiprocessor's loads; loads: see `in_flight`.
    """
    return min(1.0, bytes_under_way / in_flight(machine, latency, loads))
