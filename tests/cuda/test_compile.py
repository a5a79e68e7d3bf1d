"""A kernel compiled without a GPU: what is read out of it, and what is refused."""

import importlib.util
import math
import os
import re
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
from numba.core.errors import NumbaError
from numpy import float32, uint32

from minidsv3.gpu import compile as gpu_compile
from minidsv3.gpu.compile import (
    ARCHITECTURES,
    BUILT_FOR,
    Compiled,
    CompilerError,
    architecture,
    compiled,
)
from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import load1
from tests import intrinsic_kernels as kernels

ROOT = Path(__file__).parents[2]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
WORD, POINTER = 4, 8
ARRAY = (POINTER,) * 7  # memory, parent, items, bytes of one, data, length, stride
CHANGED = (
    f"numba-cuda {metadata.version('numba-cuda')} is not as minidsv3.gpu.compile knows "
    f"it, which was built for {BUILT_FOR}. Install that version (constraints.txt), or "
    "mend what this test names, run tests/cuda, and change BUILT_FOR and the pin."
)


def add(x, y, n):
    i = cuda.grid(1)
    if i < n:
        y[i] += x[i]


# --- the insides of numba-cuda that are relied on -----------------------------------


def test_numba_cuda_is_the_one_that_is_known() -> None:
    from numba import cuda as numba_cuda
    from numba.cuda import api, compiler, dispatcher
    from numba.cuda.cudadrv import devices

    assert metadata.version("numba-cuda") == BUILT_FOR, CHANGED
    assert numba_cuda.implementation == "NVIDIA", CHANGED
    for module in (api, compiler, dispatcher):
        assert callable(module.get_current_device), CHANGED
    assert callable(devices.get_context), CHANGED
    assert callable(dispatcher._Kernel), CHANGED


def test_the_insides_of_a_kernel_are_as_known() -> None:
    from numba import cuda as numba_cuda

    with gpu_compile._stand_in((9, 0)):
        dispatcher = numba_cuda.jit(gpu_compile.for_numba(add))
        types = gpu_compile._types("f4[] f4[] i4")
        kernel = gpu_compile._kernel_class()(
            dispatcher.py_func, types, **dispatcher.targetoptions
        )
        library = kernel._codelibrary
        cubin = library.get_cubin(cc=(9, 0, "a"))
        assert bytes(getattr(cubin, "code", cubin))[:4] == b"\x7fELF", CHANGED
        assert f".entry {kernel.entry_name}(" in library.get_asm_str(), CHANGED


def test_parameters_are_passed_as_known() -> None:
    """Whoever launches the machine code himself must hand over exactly these."""
    code = compiled(add, "f4[] u2[] i4")
    assert code.parameters == (*ARRAY, *ARRAY, WORD), CHANGED

    def scalars(x, a, b, c, d, e, f):
        x[0] = a + b + c + d + e + f

    code = compiled(scalars, "f4[] f4 u2 i4 u4 i8 f8")
    assert code.parameters == (*ARRAY, 4, 2, 4, 4, 8, 8), CHANGED


