"""Starting kernels on tensors: what is refused, and what a driver would be handed.

The driver here is a stand-in. It writes down what it is asked, and reads the
parameters as the real one does: an address of addresses, each of as many bytes as the
kernel's code declares. Those counts are Numba's, `tests/cuda/test_launch_layout.py`
compares them with its compiler's.
"""

import ctypes
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidsv3.gpu import compile as gpu_compile
from minidsv3.gpu import launch as module
from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.launch import KINDS, LaunchError, Loaded, launch, signature_of
from minidsv3.gpu.simulator import AlignmentError, BoundsError, SimulatorError
from minidsv3.primitives.fast_cuda_kernels import swiglu_fast
from tests.launch_layout import parameter_sizes

SCALARS = {"f4": "<f", "u4": "<I", "i4": "<i", "u2": "<H", "i8": "<q", "f8": "<d"}


# --- on tensors of the processor ----------------------------------------------------


def double(x, y, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = x[i] + x[i]


def count_up(bits):
    bits[cuda.grid(1)] += 1


def test_results_lie_in_the_tensors_own_memory() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), torch.zeros(3, 2)
    launch(double, 2, 4, x, y, np.uint32(5))
    assert y.tolist() == [[0, 2], [4, 6], [8, 0]]


def test_bfloat16_comes_as_its_bits_and_shares_memory() -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.bfloat16)
    launch(count_up, 1, 4, x)
    # one unit in the last place of eight bits, and the smallest number there is
    assert x.double().tolist() == [[1 + 2**-7, -2 - 2**-6], [2.0**-133, 3 + 2**-6]]


@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_of_the_list_is_taken(dtype) -> None:
    x = torch.ones(3).to(dtype)
    launch(count_up, 1, 3, x)
    expected = {torch.bfloat16: 1 + 2**-7}.get(dtype, 2)
    assert x.double().tolist() == [expected] * 3


def test_what_requires_a_gradient_is_taken_too() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.zeros(2)
    launch(double, 1, 2, x, y, np.uint32(2))
    assert y.tolist() == [2, 2]


@pytest.mark.parametrize("grid", [0, (0,), (3, 0), (1, 1, 0)])
def test_no_blocks_are_no_work(grid) -> None:
    x = torch.zeros(0)
    launch(double, grid, 4, x, x, np.uint32(0))


def test_what_the_simulator_finds_comes_through() -> None:
    with pytest.raises(BoundsError, match="y has the shape"):
        launch(double, 1, 4, torch.zeros(4), torch.zeros(3), np.uint32(4))


