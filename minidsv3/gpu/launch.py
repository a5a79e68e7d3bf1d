"""Run a kernel on tensors: on the GPU they lie on, or in the simulator::

    launch(_swiglu_body, grid, block, gate, up, h, uint32(n))

Tensors on a GPU: the kernel is compiled for it once, kept, and started on torch's
current stream with the tensors' own memory, nothing copied. So once it was launched, it
can be captured in a CUDA graph like any operation of torch. Tensors on the processor:
it runs in `minidsv3.gpu.simulator`, which checks every access and takes its time (some
10,000 threads a second), whether there is a GPU or not. Nothing else decides.

Scalars are NumPy's, ``uint32(n)``, ``float32(eps)``, so that their type is certain.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidsv3.gpu import simulator

KINDS = {
    torch.float32: "f4", torch.bfloat16: "u2", torch.uint16: "u2", torch.int32: "i4",
    torch.uint32: "u4", torch.int64: "i8", torch.float64: "f8",
}  # fmt: skip
"""A kernel's word for each dtype of a tensor: bfloat16 comes as its bits."""
SIZES = {"f4": 4, "u2": 2, "i4": 4, "u4": 4, "i8": 8, "f8": 8, "u8": 8}
MOST_SHARED_UNASKED = 48 * 1024
"""Static and dynamic shared memory together, in bytes; for more one asks the driver."""
Extent = int | tuple[int, ...]


class LaunchError(RuntimeError):
    """The driver refused to load or to start a kernel."""


def launch(
    kernel: Callable[..., None], grid: Extent, block: Extent, *args: Any,
    dynamic_shared: int = 0,
) -> None:  # fmt: skip
    """Start ``kernel(*args)`` in every thread; results are written into the tensors.

    grid and block are an integer or up to three; dynamic_shared counts bytes. The
    kernel sees each tensor as a one-dimensional array. Raises TypeError for an argument
    that is neither a tensor of `KINDS` nor a NumPy scalar, ValueError for tensors that
    are not contiguous or not on one device, CompilerError and LaunchError if the GPU's
    side is not there, and in the simulator what `simulator.launch` raises.
    """
    device = _device(args)
    if 0 in _three(grid):
        return  # no work
    if device.type == "cuda":
        _on_gpu(kernel, grid, block, args, dynamic_shared, device)
        return
    if device.type != "cpu":
        raise ValueError(
            f"a kernel runs on an NVIDIA GPU or, simulated, on the processor; the "
            f"tensors are on {device}"
        )
    arrays = [_array(a) if isinstance(a, Tensor) else a for a in args]
    simulator.launch(kernel, grid, block, *arrays, dynamic_shared=dynamic_shared)


def _device(args: Sequence[Any]) -> torch.device:
    """The one device of all tensors, which must be such as a kernel can take."""
    devices = set()
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            if arg.dtype not in KINDS:
                raise TypeError(
                    f"argument {position} is {arg.dtype}: kernels take "
                    f"{', '.join(str(d) for d in KINDS)}"
                )
            if not arg.is_contiguous():
                raise ValueError(
                    f"argument {position} of shape {tuple(arg.shape)} has strides "
                    f"{arg.stride()}: a kernel needs it contiguous()"
                )
            devices.add(arg.device)
        elif not isinstance(arg, np.generic) or arg.dtype.str[1:] not in SIZES:
            raise TypeError(
                f"argument {position} is {arg!r}: scalars are NumPy's, so that their "
                "type is certain; write np.uint32(...) or np.float32(...)"
            )
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "nowhere, for there are none"
        raise ValueError(f"the tensors of one launch are on one device, not {found}")
    return devices.pop()


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as a one-dimensional array, bfloat16 as its bits.

    A piece of its whole storage, so that the simulator sees how it is aligned.
    """
    dtype = torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype
    whole = torch.empty(0, dtype=dtype).set_(tensor.detach().untyped_storage())
    begin = tensor.storage_offset()
    return whole.numpy()[begin : begin + tensor.numel()]


def signature_of(dtypes: Sequence[torch.dtype | np.dtype]) -> str:
    """The words that `compile.compiled` needs: ``"u2[] f4[] u4"``.

    A tensor's dtype means an array, NumPy's a scalar.
    """
    return " ".join(
        f"{KINDS[d]}[]" if isinstance(d, torch.dtype) else d.str[1:] for d in dtypes
    )


# --- on a GPU -----------------------------------------------------------------------


def _on_gpu(
    kernel: Callable[..., None], grid: Extent, block: Extent, args: Sequence[Any],
    dynamic_shared: int, device: torch.device,
) -> None:  # fmt: skip
    with torch.cuda.device(device):
        loaded = _loaded(kernel, tuple(a.dtype for a in args), device)
        given = [
            (a.data_ptr(), a.numel()) if isinstance(a, Tensor) else a for a in args
        ]
        stream = torch.cuda.current_stream(device).cuda_stream
        loaded.start(_three(grid), _three(block), dynamic_shared, stream, given)


def _three(extent: Extent) -> tuple[int, ...]:
    sizes = extent if isinstance(extent, tuple) else (extent,)
    if len(sizes) > 3:
        raise ValueError(f"a grid and a block have at most three sizes, not {sizes}")
    return (*sizes, 1, 1)[:3]


LOADED: dict[tuple, "Loaded"] = {}
_LOADING = threading.Lock()


def _loaded(
    kernel: Callable[..., None], dtypes: tuple, device: torch.device
) -> "Loaded":
    """The kernel compiled for a GPU and loaded there, once."""
    key = kernel, dtypes, device
    if key not in LOADED:
        from minidsv3.gpu.compile import architecture, compiled

        with _LOADING:
            if key not in LOADED:
                signature = signature_of(dtypes)
                capability = torch.cuda.get_device_capability(device)
                code = compiled(kernel, signature, architecture(capability))
                LOADED[key] = Loaded(driver(), code.cubin, code.entry, signature)
    return LOADED[key]


@lru_cache(maxsize=1)
def driver() -> Any:
    """NVIDIA's driver in Python. Raises LaunchError if its package is missing."""
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise LaunchError(
            "starting a kernel needs cuda-bindings: pip install 'minidsv3[cuda]'"
        ) from error
    return bindings


