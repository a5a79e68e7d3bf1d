"""The parameters that `gpu.launch` prepares are those that Numba's code declares."""

import ctypes
import re
from types import SimpleNamespace

import numpy as np
import pytest

from minidsv3.gpu.compile import compiled
from minidsv3.gpu.launch import Loaded
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain
from tests.launch_layout import parameter_sizes


def mixed(a, s, b, t, u, v, c):
    a[0] = s
    b[0] = t + u
    c[0] = v


SIGNATURES = [
    (mixed, "f4[] f4 i8[] i4 i8 u2 u2[]"),
    (mixed, "f8[] f8 u4[] u4 u4 u8 i4[]"),
    (plain.rmsnorm_plain, "u2[] f4[] u2[] f4[] u4 f4 f4"),
    (plain.rope_plain, "u2[] f4[] u4 u4 u4 u4 f4"),
    (fast.rope_fast(8), "u2[] f4[] u4 u4 u4 u4 u4 f4"),
    (fast.swiglu_fast(4), "f4[] f4[] f4[] u8"),
    (fast.rmsnorm_backward_fast(2, 4), "f4[] f4[] u2[] f4[] f4[] f4[] u4 u4 f4"),
    (fast.cross_entropy_fast(8), "u2[] i8[] f4[] f4[] f4[] u4"),
    (fast.cross_entropy_backward_fast(4), "f4[] i8[] f4[] f4[] f4[] u4"),
]


class NoDriver:
    """Loads whatever it is given, in a context that is there."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1)

    def __getattr__(self, name: str):
        return lambda *args: (0, 1)


@pytest.mark.parametrize(("kernel", "signature"), SIGNATURES)
def test_as_many_parameters_of_the_same_sizes(kernel, signature) -> None:
    declared = compiled(kernel, signature).parameters
    assert declared == parameter_sizes(signature)
    loaded = Loaded(NoDriver(), b"", "kernel", signature)
    args = [
        (4096, 5) if word.endswith("[]") else np.dtype(word).type(1)
        for word in signature.split()
    ]
    loaded._parameters(args)
    cells = loaded.buffers.cells
    assert len(loaded.buffers.pointers) == len(cells) == len(declared)
    # each parameter begins a cell and fits: nothing is read from its neighbour
    assert max(declared) <= ctypes.sizeof(cells) // len(cells) == 8


def elements(out, a):
    out[0] = a.size


def itemsize(out, a):
    out[0] = a.itemsize


def first(out, a):
    out[0] = a[0]


def length(out, a):
    out[0] = a.shape[0]


def stride(out, a):
    out[0] = a.strides[0]


PARAMETERS_BEGIN = 0x210  # in the bank of constants, on sm_90a


@pytest.mark.parametrize(
    ("kernel", "word"), [(elements, 2), (itemsize, 3), (first, 4), (length, 5),
                         (stride, 6)]
)  # fmt: skip
def test_the_order_of_an_arrays_seven(kernel, word) -> None:
    """Each is read from where `Loaded` puts it, as the machine code says."""
    sass = compiled(kernel, "i8[] i8[]", "sm_90a").sass
    offsets = {int(at, 16) for at in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", sass)}
    read = {(at - PARAMETERS_BEGIN) // 8 for at in offsets if at >= PARAMETERS_BEGIN}
    assert read == {4, 7 + word}  # 4: the address of out
    loaded = Loaded(NoDriver(), b"", "kernel", "i8[] i8[]")
    loaded._parameters([(4096, 5), (8192, 6)])
    meant = {elements: 6, itemsize: 8, first: 8192, length: 6, stride: 8}
    assert loaded.buffers.cells[7 + word] == meant[kernel]