def test_blocks_and_grids_of_several_axes_and_dynamic_shared_memory() -> None:
    def places(out):
        tile = cuda.shared.array(0, np.int32)
        x, y = cuda.grid(2)
        tile[cuda.threadIdx.y] = y
        out[x + 2 * y] = tile[cuda.threadIdx.y] + 10 * x

    out = torch.zeros(8, dtype=torch.int32)
    launch(places, (2, 2), (1, 2), out, dynamic_shared=8)
    assert out.tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_simulator_sees_where_a_tensor_begins(dtype) -> None:
    """A piece of a storage is as misaligned as it is on a GPU."""
    per = 16 // dtype.itemsize
    whole = torch.zeros(4 * per, dtype=dtype)
    kernel, n = swiglu_fast(per), np.uint64(2 * per)

    def on(begin: int) -> None:
        x = whole[begin : begin + 2 * per]
        launch(kernel, 1, 32, x, x.clone(), x.clone(), n)

    on(per)
    for begin in (1, per // 2, per + 1):
        with pytest.raises(AlignmentError, match="gate"):
            on(begin)


# --- refusals -----------------------------------------------------------------------

ONES = torch.ones(2, 3)
REFUSED = {
    "float16": (TypeError, "argument 1 is torch.float16: kernels take torch.float32",
                (ONES, ONES.half())),
    "a truth": (TypeError, "argument 1 is np.True_: scalars are NumPy's",
                (ONES, np.bool_(True))),
    "float16, a scalar": (TypeError, r"argument 1 is np.float16\(1.0\)",
                          (ONES, np.float16(1))),
    "bool": (TypeError, "argument 0 is torch.bool", (ONES > 0,)),
    "a plain integer": (TypeError, r"argument 1 is 3: .*write np.uint32\(", (ONES, 3)),
    "a plain float": (TypeError, "argument 1 is 0.5", (ONES, 0.5)),
    "a NumPy array": (TypeError, "argument 1 is array", (ONES, np.ones(2))),
    "columns": (ValueError, r"argument 0 of shape \(3, 2\) has strides \(1, 3\): a "
                r"kernel needs it contiguous\(\)", (ONES.T,)),
    "two devices": (ValueError, "one device, not cpu, meta",
                    (ONES, ONES.to("meta"))),
    "no tensor": (ValueError, "not nowhere, for there are none", (np.uint32(3),)),
    "another device": (ValueError, "the tensors are on meta", (ONES.to("meta"),)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name) -> None:
    error, message, args = REFUSED[name]
    with pytest.raises(error, match=message):
        launch(count_up, 1, 1, *args)


@pytest.mark.parametrize(("grid", "block"), [((1, 1, 1, 1), 1), ((0, 1, 1, 2), 1)])
def test_four_sizes_of_a_grid_are_refused(grid, block) -> None:
    with pytest.raises(ValueError, match=r"at most three sizes, not \(\d, 1, 1, \d\)"):
        launch(count_up, grid, block, torch.ones(2))


def test_four_sizes_of_a_block_are_refused() -> None:
    with pytest.raises(SimulatorError, match=r"\(1, 1, 1, 1\)"):
        launch(count_up, 1, (1, 1, 1, 1), torch.ones(2))
    with pytest.raises(ValueError, match="at most three sizes"):
        module._three((1, 1, 1, 1))  # a GPU's way


def test_signatures() -> None:
    kinds = [np.float32, np.uint32, np.int32, np.int64, np.uint64]
    assert signature_of([*KINDS, *map(np.dtype, kinds)]) == (
        "f4[] u2[] u2[] i4[] u4[] i8[] f8[] f4 u4 i4 i8 u8"
    )


def test_a_gpu_without_the_drivers_package(monkeypatch) -> None:
    module.driver.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(LaunchError, match=r"pip install 'minidsv3\[cuda\]'"):
        module.driver()


# --- what the driver is handed ------------------------------------------------------


class Driver:
    """Writes down what it is asked; at a launch, reads the kernel's parameters."""

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most dynamic shared",
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES="static shared",
    )

    def __init__(self, sizes=(), refuses: str = "", static: int = 0) -> None:
        self.sizes, self.refuses, self.static = sizes, refuses, static
        self.asked, self.launches = [], []
        self.context = 3  # torch has entered one

    def answer(self, name: str, *args):
        self.asked.append((name, *args))
        return 700 if name == self.refuses else 0

    def cuModuleLoadData(self, cubin):
        return self.answer("load", cubin), "the module"

    def cuModuleGetFunction(self, module, name):
        return self.answer("find", module, name), "the function"

    def cuCtxGetCurrent(self):
        return self.answer("context"), self.context

    def cuDeviceGet(self, number):
        return self.answer("device", number), "the device"

    def cuDevicePrimaryCtxRetain(self, device):
        return self.answer("retain", device), 5

    def cuCtxSetCurrent(self, context):
        self.context = context
        return (self.answer("enter", context),)

    def cuFuncGetAttribute(self, attribute, function):
        return self.answer("get", attribute, function), self.static

    def cuFuncSetAttribute(self, function, attribute, value):
        return (self.answer("set", function, attribute, value),)

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, *rest):
        shared, stream, pointers, extra = rest
        assert extra == 0
        places = (ctypes.c_void_p * len(self.sizes)).from_address(pointers)
        self.launches.append(
            [ctypes.string_at(at, n) for at, n in zip(places, self.sizes, strict=True)]
        )
        how = (gx, gy, gz), (bx, by, bz), shared, stream
        return (self.answer("launch", function, *how),)


def loaded(signature: str, refuses: str = "", static: int = 0) -> tuple[Driver, Loaded]:
    driver = Driver(parameter_sizes(signature), refuses, static)
    return driver, Loaded(driver, b"code", "entry_of_it", signature)


def start(kernel: Loaded, *args, shared: int = 0) -> None:
    kernel.start((5, 1, 1), (64, 2, 1), shared, 77, args)