def test_the_data_pointer_is_the_fifth_word_of_an_array() -> None:
    """And nothing but it is needed to reach an element of a contiguous array."""

    def second(x, y):
        y[uint32(0)] = x[uint32(1)]

    code = compiled(second, "f4[] f4[]", "sm_80")
    constants = set(re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", code.sass))
    first = 0x160  # where an A100's parameters begin
    x_data, y_data = first + 4 * POINTER, first + 11 * POINTER
    used = {int(c, 16) for c in constants if int(c, 16) >= first}
    assert used <= {x_data, x_data + 4, y_data, y_data + 4}, CHANGED
    assert {x_data, y_data} <= used, CHANGED


# --- what is read out of the machine code -------------------------------------------


@each_architecture
def test_the_cubin_is_what_a_gpu_of_that_architecture_loads(architecture) -> None:
    code = compiled(add, "f4[] f4[] i4", architecture)
    assert code.cubin[:4] == b"\x7fELF"
    assert int.from_bytes(code.cubin[18:20], "little") == 190  # EM_CUDA
    assert code.entry.encode() in code.cubin
    assert set(re.findall(r"\bsm_\w+", code.sass)) == {architecture}
    assert code.architecture == architecture
    assert code.kernel == "add"
    assert code.count("LDG") == 2 and code.count("STG") == code.count("FADD") == 1
    assert 0 < code.registers <= 32


def test_counts_are_by_prefix_or_by_parts() -> None:
    code = compiled(kernels.wide_load, "f4[] f4[] i4")
    assert code.count("LDG.E.128") == code.having("LDG", "128") == 2
    assert code.having("LD") == code.having("LDG", "12") == 0
    assert code.count("LDG", "STG") == 10


def again(cubin_of: str) -> str:
    """What another Python, with another order of its sets, makes of a kernel."""
    program = (
        "from tests.cuda.test_compile import compiled, kernels\n"
        f"code = {cubin_of}\n"
        "print(code.registers, sorted(code.instructions.items()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_built_again_it_is_the_same() -> None:
    first, second = (compiled(kernels.product, "u4[] u4[] f4[]") for _ in range(2))
    assert first.entry != second.entry  # Numba counts
    assert first.sass.replace(first.entry, "") == second.sass.replace(second.entry, "")
    expected = f"{first.registers} {sorted(first.instructions.items())}"
    assert again('compiled(kernels.product, "u4[] u4[] f4[]")') == expected


@each_architecture
def test_shared_memory_is_the_kernels_own(architecture) -> None:
    """cuobjdump counts 1 KB that the driver keeps of a Hopper's."""
    assert compiled(kernels.copied_aside, "u4[] u4[]", architecture).shared == 128 * 4
    assert compiled(kernels.product, "u4[] u4[] f4[]", architecture).shared == 192 * 4
    assert compiled(add, "f4[] f4[] i4", architecture).shared == 0


def test_what_is_never_done_is_not_counted() -> None:
    code = compiled(kernels.copied_aside, "u4[] u4[]")
    assert code.sass.count("@!PT LDS RZ") == 3  # a Hopper's assembler pads copies so
    assert code.count("LDS") == 4


SASS = """
    /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
    /*0010*/              @!PT LDS RZ, [RZ] ;                /* 0x0000000000027919 */
    /*0020*/             @!UPT UIADD3 URZ, URZ, 1, URZ ;     /* 0x0000000000027919 */
    /*0030*/               @P0 LDG.E.128 R4, [R2.64] ;       /* 0x0000000000027919 */
    /*0040*/              @!P1 STG.E [R2.64], R4 ;           /* 0x0000000000027919 */
    /*0050*/              @UP0 UMOV UR4, 0x400 ;             /* 0x0000000000027919 */
   /*10060*/               @PT EXIT ;                        /* 0x0000000000027919 */
"""


def test_instructions_are_told_from_what_stands_around_them() -> None:
    found = gpu_compile.INSTRUCTION.findall(SASS)
    assert found == ["LDC", "LDG.E.128", "STG.E", "UMOV", "EXIT"]


def sums(x, y, n):
    values = cuda.local.array(64, float32)
    i = cuda.grid(1)
    for k in range(64):
        values[k] = x[64 * i + k]
    cuda.syncthreads()
    for k in range(64):
        y[64 * i + k] = values[k] * values[63 - k] + values[(k + 7) % 64]


def looked_up(x, y, n):
    values = cuda.local.array(32, float32)
    i = cuda.grid(1)
    for k in range(32):
        values[k] = float32(0)
    for k in range(n):
        values[k % 32] += x[k]
    y[i] = values[n % 32]


@each_architecture
def test_too_few_registers_are_seen(architecture) -> None:
    wide = compiled(sums, "f4[] f4[] i4", architecture)
    assert (wide.stack, wide.spills) == (0, 0)
    assert wide.registers > 64
    tight = compiled(sums, "f4[] f4[] i4", architecture, max_registers=32)
    assert tight.registers <= 32
    assert tight.stack >= 4 * 32  # at least the half of 64 floats that finds no room
    assert tight.spills >= 2 * 32


def test_a_local_array_with_an_index_from_outside_is_seen() -> None:
    code = compiled(looked_up, "f4[] f4[] i4")
    assert code.stack >= 4 * 32
    assert code.count("STL") >= 32 / 4 and code.count("LDL") >= 2
    assert code.spills == code.count("STL") + code.count("LDL")


def tenth(x, y):
    i = cuda.grid(1)
    y[i] = x[i] * 0.1


def tenth_in_single(x, y):
    i = cuda.grid(1)
    y[i] = x[i] * float32(0.1)


def tenth_by_division(x, n):
    i = cuda.grid(1)
    x[i] = n / 10


def root_of_a_double(x, y):
    i = cuda.grid(1)
    y[i] = math.sqrt(x[i] + 0.1)


@each_architecture
def test_doubles_are_seen(architecture) -> None:
    for kernel, signature in (
        (tenth, "f4[] f4[]"),
        (tenth_by_division, "f4[] i4"),
        (root_of_a_double, "f4[] f4[]"),
    ):
        assert compiled(kernel, signature, architecture).doubles > 0
    code = compiled(tenth, "f4[] f4[]", architecture)
    assert code.doubles == 3  # to float64, the product, and back
    assert compiled(tenth_in_single, "f4[] f4[]", architecture).doubles == 0


@pytest.mark.parametrize(
    "name",
    "DADD DMUL.RP DFMA.RM DSETP.GT.AND DMNMX DMMA.884 F2F.F64.F32 F2F.F32.F64 "
    "I2F.F64.S64 F2I.S64.F64 MUFU.RCP64H MUFU.RSQ64H".split(),
)
def test_these_are_doubles(name) -> None:
    assert gpu_compile.IN_DOUBLE.match(name)


@pytest.mark.parametrize(
    "name",
    "DEPBAR.LE FADD MUFU.RCP F2F.BF16.F32 IADD3 ULDC.64 I2F.S64 LDG.E.64".split(),
)
def test_these_are_none(name) -> None:
    assert not gpu_compile.IN_DOUBLE.match(name)


@each_architecture
def test_a_loop_over_elements_has_no_wide_access(architecture) -> None:
    code = compiled(kernels.one_by_one, "f4[] f4[] i4", architecture)
    assert code.having("LDG", "128") == code.having("STG", "128") == 0
    assert code.having("LDG") == code.having("STG") == 8


def test_fast_mathematics_is_asked_for() -> None:
    def tanh(x, y):
        i = cuda.grid(1)
        y[i] = math.tanh(x[i])

    careful = compiled(tanh, "f4[] f4[]")
    fast = compiled(tanh, "f4[] f4[]", fastmath=True)
    assert fast.count("MUFU.TANH") == 1 > careful.count("MUFU.TANH")


# --- kernels with functions, and kernels of Numba's own -----------------------------


def halved(value):
    return load1(value, 0) * float32(0.5)


def calls_a_function(x, y):
    y[0] = halved(x)


def numbas_own(x, y):
    i = numba.cuda.grid(1)
    y[i] = x[i]


def test_functions_of_a_kernel_see_the_instructions_too() -> None:
    code = compiled(calls_a_function, "u2[] f4[]")
    assert code.having("LDG", "U16") == 1
    assert calls_a_function.__globals__["halved"] is halved  # and nothing was changed


def test_a_kernel_for_numbas_cuda_is_one_too() -> None:
    assert compiled(numbas_own, "f4[] f4[]").count("STG") == 1
    assert compiled(numba.cuda.jit(numbas_own), "f4[] f4[]").count("STG") == 1


# --- what is refused ----------------------------------------------------------------


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="'sm_70': known are sm_80, sm_90a"):
        compiled(add, "f4[] f4[] i4", "sm_70")


@pytest.mark.parametrize("word", ["f2", "f4[][]", "[]", "float32", "f4[:]"])
def test_an_unknown_word_is_refused(word) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{word!r} in the signature 'f4[] ")
    ):
        compiled(add, f"f4[] {word} i4")


