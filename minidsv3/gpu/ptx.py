"""The machine's side of `intrinsics`: what the compiler puts where a kernel calls one.

Each function here returns Numba's intrinsic for the twin of the same name. An intrinsic
is two things: the types it takes and gives, and the LLVM instructions, mostly one line
of PTX, that do it. Needs numba-cuda; nothing else in the library imports this module
but `compile`. Source of every instruction: NVIDIA, PTX ISA 9.0.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import RequireLiteralValue, TypingError
from numba.cuda.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
FOUR_WORDS = ir.LiteralStructType([I32] * 4)
FOUR_FLOATS = ir.LiteralStructType([F32] * 4)
SHARED = 3  # LLVM's number for a block's shared memory

Type = types.Type
Generate = Callable[..., ir.Value]
Typed = tuple[Any, Generate] | None
"""A signature and what makes the code; None if the types are not for this intrinsic."""


def _asm(
    builder: ir.IRBuilder, result: ir.Type, text: str, constraints: str,
    arguments: Sequence[ir.Value], effect: bool = False,
) -> ir.Value:  # fmt: skip
    """One line of PTX. effect: it does more than compute its result.

    What has .sync in its name is done by all lanes of a warp at once: the compiler may
    then move it into no branch, out of none, and double or drop it nowhere.
    """
    function = ir.FunctionType(result, [a.type for a in arguments])
    together = ".sync." in text
    line = ir.InlineAsm(function, text, constraints, side_effect=effect or together)
    attributes = ["convergent"] if together else [] if effect else ["readnone"]
    return builder.call(line, arguments, attrs=attributes)


def _elementwise(text: str, result: Any, *arguments: Any) -> Any:
    """An intrinsic that is one instruction on registers."""
    letters = {types.float32: "f", types.uint32: "r", types.uint16: "h"}
    llvm = {types.float32: F32, types.uint32: I32, types.uint16: I16}
    constraints = ",".join(["=" + letters[result]] + [letters[a] for a in arguments])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        return _asm(builder, llvm[result], text, constraints, values)

    if len(arguments) == 1:

        @intrinsic
        def one(typing_context, x):
            return result(*arguments), generate

        return one

    @intrinsic
    def two(typing_context, x, y):
        return result(*arguments), generate

    return two


exp2 = _elementwise("ex2.approx.ftz.f32 $0, $1;", types.float32, types.float32)
log2 = _elementwise("lg2.approx.ftz.f32 $0, $1;", types.float32, types.float32)
rsqrt = _elementwise("rsqrt.approx.ftz.f32 $0, $1;", types.float32, types.float32)
reciprocal = _elementwise("rcp.approx.ftz.f32 $0, $1;", types.float32, types.float32)
pack2 = _elementwise(
    "cvt.rn.bf16x2.f32 $0, $2, $1;", types.uint32, types.float32, types.float32
)
bits_of = _elementwise("cvt.rn.bf16.f32 $0, $1;", types.uint16, types.float32)


def _shifted(shift: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """A bfloat16 of a word, as float32: one shift or mask."""

    @intrinsic
    def half(typing_context, word):
        def generate(context, builder, signature, values):
            return builder.bitcast(shift(builder, values[0]), F32)

        return types.float32(types.uint32), generate

    return half


def _low(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    return builder.shl(word, I32(16))


def _high(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    return builder.and_(word, I32(0xFFFF0000))


low_of, high_of = _shifted(_low), _shifted(_high)


@intrinsic
def float_of(typing_context: Any, bits: Type) -> Typed:
    """16 bits, shifted up."""

    def generate(context, builder, signature, values):
        return builder.bitcast(_low(builder, builder.zext(values[0], I32)), F32)

    return types.float32(types.uint16), generate


# --- elements -----------------------------------------------------------------------


def _element(context: Any, builder: Any, kind: Any, array: Any, i: Any) -> ir.Value:
    """The address of element i of a one-dimensional contiguous array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [i])


def _flat(*arrays: Any) -> bool:
    """Whether these types are one-dimensional contiguous arrays."""
    return all(
        isinstance(a, types.Array) and a.ndim == 1 and a.layout == "C" for a in arrays
    )


def _holds(array: Any) -> int | None:
    """Bytes of an element if an array may hold a kernel's numbers."""
    return (
        {types.float32: 4, types.uint16: 2}.get(array.dtype) if _flat(array) else None
    )


