"""The machine code of a kernel, built without a GPU and without its driver::

    from minidsv3.gpu.compile import compiled

    code = compiled(add, "f4[] f4[] i4")
    code.registers, code.stack, code.count("LDG")

Numba translates the kernel, NVIDIA's compiler makes of it the very file that a GPU
loads, and NVIDIA's tools say what is in it. So a test can hold a kernel to its promises
where no GPU is: how many registers a thread takes, that none spill to memory, that
loads are 16 bytes wide and products run on the tensor cores.

Needs the ``cuda`` extra. Numba asks a driver for the device it compiles for; while we
compile, a stand-in answers, and this is the only place that touches its insides.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

from minidsv3.gpu import dialect, intrinsics
from minidsv3.gpu.binding import rebound

BUILT_FOR = "0.30.4"
"""The version of numba-cuda whose insides this module knows."""
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}
"""The A100 (and with it all of 8.x); H100 and H200, with what only they have."""
NEEDED = (
    "compiling a kernel needs numba-cuda and NVIDIA's tools: pip install "
    "'minidsv3[cuda]' (Linux, Windows). Without them a kernel runs in "
    "minidsv3.gpu.simulator."
)
# Held while Numba believes in a device that is not there.
_COMPILING = threading.Lock()
RESERVED = {"sm_90a": 1024}
"""Shared memory that cuobjdump counts and no kernel has: the driver keeps it."""
INSTRUCTION = (
    re.compile(  # what is under @!PT is never done: padding of the assembler's
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?!!U?PT\b)!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)",
        re.MULTILINE,
    )
)
IN_DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP?|MNMX|MMA)\b|.*\.F64\b|MUFU\..*64H\b")


class CompilerError(Exception):
    """The compiler is not there, or another one than this module was built for."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as a GPU would load it, and what NVIDIA's tools say of it.

    cubin: the file that a GPU loads. parameters: their sizes in bytes, in order. What
    follows is asked of NVIDIA's cuobjdump when it is first wanted, and raises
    CompilerError if that is missing: registers, of 32 bits, a thread; stack and local,
    bytes a thread keeps in memory; shared, static bytes a block; sass, the machine code
    as text; instructions, how often each stands in it, by its full name.

    Built again, a kernel is the same but for its entry's name, in which Numba counts.
    """

    kernel: str
    entry: str
    architecture: str
    cubin: bytes = field(repr=False)
    parameters: tuple[int, ...]

    registers = property(lambda self: self._usage["REG"])
    stack = property(lambda self: self._usage["STACK"])
    local = property(lambda self: self._usage["LOCAL"])

    @property
    def shared(self) -> int:
        """Static shared memory of a block, in bytes, without what the driver keeps."""
        return max(0, self._usage["SHARED"] - RESERVED.get(self.architecture, 0))

    @cached_property
    def sass(self) -> str:
        """The machine code as text."""
        return _tool("-sass", self.cubin)

    @cached_property
    def instructions(self) -> Counter:
        """How often each instruction stands in the code, by its full name."""
        return Counter(INSTRUCTION.findall(self.sass))

    @cached_property
    def _usage(self) -> dict[str, int]:
        said = _tool("-res-usage", self.cubin)
        found = re.search(rf"Function {re.escape(self.entry)}:\s+(.*)", said)
        usage = dict(re.findall(r"\b([A-Z]+):(\d+)", found[1] if found else ""))
        if not usage.keys() >= {"REG", "STACK", "SHARED", "LOCAL"}:
            raise CompilerError(
                f"cuobjdump does not say what {self.kernel} uses: {said}"
            )
        return {name: int(number) for name, number in usage.items()}

    def count(self, *prefixes: str) -> int:
        """How many instructions begin with one of these: ``count("LDG.E.128")``."""
        found = self.instructions.items()
        return sum(n for name, n in found if name.startswith(prefixes))

    def having(self, *parts: str) -> int:
        """How many instructions begin with the first part and have the others in them.

        ``having("LDG", "128")`` counts LDG.E.128 and LDG.E.128.CONSTANT.
        """
        return sum(
            n
            for name, n in self.instructions.items()
            if name.split(".")[0] == parts[0]
            and all(part in name.split(".") for part in parts[1:])
        )

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: what did not fit into registers."""
        return self.count("LDL", "STL")

    @property
    def doubles(self) -> int:
        """Operations in float64: in our kernels always a constant somebody forgot."""
        found = self.instructions.items()
        return sum(n for name, n in found if IN_DOUBLE.match(name))


