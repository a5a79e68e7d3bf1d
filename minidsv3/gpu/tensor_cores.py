"""What the tensor cores do, as functions of the values of a warp's 32 lanes.

`minidsv3.gpu.intrinsics` says which lane holds what; here the fragments are put
together to matrices, and taken apart again. Source: PTX ISA 9.0, ``ldmatrix`` and
``mma.sync.m16n8k16``.
"""

import numpy as np

Array = np.ndarray
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # of a fragment: the lane's row, and its pair of columns


def ldmatrix(lanes: dict[int, tuple], transposed: bool = False) -> dict[int, tuple]:
    """Four 8 × 8 matrices of 16 bits: lane 8m + r hands in row r of matrix m."""
    rows = np.array([lanes[lane][0] for lane in LANES], np.uint32)  # (32, 4)
    matrices = rows.view(np.uint16).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    words = np.ascontiguousarray(matrices).view(np.uint32)  # (4, 8, 4)
    return {lane: tuple(words[:, lane // 4, lane % 4]) for lane in lanes}


def _pairs(words: Array) -> Array:
    """Two bfloat16 a word as float32: (...) -> (..., 2), the lower half first."""
    halves = np.stack([words << 16, words & 0xFFFF0000], axis=-1)
    return halves.astype(np.uint32).view(np.float32)


def mma_bf16(lanes: dict[int, tuple]) -> dict[int, tuple]:
    """``D = A B + C`` with A (16, 16), B (16, 8) in bfloat16 and C, D (16, 8) float32.

    Products and sums in float32, in an order of NumPy's; the hardware's is not told.
    """
    c, a, b = (np.array([lanes[lane][k] for lane in LANES]) for k in range(3))
    a, b = _pairs(a.astype(np.uint32)), _pairs(b.astype(np.uint32))  # (32, 4|2, 2)
    A, B = np.empty((16, 16), np.float32), np.empty((16, 8), np.float32)
    C = np.empty((16, 8), np.float32)
    for half in range(2):  # columns 2t, 2t + 1
        for k, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            A[G + down, 2 * T + right + half] = a[:, k, half]
        for k in range(2):
            B[2 * T + 8 * k + half, G] = b[:, k, half]
            C[G + 8 * k, 2 * T + half] = c[:, 2 * k + half]
    D = A @ B + C
    corners = [D[G, 2 * T], D[G, 2 * T + 1], D[G + 8, 2 * T], D[G + 8, 2 * T + 1]]
    return {lane: tuple(corner[lane] for corner in corners) for lane in lanes}