@pytest.mark.parametrize("signature", ["", "f4[] f4[]", "f4[] f4[] i4 i4"])
def test_a_signature_of_another_length_is_refused(signature) -> None:
    words = len(signature.split())
    with pytest.raises(
        ValueError, match=f"has {words} words, and add has 3 parameters"
    ):
        compiled(add, signature)


def asked_for_a_device() -> list:
    """What Numba calls to find one."""
    from numba.cuda import api, compiler, dispatcher
    from numba.cuda.cudadrv import devices

    found = [module.get_current_device for module in (api, compiler, dispatcher)]
    return [*found, devices.get_context]


def test_what_numba_does_not_understand_is_its_own_error() -> None:
    def wrong(x):
        x[0] = x.nothing

    before = asked_for_a_device()
    with pytest.raises(NumbaError, match="nothing"):
        compiled(wrong, "f4[]")
    assert asked_for_a_device() == before


def test_host_threads_compile_one_after_the_other(monkeypatch) -> None:
    """Or the second would take the first's stand-in for Numba's own, and leave it."""
    before, together, found = asked_for_a_device(), threading.Barrier(2), {}
    types = gpu_compile._parameters

    def slow(*args):
        time.sleep(0.2)  # in the stand-in: long enough for the other to come in
        return types(*args)

    monkeypatch.setattr(gpu_compile, "_parameters", slow)

    def build(kernel, signature, where) -> None:
        together.wait()
        found[where] = compiled(kernel, signature, where)

    threads = [
        threading.Thread(target=build, args=given)
        for given in ((add, "f4[] f4[] i4", "sm_80"), (tenth, "f4[] f4[]", "sm_90a"))
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert asked_for_a_device() == before
    assert {where: code.kernel for where, code in found.items()} == {
        "sm_80": "add", "sm_90a": "tenth",
    }  # fmt: skip
    for where, code in found.items():
        assert set(re.findall(r"\bsm_\w+", code.sass)) == {where}


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a")],
)
def test_the_architecture_of_a_gpu(capability, name) -> None:
    assert architecture(capability) == name


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_a_gpu_that_no_code_is_for(capability) -> None:
    """sm_90a runs on nothing else, newer ones included."""
    major, minor = capability
    with pytest.raises(CompilerError, match=rf"compute capability {major}\.{minor}"):
        architecture(capability)


