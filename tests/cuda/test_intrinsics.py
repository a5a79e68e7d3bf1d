"""Every intrinsic becomes the instructions that it stands for, and no others.

The machine code is read, not run: `test_on_a_gpu` runs it.
"""

import inspect
import re
from types import FunctionType

import pytest
from numba.core.errors import NumbaError

from minidsv3.gpu import compile as gpu_compile
from minidsv3.gpu import intrinsics, ptx
from minidsv3.gpu.compile import ARCHITECTURES, Compiled, compiled
from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import (
    bits_of,
    exp2,
    float_of,
    ldmatrix4,
    ldmatrix4_transposed,
    load1,
    log2,
    mma_bf16,
    reciprocal,
    rsqrt,
    wait_copies,
)
from tests import intrinsic_kernels as kernels
from tests.intrinsic_kernels import elementwise, multiply, spread

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Of each kernel: its signature, and how often instructions with these parts are in it.
# Parts in the first place alone count all of the kind: so there are no others.
PLAIN = {"MUFU": 0, "F2FP": 0, "F2F": 0, "I2F": 0, "HMMA": 0, "LDSM": 0, "LDGSTS": 0}
PLAIN |= {"FADD": 0, "FMUL": 0, "FFMA": 0, "FSETP": 0, "LDS": 0, "STS": 0}
ONE_EACH = {"LDG": 1, "STG": 1}
ROUNDED_ONCE = {"F2FP": 1, "F2FP BF16 PACK_AB": 1}
CLAIMS = {
    "exp2": (
        elementwise(exp2),
        "f4[] f4[] i4",
        {**ONE_EACH, "MUFU": 1, "MUFU EX2": 1},
    ),
    "log2": (
        elementwise(log2),
        "f4[] f4[] i4",
        {**ONE_EACH, "MUFU": 1, "MUFU LG2": 1},
    ),
    "rsqrt": (
        elementwise(rsqrt),
        "f4[] f4[] i4",
        {**ONE_EACH, "MUFU": 1, "MUFU RSQ": 1},
    ),
    "reciprocal": (
        elementwise(reciprocal),
        "f4[] f4[] i4",
        {**ONE_EACH, "MUFU": 1, "MUFU RCP": 1},
    ),
    "bits_of": (
        elementwise(bits_of),
        "f4[] u2[] i4",
        {**ONE_EACH, **ROUNDED_ONCE, "STG U16": 1},
    ),
    "float_of": (elementwise(float_of), "u2[] f4[] i4", {**ONE_EACH, "LDG U16": 1}),
    "pack2": (
        kernels.packed,
        "f4[] u4[] i4",
        {**ROUNDED_ONCE, "LDG": 2, "STG": 1, "STG U16": 0},
    ),
    "low_of high_of": (kernels.unpacked, "u4[] f4[] i4", {"STG": 2}),
    "load1 store1 float32": (kernels.copied, "f4[] f4[] i4", ONE_EACH),
    "load1 bfloat16": (kernels.copied, "u2[] f4[] i4", {**ONE_EACH, "LDG U16": 1}),
    "store1 bfloat16": (
        kernels.copied,
        "f4[] u2[] i4",
        {**ONE_EACH, **ROUNDED_ONCE, "STG U16": 1},
    ),
    "round_to float32": (kernels.rounded, "f4[] f4[] f4[] i4", ONE_EACH),
    "round_to bfloat16": (
        kernels.rounded,
        "f4[] f4[] u2[] i4",
        {**ONE_EACH, **ROUNDED_ONCE},
    ),
    "load4 float32": (
        kernels.load_of_four,
        "f4[] f4[] i4",
        {"LDG": 1, "LDG 128": 1, "STG": 4, "STG 128": 0},
    ),
    "load4 bfloat16": (
        kernels.load_of_four,
        "u2[] f4[] i4",
        {"LDG": 1, "LDG 64": 1, "STG": 4, "STG 128": 0},
    ),
    "store4 float32": (
        kernels.store_of_four,
        "f4[] f4[] i4",
        {"LDG": 4, "LDG 128": 0, "STG": 1, "STG 128": 1},
    ),
    "store4 bfloat16": (
        kernels.store_of_four,
        "f4[] u2[] i4",
        {"LDG": 4, "F2FP": 2, "F2FP BF16 PACK_AB": 2, "STG": 1, "STG 64": 1},
    ),
    "load8 float32": (
        kernels.wide_load,
        "f4[] f4[] i4",
        {"LDG": 2, "LDG 128": 2, "STG": 8, "STG 128": 0},
    ),
    "load8 bfloat16": (
        kernels.wide_load,
        "u2[] f4[] i4",
        {"LDG": 1, "LDG 128": 1, "STG": 8, "STG 128": 0},
    ),
    "store8 float32": (
        kernels.wide_store,
        "f4[] f4[] i4",
        {"LDG": 8, "LDG 128": 0, "STG": 2, "STG 128": 2},
    ),
    "store8 bfloat16": (
        kernels.wide_store,
        "f4[] u2[] i4",
        {"LDG": 8, "F2FP": 4, "F2FP BF16 PACK_AB": 4, "STG": 1, "STG 128": 1},
    ),
    "ldmatrix4": (
        spread(ldmatrix4),
        "u4[] u4[]",
        {"STS": 4, "LDSM": 1, "LDSM 16 M88 4": 1},
    ),
    "ldmatrix4_transposed": (
        spread(ldmatrix4_transposed),
        "u4[] u4[]",
        {"STS": 4, "LDSM": 1, "LDSM 16 MT88 4": 1},
    ),
    "mma_bf16": (
        multiply(mma_bf16),
        "u4[] u4[] f4[] f4[]",
        {"LDG": 10, "HMMA": 1, "HMMA 16816 F32 BF16": 1, "STG": 4},
    ),
    "copy_async16 commit_copies wait_copies": (
        kernels.copied_aside,
        "u4[] u4[]",
        {"LDG": 0, "LDGSTS": 1, "LDGSTS BYPASS 128": 1, "LDS": 4, "LDGDEPBAR": 1},
    ),
    "copies in stages": (
        kernels.copied_in_stages,
        "u4[] u4[]",
        {"LDGSTS": 2, "LDGSTS BYPASS 128": 2, "LDS": 8, "LDGDEPBAR": 2, "DEPBAR LE": 2},
    ),
    "product": (
        kernels.product,
        "u4[] u4[] f4[]",
        {"STS": 6, "LDSM": 2, "LDSM M88": 1, "LDSM MT88": 1, "HMMA": 1},
    ),
}