def test_loading_and_starting() -> None:
    driver, kernel = loaded("u4")
    start(kernel, np.uint32(1), shared=16)
    assert driver.asked == [
        ("context",),
        ("load", b"code"),
        ("find", "the module", b"entry_of_it"),
        ("get", "static shared", "the function"),
        ("context",),
        ("launch", "the function", (5, 1, 1), (64, 2, 1), 16, 77),
    ]


ENTERING = [("device", 2), ("retain", "the device"), ("enter", 5)]


@pytest.fixture
def second_card(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)


def test_a_host_thread_without_a_context_enters_torchs(second_card) -> None:
    """One of autograd's own, say; and first of all, before anything is loaded."""
    driver = Driver(parameter_sizes("u4"))
    driver.context = 0
    kernel = Loaded(driver, b"code", "entry_of_it", "u4")
    assert driver.asked[:5] == [("context",), *ENTERING, ("load", b"code")]
    driver.context, driver.asked = 0, []  # as another thread finds it
    start(kernel, np.uint32(1))
    assert driver.asked[:4] == [("context",), *ENTERING]
    assert driver.asked[4][0] == "launch"


@pytest.mark.usefixtures("second_card")
@pytest.mark.parametrize(
    ("refuses", "name"),
    [("context", "cuCtxGetCurrent"), ("device", "cuDeviceGet"),
     ("retain", "cuDevicePrimaryCtxRetain"), ("enter", "cuCtxSetCurrent")],
)  # fmt: skip
def test_a_context_that_is_refused(refuses, name) -> None:
    driver = Driver(refuses=refuses)
    driver.context = 0
    with pytest.raises(LaunchError, match=f"^{name} of entry_of_it: 700$"):
        Loaded(driver, b"code", "entry_of_it", "u4")
    assert driver.asked[-1][0] == refuses


def words(parameters: list[bytes]) -> list[int]:
    return [int.from_bytes(p, "little") for p in parameters]


def test_an_array_is_seven_parameters() -> None:
    driver, kernel = loaded("u2[] f4[] i8[]")
    start(kernel, (2**47 + 16, 3 * 2**32), (4096, 7), (8192, 0))
    (parameters,) = driver.launches
    assert [len(p) for p in parameters] == [8] * 21
    assert words(parameters) == [
        0, 0, 3 * 2**32, 2, 2**47 + 16, 3 * 2**32, 2,
        0, 0, 7, 4, 4096, 7, 4,
        0, 0, 0, 8, 8192, 0, 8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "value"),
    [("f4", np.float32(-1.1)), ("u4", np.uint32(2**32 - 1)), ("i4", np.int32(-7)),
     ("i8", np.int64(-(2**40))), ("f8", np.float64(0.1)), ("u2", np.uint16(65535))],
)  # fmt: skip
def test_scalars_are_their_own_bytes(word, value) -> None:
    driver, kernel = loaded(f"f4[] {word} u4")
    start(kernel, (64, 2), value, np.uint32(9))
    *_, scalar, last = driver.launches[0]
    assert struct.unpack(SCALARS[word], scalar) == (value.item(),)
    assert words([last]) == [9]


def test_nothing_is_left_of_the_launch_before() -> None:
    driver, kernel = loaded("f4[] i4 f4[] f4")
    start(kernel, (2**40, 2**35), np.int32(-1), (2**41, 3), np.float32(np.nan))
    start(kernel, (1, 2), np.int32(3), (4, 5), np.float32(0))
    assert words(driver.launches[1]) == [
        0, 0, 2, 4, 1, 2, 4, 3, 0, 0, 5, 4, 4, 5, 4, 0
    ]  # fmt: skip


def test_too_few_arguments_are_refused() -> None:
    _, kernel = loaded("f4[] u4")
    with pytest.raises(ValueError, match="shorter"):
        start(kernel, (64, 2))