def _vector(builder: Any, pointer: ir.Value, at: int, n: int) -> ir.Value:
    """A pointer to n words, ``at`` words behind another pointer."""
    words = builder.bitcast(pointer, I32.as_pointer())
    there = builder.gep(words, [I64(at)])
    return builder.bitcast(there, ir.VectorType(I32, n).as_pointer())


def _pieces(words: int) -> list[tuple[int, int]]:
    """Where each load of 16 bytes begins, in words, and how many it takes."""
    return [(at, min(4, words - at)) for at in range(0, words, 4)]


def _read(builder: Any, pointer: ir.Value, words: int) -> list[ir.Value]:
    """Words, four in one load (LDG.E.128, LDS.128): LLVM keeps a vector together."""
    found = []
    for at, n in _pieces(words):
        loaded = builder.load(_vector(builder, pointer, at, n), align=4 * n)
        found += [builder.extract_element(loaded, I32(k)) for k in range(n)]
    return found


def _write(builder: Any, pointer: ir.Value, words: Sequence[ir.Value]) -> None:
    """Words, four in one store."""
    for at, n in _pieces(len(words)):
        vector = ir.Constant(ir.VectorType(I32, n), ir.Undefined)
        for k in range(n):
            vector = builder.insert_element(vector, words[at + k], I32(k))
        builder.store(vector, _vector(builder, pointer, at, n), align=4 * n)


@intrinsic
def load1(typing_context: Any, array: Type, i: Type) -> Typed:
    """One element, widened."""
    size = _holds(array)

    def generate(context, builder, signature, values):
        kind, _ = signature.args
        value = builder.load(_element(context, builder, kind, *values))
        if size == 4:
            return value
        return builder.bitcast(_low(builder, builder.zext(value, I32)), F32)

    return (types.float32(array, types.uint64), generate) if size else None


@intrinsic
def store1(typing_context: Any, array: Type, i: Type, value: Type) -> Typed:
    """One element, rounded."""
    size = _holds(array)

    def generate(context, builder, signature, values):
        pointer = _element(context, builder, signature.args[0], *values[:2])
        number = values[2]
        if size == 2:
            text = "cvt.rn.bf16.f32 $0, $1;"
            number = _asm(builder, I16, text, "=h,f", [number])
        builder.store(number, pointer)
        return context.get_dummy_value()

    if not size:
        return None
    return types.void(array, types.uint64, types.float32), generate


@intrinsic
def round_to(typing_context: Any, array: Type, value: Type) -> Typed:
    """There and back again for bfloat16, nothing for float32."""
    size = _holds(array)

    def generate(context, builder, signature, values):
        if size == 4:
            return values[1]
        text = "cvt.rn.bf16x2.f32 $0, $1, 0f00000000;"  # zero below: again a float32
        return builder.bitcast(_asm(builder, I32, text, "=r,f", [values[1]]), F32)

    return (types.float32(array, types.float32), generate) if size else None


def _places(
    context: Any, builder: Any, signature: Any, values: Any, n: int
) -> list[ir.Value]:
    """Addresses of n elements of the local array among the arguments."""
    first = _element(context, builder, signature.args[2], values[2], values[3])
    return [builder.gep(first, [I64(k)]) for k in range(n)]


def _moving(array: Any, local: Any) -> Any:
    """The signature of a load or store of several numbers, if these types may."""
    if not _holds(array) or not _flat(local) or local.dtype != types.float32:
        return None
    return types.void(array, types.uint64, local, types.uint64)