def counted(code: Compiled, claims: dict[str, int]) -> dict[str, int]:
    return {parts: code.having(*parts.split()) for parts in claims}


@each_architecture
@pytest.mark.parametrize("name", CLAIMS)
def test_the_instructions_are_those_it_stands_for(name, architecture) -> None:
    kernel, signature, claims = CLAIMS[name]
    code = compiled(kernel, signature, architecture)
    claims = PLAIN | claims
    assert counted(code, claims) == claims, dict(code.instructions)
    assert (code.stack, code.local, code.spills, code.doubles) == (0, 0, 0, 0)
    assert code.registers <= 32


def test_every_intrinsic_has_both_sides_and_a_claim() -> None:
    twins = {
        name
        for name, twin in vars(intrinsics).items()
        if isinstance(twin, FunctionType)
        and twin.__module__ == intrinsics.__name__
        and not name.startswith("_")
    }
    machine = {n for n, v in vars(ptx).items() if type(v).__name__ == "_Intrinsic"}
    assert twins == machine
    assert twins <= set(" ".join(CLAIMS).split())


def test_both_sides_take_the_same_arguments() -> None:
    """By number: those that stand for one instruction name them x and y."""
    for name, twin in vars(intrinsics).items():
        if hasattr(ptx, name) and isinstance(twin, FunctionType):
            machine = inspect.signature(getattr(ptx, name)._defn).parameters
            assert len(machine) - 1 == len(inspect.signature(twin).parameters), name


# --- which register goes where ------------------------------------------------------

REGISTER = re.compile(r"\bR(\d+)\b")
ADDRESS = r"(?:desc\[\w+\])?\[R\d+\.64(?:\+(0x[0-9a-f]+))?\]"


def lines(code: Compiled, start: str) -> list[str]:
    """The operands of all instructions that begin like this."""
    found = re.findall(rf"\s({re.escape(start)}[\w.]*) ([^;]*);", code.sass)
    return [operands.replace(".reuse", "").strip() for _, operands in found]


def registers(operands: str) -> list[int]:
    return [int(number) for number in REGISTER.findall(operands)]