def compiled(
    kernel: Callable[..., None],
    signature: str,
    architecture: str = "sm_90a",
    max_registers: int | None = None,
    fastmath: bool = False,
) -> Compiled:
    """Build a kernel for an architecture of `ARCHITECTURES`.

    signature has a word for each parameter: NumPy's names of dtypes, ``f4`` float32,
    ``u2`` the bits of a bfloat16, ``i4``, ``u4``, ``i8``, and ``f4[]`` for a contiguous
    array of one dimension. Raises CompilerError if numba-cuda or a tool is missing or
    of another version, ValueError for a signature or architecture that is none, and
    a NumbaError (numba.core.errors) for a kernel that Numba does not understand. Device
    functions must be imported by name: through their module Numba does not find them.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r}: known are {', '.join(ARCHITECTURES)}"
        )
    numba_cuda = _numba_cuda()
    function, types = for_numba(kernel), _types(signature)
    if len(types) != function.__code__.co_argcount:
        raise ValueError(
            f"the signature {signature!r} has {len(types)} words, and "
            f"{function.__name__} has {function.__code__.co_argcount} parameters"
        )
    options = {"max_registers": max_registers, "fastmath": fastmath}
    with _COMPILING, _stand_in(ARCHITECTURES[architecture][:2]):
        dispatcher = numba_cuda.jit(**options)(function)
        built = _kernel_class()(dispatcher.py_func, types, **dispatcher.targetoptions)
        library = built._codelibrary
        cubin = library.get_cubin(cc=ARCHITECTURES[architecture])
        code = bytes(getattr(cubin, "code", cubin))
        parameters = _parameters(library.get_asm_str(), built.entry_name)
    name = function.__name__
    return Compiled(name, built.entry_name, architecture, code, parameters)


def architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a GPU of this capability: (9, 0) -> sm_90a.

    Raises CompilerError for a GPU that none of `ARCHITECTURES` runs on.
    """
    for name, known in ARCHITECTURES.items():
        if known[:2] == tuple(capability):
            return name
    major, minor = capability
    if major == 8:  # code for 8.0 runs on every later 8.x
        return "sm_80"
    raise CompilerError(
        f"the GPU here has compute capability {major}.{minor}; kernels are built for "
        f"{', '.join(ARCHITECTURES)}. On the processor's tensors they are simulated."
    )


def for_numba(kernel: Callable[..., None]) -> FunctionType:
    """A kernel as Numba shall see it: its own cuda, an instruction for each twin."""
    from numba import cuda

    from minidsv3.gpu import ptx

    twins = {
        twin: getattr(ptx, name)
        for name, twin in vars(intrinsics).items()
        if isinstance(twin, FunctionType) and hasattr(ptx, name)
    }

    def seen(thing: Any) -> Any:
        if thing is dialect.cuda:
            return cuda
        return twins.get(thing) if isinstance(thing, FunctionType) else None

    return rebound(kernel, seen, device=cuda.jit(device=True))


def available() -> bool:
    """Whether kernels can be compiled here."""
    return importlib.util.find_spec("numba_cuda") is not None


@lru_cache(maxsize=1)
def _numba_cuda() -> Any:
    """numba.cuda, if it is NVIDIA's and of the version we know."""
    try:
        version = metadata.version("numba-cuda")
        from numba import cuda
    except ImportError as error:  # PackageNotFoundError is one
        raise CompilerError(NEEDED) from error
    if version != BUILT_FOR:
        raise CompilerError(
            f"numba-cuda is {version}, and minidsv3.gpu.compile was built for "
            f"{BUILT_FOR}: install that, or run the tests in tests/cuda and change "
            "BUILT_FOR"
        )
    if getattr(cuda, "implementation", None) != "NVIDIA":
        raise CompilerError(
            "numba.cuda is Numba's old built-in one although numba-cuda is installed: "
            "its .pth file was not read (packages on PYTHONPATH alone?). Install both "
            "into one environment."
        )
    return cuda


def _kernel_class() -> type:
    from numba.cuda.dispatcher import _Kernel

    return _Kernel


class _Capability(tuple):
    """A compute capability as the driver's device has it."""

    major = property(lambda self: self[0])
    minor = property(lambda self: self[1])


@contextlib.contextmanager
def _stand_in(capability: tuple[int, int]) -> Iterator[None]:
    """While inside, Numba finds a device of this capability, and no driver."""
    from numba.cuda import api, compiler, dispatcher
    from numba.cuda.cudadrv import devices

    device = SimpleNamespace(
        compute_capability=_Capability(capability),
        id=0,
        MULTIPROCESSOR_COUNT=132,
        MAX_SHARED_MEMORY_PER_BLOCK=49152,
    )
    context = SimpleNamespace(device=device)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(devices, "get_context", return_value=context))
        for module in (api, compiler, dispatcher):
            name = "get_current_device"
            enter(mock.patch.object(module, name, return_value=device))
        yield


def _types(signature: str) -> tuple:
    """Numba's types for the words of a signature."""
    from numba.cuda import types

    names = {
        "f4": types.float32, "f8": types.float64, "u2": types.uint16,
        "i4": types.int32, "u4": types.uint32, "i8": types.int64, "u8": types.uint64,
    }  # fmt: skip
    found = []
    for word in signature.split():
        name = word.removesuffix("[]")
        if name not in names:
            raise ValueError(
                f"{word!r} in the signature {signature!r}: known are "
                f"{', '.join(names)}, and each with [] for an array"
            )
        kind = names[name]
        found.append(kind if name == word else types.Array(kind, 1, "C"))
    return tuple(found)


def _parameters(ptx: str, entry: str) -> tuple[int, ...]:
    """Bytes of each parameter of the entry, as the PTX declares them."""
    head = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    if not head:
        raise CompilerError(f"no entry {entry} in the PTX: another numba-cuda?")
    return tuple(
        int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head[1])
    )


def _tool(option: str, cubin: bytes) -> str:
    """What cuobjdump says of a cubin. It calls nvdisasm, and so must find it."""
    folders = {name: _folder_of(name) for name in ("cuobjdump", "nvdisasm")}
    program = Path(folders["cuobjdump"], "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        answer = subprocess.run(
            [program, option, path],
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": str(folders["nvdisasm"])},
        )
    if answer.returncode:
        raise CompilerError(f"cuobjdump {option} failed: {answer.stderr.strip()}")
    return answer.stdout


@lru_cache
def _folder_of(name: str) -> Path:
    """Where one of NVIDIA's tools lies, among the packages of this environment."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(place).glob(f"**/bin/{name}*")):
            return path.parent
    raise CompilerError(f"{name} is missing. {NEEDED[0].upper()}{NEEDED[1:]}")