class Loaded:
    """A kernel in a GPU's memory, and how to hand it its arguments.

    The driver takes the address of each parameter. A scalar is one parameter; Numba's
    array is seven: two that we do not use, the number of elements, their size, the
    address, the length and the stride. Each thread of the host keeps a buffer of them,
    of which a launch changes only what it must.
    """

    def __init__(self, driver: Any, cubin: bytes, entry: str, signature: str) -> None:
        self.driver, self.entry, self.words = driver, entry, signature.split()
        self._enter_context()
        self.module = self._asked("cuModuleLoadData", cubin)  # lives as long as this
        self.function = self._asked("cuModuleGetFunction", self.module, entry.encode())
        which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        static = self._asked("cuFuncGetAttribute", which, self.function)
        self.dynamic_shared = MOST_SHARED_UNASKED - static
        self.buffers = threading.local()

    def _enter_context(self) -> None:
        """Give a host thread that has none the context that torch uses on its device.

        A new thread has none until torch does something there: autograd's own, say.
        """
        if int(self._asked("cuCtxGetCurrent")):
            return
        device = self._asked("cuDeviceGet", torch.cuda.current_device())
        context = self._asked("cuDevicePrimaryCtxRetain", device)
        self._asked("cuCtxSetCurrent", context)

    def start(
        self, grid: tuple, block: tuple, dynamic_shared: int, stream: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        """Start on a stream; args are (address, elements) and NumPy scalars."""
        self._enter_context()
        if dynamic_shared > self.dynamic_shared:
            attribute = self.driver.CUfunction_attribute
            which = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._asked("cuFuncSetAttribute", self.function, which, dynamic_shared)
            self.dynamic_shared = dynamic_shared
        pointers = self._parameters(args)
        self._asked(
            "cuLaunchKernel",
            self.function, *grid, *block, dynamic_shared, stream, pointers, 0,
        )  # fmt: skip

    def _parameters(self, args: Sequence[Any]) -> int:
        """The address of the addresses of all parameters, which now hold args."""
        if not hasattr(self.buffers, "cells"):
            self._allocate()
        cells, at = self.buffers.cells, 0
        for word, arg in zip(self.words, args, strict=True):
            if word.endswith("[]"):
                address, elements = arg
                cells[at + 2] = cells[at + 5] = elements
                cells[at + 4] = address
                at += 7
            else:
                cells[at] = int.from_bytes(arg.tobytes(), "little")
                at += 1
        return self.buffers.address

    def _allocate(self) -> None:
        """Cells of eight bytes for all parameters, and pointers to them."""
        first: list[int] = []
        for word in self.words:
            size = SIZES[word.removesuffix("[]")]
            first += [0, 0, 0, size, 0, 0, size] if word.endswith("[]") else [0]
        cells = (ctypes.c_uint64 * len(first))(*first)
        start = ctypes.addressof(cells)
        places = [start + 8 * n for n in range(len(first))]
        pointers = (ctypes.c_void_p * len(first))(*places)
        self.buffers.cells, self.buffers.pointers = cells, pointers
        self.buffers.address = ctypes.addressof(pointers)

    def _asked(self, name: str, *args: Any) -> Any:
        """What the driver answers. Raises LaunchError with its reason."""
        error, *answer = getattr(self.driver, name)(*args)
        if int(error):
            raise LaunchError(f"{name} of {self.entry}: {error!r}")
        return answer[0] if answer else None
