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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
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
"""A100 and what came after; H100 and H200 with what only they have."""
NEEDED = (
    "compiling a kernel needs numba-cuda and NVIDIA's tools: pip install "
    "'minidsv3[cuda]' (Linux, Windows). Without them a kernel runs in "
    "minidsv3.gpu.simulator."
)
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

    registers: 32-bit, a thread. stack, spilled: bytes a thread keeps in memory because
    it has not enough of them. shared: static bytes a block. parameters: their sizes in
    bytes, in order. instructions: how often each stands in the code, by its full name.

    Built again, a kernel is the same but for its entry's name, in which Numba counts.
    """

    kernel: str
    entry: str
    architecture: str
    cubin: bytes = field(repr=False)
    sass: str = field(repr=False)
    registers: int
    stack: int
    local: int
    shared: int
    parameters: tuple[int, ...]
    instructions: Counter = field(repr=False)

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
    a NumbaError (numba.core.errors) for a kernel that Numba does not understand.
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
    with _stand_in(ARCHITECTURES[architecture][:2]):
        dispatcher = numba_cuda.jit(**options)(function)
        built = _kernel_class()(dispatcher.py_func, types, **dispatcher.targetoptions)
        library = built._codelibrary
        cubin = library.get_cubin(cc=ARCHITECTURES[architecture])
        code = bytes(getattr(cubin, "code", cubin))
        parameters = _parameters(library.get_asm_str(), built.entry_name)
    return _examined(
        function.__name__, built.entry_name, architecture, code, parameters
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


def _examined(
    kernel: str, entry: str, architecture: str, cubin: bytes, parameters: tuple
) -> Compiled:
    """What NVIDIA's cuobjdump says of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("-res-usage", path)
        sass = _tool("-sass", path)
    found = re.search(
        rf"Function {re.escape(entry)}:\s+REG:(?P<REG>\d+) STACK:(?P<STACK>\d+)"
        r" SHARED:(?P<SHARED>\d+) LOCAL:(?P<LOCAL>\d+)",
        usage,
    )
    if not found:
        raise CompilerError(f"cuobjdump does not say what {kernel} uses:\n{usage}")
    return Compiled(
        kernel=kernel,
        entry=entry,
        architecture=architecture,
        cubin=cubin,
        sass=sass,
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        local=int(found["LOCAL"]),
        shared=max(0, int(found["SHARED"]) - RESERVED.get(architecture, 0)),
        parameters=parameters,
        instructions=Counter(INSTRUCTION.findall(sass)),
    )


def _tool(option: str, path: Path) -> str:
    """What cuobjdump prints. It calls nvdisasm, and so must find it."""
    folders = {name: _folder_of(name) for name in ("cuobjdump", "nvdisasm")}
    program = Path(folders["cuobjdump"], "cuobjdump")
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