def test_each_thread_of_the_host_has_parameters_of_its_own() -> None:
    driver, kernel = loaded("f4[] u4")
    mine = kernel._parameters([(64, 1), np.uint32(1)])

    def other() -> None:
        start(kernel, (128, 2), np.uint32(2))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    driver.cuLaunchKernel(0, 1, 1, 1, 1, 1, 1, 0, 0, mine, 0)
    theirs, ours = driver.launches
    assert words(theirs) == [0, 0, 2, 4, 128, 2, 4, 2]
    assert words(ours) == [0, 0, 1, 4, 64, 1, 4, 1]
    assert kernel._parameters([(64, 1), np.uint32(1)]) == mine


@pytest.mark.parametrize(
    ("launches", "allowed"),
    [
        ([0, 100, 48 * 1024], []),
        ([48 * 1024 + 1], [48 * 1024 + 1]),
        ([100_000, 60_000, 100_000], [100_000]),
        ([60_000, 0, 100_000], [60_000, 100_000]),
    ],
)
def test_much_shared_memory_is_asked_for_once(launches, allowed) -> None:
    driver, kernel = loaded("u4")
    for shared in launches:
        start(kernel, np.uint32(1), shared=shared)
    sets = [asked[1:] for asked in driver.asked if asked[0] == "set"]
    assert sets == [("the function", "most dynamic shared", n) for n in allowed]


@pytest.mark.parametrize("static", [1, 512, 48 * 1024])
def test_static_and_dynamic_shared_memory_count_together(static) -> None:
    driver, kernel = loaded("u4", static=static)
    free = 48 * 1024 - static
    for shared in (free, free + 1, free):
        start(kernel, np.uint32(1), shared=shared)
    sets = [asked[1:] for asked in driver.asked if asked[0] == "set"]
    assert sets == [("the function", "most dynamic shared", free + 1)]


@pytest.mark.parametrize(
    ("refuses", "name"),
    [("load", "cuModuleLoadData"), ("find", "cuModuleGetFunction"),
     ("get", "cuFuncGetAttribute"),
     ("set", "cuFuncSetAttribute"), ("launch", "cuLaunchKernel")],
)  # fmt: skip
def test_what_the_driver_refuses(refuses, name) -> None:
    def load_and_start() -> None:
        _, kernel = loaded("u4", refuses)
        start(kernel, np.uint32(1), shared=100_000)

    with pytest.raises(LaunchError, match=f"^{name} of entry_of_it: 700$"):
        load_and_start()


def test_a_refused_size_is_asked_for_again() -> None:
    driver, kernel = loaded("u4", refuses="set")
    for _ in range(2):
        with pytest.raises(LaunchError):
            start(kernel, np.uint32(1), shared=100_000)
    asked = [asked[0] for asked in driver.asked if asked[0] != "context"]
    assert asked == ["load", "find", "get", "set", "set"]


# --- loaded once --------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch) -> list[tuple]:
    """What is compiled, slowly, for two pretended cards."""
    made: list[tuple] = []

    def compiled(kernel, signature, architecture):
        made.append((kernel, signature, architecture))
        time.sleep(0.05)  # a second thread would begin meanwhile
        return SimpleNamespace(cubin=b"code", entry="entry_of_it")

    capability = {0: (9, 0), 1: (8, 6)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability[device.index]
    )
    monkeypatch.setattr(gpu_compile, "compiled", compiled)
    monkeypatch.setattr(module, "driver", Driver)
    monkeypatch.setattr(module, "LOADED", {})
    return made


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_a_kernel_is_built_once_for_each_dtype_and_card(builds) -> None:
    one, other = (torch.float32, np.dtype("u4")), (torch.bfloat16, np.dtype("u4"))
    same = [module._loaded(double, one, FIRST) for _ in range(2)]
    others = [
        module._loaded(double, other, FIRST),
        module._loaded(double, one, SECOND),
        module._loaded(count_up, one, FIRST),
    ]
    assert same[0] is same[1] and len({id(k) for k in (same[0], *others)}) == 4
    assert builds == [
        (double, "f4[] u4", "sm_90a"), (double, "u2[] u4", "sm_90a"),
        (double, "f4[] u4", "sm_80"), (count_up, "f4[] u4", "sm_90a"),
    ]  # fmt: skip


def test_host_threads_that_come_together_load_it_once(builds) -> None:
    together, found = threading.Barrier(3), []

    def load() -> None:
        together.wait()
        found.append(module._loaded(double, (torch.float32,), FIRST))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 3 and all(kernel is found[0] for kernel in found)