def _load(n: int) -> Any:
    """n numbers, as few loads as there can be, widened into registers."""

    @intrinsic
    def load(typing_context, array, i, into, j):
        def generate(context, builder, signature, values):
            pointer = _element(context, builder, signature.args[0], *values[:2])
            words = _read(builder, pointer, n * _holds(array) // 4)
            if _holds(array) == 2:
                words = [half(builder, w) for w in words for half in (_low, _high)]
            places = _places(context, builder, signature, values, n)
            for word, place in zip(words, places, strict=True):
                builder.store(builder.bitcast(word, F32), place)
            return context.get_dummy_value()

        signature = _moving(array, into)
        return (signature, generate) if signature else None

    return load


def _store(n: int) -> Any:
    """n numbers, rounded from registers, in as few stores as there can be."""

    @intrinsic
    def store(typing_context, array, i, values, j):
        def generate(context, builder, signature, arguments):
            pointer = _element(context, builder, signature.args[0], *arguments[:2])
            places = _places(context, builder, signature, arguments, n)
            words = [builder.load(place) for place in places]
            if _holds(array) == 2:
                text = "cvt.rn.bf16x2.f32 $0, $2, $1;"
                pairs = zip(words[::2], words[1::2], strict=True)
                words = [_asm(builder, I32, text, "=r,f,f", pair) for pair in pairs]
            _write(builder, pointer, [builder.bitcast(word, I32) for word in words])
            return context.get_dummy_value()

        signature = _moving(array, values)
        return (signature, generate) if signature else None

    return store


load4, load8 = _load(4), _load(8)
store4, store8 = _store(4), _store(8)


# --- shared memory, tensor cores, copies --------------------------------------------


def _shared_address(
    context: Any, builder: Any, kind: Any, tile: Any, i: Any
) -> ir.Value:
    """The 32-bit address of ``tile[i]`` in shared memory."""
    element = _element(context, builder, kind, tile, i)
    inside = ir.PointerType(element.type.pointee, addrspace=SHARED)
    return builder.ptrtoint(builder.addrspacecast(element, inside), I32)


def _ldmatrix(modifier: str) -> Any:
    text = f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0,$1,$2,$3}}, [$4];"

    @intrinsic
    def load(typing_context, tile, i):
        def generate(context, builder, signature, values):
            address = _shared_address(context, builder, signature.args[0], *values)
            constraints = "=r,=r,=r,=r,r,~{memory}"
            got = _asm(builder, FOUR_WORDS, text, constraints, [address], effect=True)
            words = [builder.extract_value(got, k) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, words)

        if not _flat(tile) or tile.dtype != types.uint32:
            return None
        return types.UniTuple(types.uint32, 4)(tile, types.uint64), generate

    return load


ldmatrix4, ldmatrix4_transposed = _ldmatrix(""), _ldmatrix(".trans")


@intrinsic
def mma_bf16(
    typing_context: Any, c0: Type, c1: Type, c2: Type, c3: Type,
    a0: Type, a1: Type, a2: Type, a3: Type, b0: Type, b1: Type,
) -> Typed:  # fmt: skip
    """HMMA.16816.F32.BF16."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$8,$9,$10,$11}, {$12,$13}, {$4,$5,$6,$7};"
    )

    def generate(context, builder, signature, values):
        constraints = "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r"
        got = _asm(builder, FOUR_FLOATS, text, constraints, values)
        floats = [builder.extract_value(got, k) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, floats)

    given = [types.float32] * 4 + [types.uint32] * 6
    return types.UniTuple(types.float32, 4)(*given), generate


@intrinsic
def copy_async16(
    typing_context: Any, tile: Type, i: Type, source: Type, j: Type
) -> Typed:
    """LDGSTS: from global memory past the registers."""

    def generate(context, builder, signature, values):
        kind, _, source_kind, _ = signature.args
        target = _shared_address(context, builder, kind, *values[:2])
        origin = _element(context, builder, source_kind, *values[2:])
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        addresses = [target, builder.ptrtoint(origin, I64)]
        _asm(builder, ir.VoidType(), text, "r,l,~{memory}", addresses, effect=True)
        return context.get_dummy_value()

    if not _flat(tile, source) or tile.dtype != source.dtype:
        return None
    return types.void(tile, types.uint64, source, types.uint64), generate


@intrinsic
def commit_copies(typing_context: Any) -> Typed:
    """``cp.async.commit_group``."""

    def generate(context, builder, signature, values):
        text = "cp.async.commit_group;"
        _asm(builder, ir.VoidType(), text, "~{memory}", [], effect=True)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def wait_copies(typing_context: Any, pending: Type) -> Typed:
    """``cp.async.wait_group``, whose number is part of the instruction."""
    if not isinstance(pending, types.IntegerLiteral):
        raise RequireLiteralValue("wait_copies takes a constant")
    if pending.literal_value < 0:
        raise TypingError("wait_copies takes the number of groups that may be pending")

    def generate(context, builder, signature, values):
        text = f"cp.async.wait_group {pending.literal_value};"
        _asm(builder, ir.VoidType(), text, "~{memory}", [], effect=True)
        return context.get_dummy_value()

    return types.void(pending), generate