def loaded(code: Compiled) -> dict[int, int]:
    """Which register was loaded with which of a lane's values, ``array[t + 32 k]``."""
    pattern = re.compile(rf"R(\d+), {ADDRESS}")
    found = [pattern.fullmatch(line) for line in lines(code, "LDG.E")]
    return {int(m[1]): int(m[2] or "0", 16) // 128 for m in found}


def stored(code: Compiled) -> dict[int, int]:
    pattern = re.compile(rf"{ADDRESS}, R(\d+)")
    found = [pattern.fullmatch(line) for line in lines(code, "STG.E")]
    return {int(m[2]): int(m[1] or "0", 16) // 128 for m in found}


@each_architecture
def test_fragments_reach_the_tensor_core_in_order(architecture) -> None:
    """D, A, B and C of HMMA are runs of registers from the one that it names."""
    code = compiled(multiply(mma_bf16), "u4[] u4[] f4[] f4[]", architecture)
    [operands] = lines(code, "HMMA")
    D, A, B, C = registers(operands)
    values = loaded(code)
    assert [values[A + k] for k in range(4)] == [0, 1, 2, 3]
    assert [values[B + k] for k in range(2)] == [0, 1]
    assert [values[C + k] for k in range(4)] == [0, 1, 2, 3]
    assert stored(code) == {D + k: k for k in range(4)}


@each_architecture
@pytest.mark.parametrize("load", [ldmatrix4, ldmatrix4_transposed])
def test_matrices_come_in_order(load, architecture) -> None:
    code = compiled(spread(load), "u4[] u4[]", architecture)
    [operands] = lines(code, "LDSM")
    first = registers(operands)[0]
    assert stored(code) == {first + k: k for k in range(4)}


@each_architecture
def test_the_first_number_is_packed_below(architecture) -> None:
    """PACK_AB puts its last operand into the lower half."""
    code = compiled(kernels.packed, "f4[] u4[] i4", architecture)
    loads = [re.fullmatch(rf"R(\d+), {ADDRESS}", x) for x in lines(code, "LDG.E")]
    by_offset = {int(m[2] or "0", 16): int(m[1]) for m in loads}
    [operands] = lines(code, "F2FP")
    assert registers(operands)[1:] == [by_offset[4], by_offset[0]]


@each_architecture
def test_a_wait_names_its_number_of_groups(architecture) -> None:
    code = compiled(kernels.copied_in_stages, "u4[] u4[]", architecture)
    assert lines(code, "DEPBAR.LE") == ["SB0, 0x1", "SB0, 0x0"]


# --- what the compiler may do with them ---------------------------------------------


@pytest.fixture
def said(monkeypatch) -> dict[str, str]:
    """What LLVM is told of each line of PTX, by the first word of its instruction."""
    calls, plain_asm = {}, ptx._asm

    def spy(builder, result, text, *rest, **options):
        call = plain_asm(builder, result, text, *rest, **options)
        calls[text.split()[0].split(".")[0]] = str(call)
        return call

    monkeypatch.setattr(ptx, "_asm", spy)
    return calls


def test_what_a_warp_does_together_is_convergent(said) -> None:
    """Else a compiler may move it into a branch that not all lanes take."""
    compiled(kernels.product, "u4[] u4[] f4[]")
    assert set(said) == {"ldmatrix", "mma"}
    for call in said.values():
        assert "asm sideeffect" in call and "convergent" in call
    assert "~{memory}" in said["ldmatrix"]  # it reads what was stored before


def test_copies_stay_where_they_are_and_arithmetic_need_not(said) -> None:
    compiled(kernels.copied_aside, "u4[] u4[]")
    assert "asm sideeffect" in said["cp"] and "~{memory}" in said["cp"]
    compiled(elementwise(exp2), "f4[] f4[] i4")
    compiled(kernels.packed, "f4[] u4[] i4")
    for name in ("ex2", "cvt"):
        assert "sideeffect" not in said[name] and "readnone" in said[name]


def dropped(x, y):
    i = cuda.grid(1)
    exp2(x[i])
    y[i] = x[i]


def repeated(x, y):
    i = cuda.grid(1)
    y[i] = exp2(x[i]) + exp2(x[i])


def test_arithmetic_that_nobody_uses_or_that_was_done_before_is_not_done() -> None:
    assert compiled(dropped, "f4[] f4[]").count("MUFU") == 0
    assert compiled(repeated, "f4[] f4[]").count("MUFU") == 1


# --- what is refused ----------------------------------------------------------------


def reads_every_other(x, y):
    y[0] = load1(x[::2], 0)


def reads_a_slice(x, y):
    y[0] = load1(x[8:], 0)


def spread_floats(x, y):
    y[0], y[1], y[2], y[3] = ldmatrix4(x, 0)


def waits_for(pending):
    def kernel(x):
        wait_copies(pending)

    return kernel


def waits_for_an_argument(x, n):
    wait_copies(n)


@pytest.mark.parametrize(
    ("kernel", "signature", "said"),
    [
        (reads_every_other, "f4[] f4[]", r"array\(float32, 1d, A\)"),
        (reads_a_slice, "f8[] f4[]", "float64"),
        (reads_a_slice, "i4[] f4[]", "int32"),
        (kernels.wide_load, "i8[] f4[] i4", "int64"),
        (kernels.wide_store, "f4[] u4[] i4", "uint32"),
        (spread_floats, "f4[] u4[]", r"ldmatrix4|<intrinsic load>"),
        (waits_for_an_argument, "f4[] i4", "wait_copies takes a constant"),
        (waits_for(-1), "f4[]", "the number of groups that may be pending"),
    ],
)
def test_what_does_not_fit_is_refused(kernel, signature, said) -> None:
    with pytest.raises(NumbaError, match=said):
        compiled(kernel, signature)


def test_a_slice_that_is_contiguous_is_taken() -> None:
    assert compiled(reads_a_slice, "f4[] f4[]").having("LDG") == 1


def test_numbers_from_outside_have_no_other_layout() -> None:
    """So that no array of a kernel is loaded from with a stride."""
    for word in gpu_compile._types("f4[] u2[] i4[] u4[] i8[]"):
        assert (word.ndim, word.layout) == (1, "C")
