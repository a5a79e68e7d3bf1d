"""Chapter 11, occupancy: how many blocks a multiprocessor holds."""

from grader.spec import Case, Check, Wrong


def kernel(threads: int, registers: int, shared: int) -> Case:
    """A block's size, and what it takes."""
    label = f"{threads} threads, {registers} registers each, {shared} bytes"
    return Case(label, (threads, registers, shared))


LIMITS = "64 // warps, 65_536 // of_a_warp // warps, 233_472 // of_a_block"
WARP = "of_a_warp = -(-32 * registers // 256) * 256"
BLOCK = "of_a_block = -(-(shared + 1024) // 128) * 128"
OCCUPANCY = "blocks * warps / 64"

RESIDENT = Check(
    "measure.1",
    returns=("blocks", "occupancy"),
    cases=lambda: [
        kernel(256, 40, 0),
        kernel(256, 32, 16 * 1024),
        kernel(256, 41, 0),
        kernel(256, 200, 0),
        kernel(384, 168, 0),
        kernel(128, 16, 0),
        kernel(128, 32, 32_276),
        kernel(128, 32, 16_500),
        kernel(128, 32, 6 * 1024),
        kernel(128, 32, 20_096),
        kernel(128, 32, 6 * 1024 + 300),
        kernel(1024, 65, 0),
        kernel(1024, 32, 0),
        kernel(512, 64, 0),
        kernel(640, 24, 100),
        kernel(384, 32, 0),
        kernel(128, 255, 227 * 1024),
        kernel(128, 255, 228 * 1024),
        kernel(128, 40, 115712),
        kernel(128, 40, 115713),
        kernel(128, 32, 76800),
        kernel(128, 1, 0),
        kernel(896, 72, 0),
        kernel(256, 65, 40_000),
        kernel(128, 72, 0),
        kernel(128, 128, 48 * 1024),
    ],
    hints=(
        "Three things can run out: warps, registers, shared memory. How many blocks "
        "would fit if only one of the three were short? The shortest decides.",
        "Rounding up to a multiple of m is `-(-n // m) * m`. By its registers there is "
        "room for `65536 // of_a_warp` warps, and a block has `threads // 32`.",
        "`min(64 // warps, 65536 // of_a_warp // warps, 233472 // of_a_block)` with "
        "`warps = threads // 32`; the occupancy is `blocks * warps / 64`.",
    ),
    wrong=(
        Wrong(
            "registers of a warp not rounded up",
            WARP,
            "of_a_warp = 32 * registers",
            "A warp gets them in units of 256, so 41 registers a thread cost as much "
            "as 48.",
        ),
        Wrong(
            "the system's shared memory forgotten",
            BLOCK,
            "of_a_block = max(128, -(-shared // 128) * 128)",
            "Each block takes 1,024 bytes more than it asks for.",
        ),
        Wrong(
            "shared memory not rounded up",
            BLOCK,
            "of_a_block = shared + 1024",
            "It is handed out in units of 128 bytes.",
        ),
        Wrong(
            "rounded up before the system's share",
            BLOCK,
            "of_a_block = -(-shared // 1024) * 1024 + 1024",
            "The unit is 128 bytes, not 1,024.",
        ),
        Wrong(
            "shared memory in units of 256",
            BLOCK,
            "of_a_block = -(-(shared + 1024) // 256) * 256",
            "256 is the unit of registers. That of shared memory is 128 bytes.",
        ),
        Wrong(
            "48 KB of shared memory",
            LIMITS,
            "64 // warps, 65_536 // of_a_warp // warps, 49_152 // of_a_block",
            "48 KB is what one block may declare without asking. The multiprocessor "
            "has 228.",
        ),
        Wrong(
            "no more than 64 warps forgotten",
            LIMITS,
            "65_536 // of_a_warp // warps, 233_472 // of_a_block",
            "It holds 64 warps, however little else they take.",
        ),
        Wrong(
            "registers forgotten",
            LIMITS,
            "64 // warps, 233_472 // of_a_block",
            "All its warps share 65,536 registers, and a warp takes 32 times what a "
            "thread takes.",
        ),
        Wrong(
            "shared memory forgotten",
            LIMITS,
            "64 // warps, 65_536 // of_a_warp // warps",
            "A block's shared memory must fit beside that of the others.",
        ),
        Wrong(
            "pieces of blocks",
            LIMITS,
            "64 / warps, 65_536 // of_a_warp / warps, 233_472 / of_a_block",
            "A block is taken in whole or not at all.",
        ),
        Wrong(
            "at least one block",
            "return blocks, ",
            "blocks = max(1, blocks)\n    return blocks, ",
            "A block that does not fit is not run at all: 0.",
        ),
        Wrong(
            "blocks as a part of 32",
            OCCUPANCY,
            "blocks / 32",
            "Occupancy counts warps, of the 64 that there could be.",
        ),
        Wrong(
            "threads as a part of 1024",
            OCCUPANCY,
            "blocks * warps / 32",
            "1,024 is the most that a block has. A multiprocessor holds 64 warps, "
            "which is 2,048 threads.",
        ),
        Wrong(
            "occupancy in percent",
            OCCUPANCY,
            "100 * blocks * warps / 64",
            "A part of 64 is a number from 0 to 1.",
        ),
        Wrong(
            "blocks and occupancy exchanged",
            "return blocks, " + OCCUPANCY,
            "return blocks * warps / 64, blocks",
            "First how many blocks there are, then the occupancy.",
        ),
        Wrong(
            "the largest limit",
            "min(",
            "max(",
            "The block needs all of it: what is shortest decides.",
        ),
    ),
    right=(
        "def resident(threads, registers, shared):\n"
        "    from math import ceil\n"
        "    blocks = 0\n"
        "    while True:\n"
        "        n = blocks + 1\n"
        "        warps = n * threads // 32\n"
        "        fits = warps <= 64\n"
        "        fits &= warps * 256 * ceil(registers / 8) <= 65536\n"
        "        fits &= n * 128 * ceil((shared + 1024) / 128) <= 233472\n"
        "        if not fits:\n"
        "            return blocks, blocks * threads / 2048\n"
        "        blocks = n\n",
        "def resident(threads, registers, shared):\n"
        "    warps = threads // 32\n"
        "    unit = (registers + 7) // 8 * 8 * 32\n"
        "    by_registers = 4 * (16384 // unit) // warps  # part by part: the same\n"
        "    by_shared = 1824 // ((shared + 1024 + 127) // 128)\n"
        "    limits = np.array([64 // warps, by_registers, by_shared, 32])\n"
        "    return limits.min(), limits.min() * warps / 64\n",
    ),
)

CHECKS = [RESIDENT]