@pytest.fixture
def forgetful():
    """Checks that are made once are made anew, and again afterwards."""
    once = (gpu_compile._numba_cuda, gpu_compile._folder_of)
    for check in once:
        check.cache_clear()
    yield
    for check in once:
        check.cache_clear()


def test_no_numba_cuda_is_explained(monkeypatch, forgetful) -> None:
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpu_compile.metadata, "version", missing)
    with pytest.raises(CompilerError, match=r"pip install 'minidsv3\[cuda\]'"):
        compiled(add, "f4[] f4[] i4")


def test_another_version_is_named(monkeypatch, forgetful) -> None:
    monkeypatch.setattr(gpu_compile.metadata, "version", lambda name: "0.99.1")
    with pytest.raises(CompilerError, match=f"is 0.99.1, .* built for {BUILT_FOR}"):
        compiled(add, "f4[] f4[] i4")


def test_numbas_old_cuda_is_refused(monkeypatch, forgetful) -> None:
    monkeypatch.delattr(numba.cuda, "implementation")
    with pytest.raises(CompilerError, match="Numba's old built-in one"):
        compiled(add, "f4[] f4[] i4")


@pytest.mark.parametrize("missing", ["cuobjdump", "nvdisasm"])
def test_a_missing_tool_is_named(missing, monkeypatch, forgetful, tmp_path) -> None:
    for name in {"cuobjdump", "nvdisasm"} - {missing}:
        (tmp_path / "cu13" / "bin").mkdir(parents=True)
        (tmp_path / "cu13" / "bin" / name).touch()
    find = importlib.util.find_spec

    def found(name, *rest):
        here = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        return here if name == "nvidia" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    code = compiled(add, "f4[] f4[] i4")  # which a GPU loads without any tool
    assert code.cubin[:4] == b"\x7fELF"
    said = f"{missing} is missing. Compiling a kernel"
    for asked in ("registers", "stack", "local", "shared", "sass", "instructions"):
        with pytest.raises(CompilerError, match=said):
            getattr(code, asked)
    with pytest.raises(CompilerError, match=said):
        code.count("LDG")


def test_without_nvidias_packages_the_tool_is_named(monkeypatch, forgetful) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerError, match="cuobjdump is missing"):
        gpu_compile._tool("-sass", b"")


def test_a_tool_that_fails_is_quoted() -> None:
    with pytest.raises(CompilerError, match="cuobjdump -sass failed: .*kernel.cubin"):
        gpu_compile._tool("-sass", b"no machine code")


def test_another_answer_of_the_tools_is_an_error() -> None:
    """And not a kernel that takes no registers."""
    code = compiled(add, "f4[] f4[] i4")
    other = Compiled("add", "other", "sm_90a", code.cubin, ())
    with pytest.raises(CompilerError, match=r"does not say what add uses:\s+Resource"):
        _ = other.registers
    with pytest.raises(CompilerError, match="no entry other in the PTX"):
        gpu_compile._parameters(".entry add(\n)", "other")
