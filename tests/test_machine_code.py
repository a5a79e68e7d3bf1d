"""Machine code read in order, on lines as NVIDIA's cuobjdump prints them."""

from minidsv3.gpu.machine_code import instructions, loads_under_way

HEAD = """
	code for sm_90a
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
"""


def code(*lines: str) -> str:
    """Lines with the addresses and the encoding that stand around them."""
    said = [
        f"        /*{16 * n:04x}*/                   {line} ;"
        f"            /* 0x000000{n:02x}00017a02 */\n"
        "                                        /* 0x000fc00000000f00 */\n"
        for n, line in enumerate(lines)
    ]
    return HEAD + "".join(said)


def test_what_an_instruction_says() -> None:
    load, store, move = instructions(
        code(
            "@!P3 LDG.E.128 R16, desc[UR10][R2.64+0x10]",
            "STG.E.U16 [R4.64], R9",
            "IMAD.U32 R12, R8.reuse, 0x10000, RZ",
        )
    )
    assert (load.address, load.guard, load.name) == (0, "!P3", "LDG.E.128")
    assert (load.kind, load.width, load.loaded) == ("LDG", 16, range(16, 20))
    assert load.registers == (16, 2, 3)  # an address is two registers, UR10 is another
    assert (store.address, store.guard, store.width) == (16, "", 2)
    assert store.registers == (4, 5, 9)
    assert move.registers == (12, 8)


def test_loads_before_the_first_wait_are_under_way() -> None:
    together = code(
        "LDG.E.128 R4, [R2.64]",
        "LDG.E.128 R8, [R2.64+0x10]",
        "IADD3 R20, R20, 0x1, RZ",  # waits for none
        "FFMA R0, R11, R11, R0",  # the last word of the second
        "FFMA R0, R4, R4, R0",  # it has come: loads return in order
        "LDG.E R12, [R2.64+0x20]",
        "EXIT",
    )
    assert loads_under_way(together) == [32, 4]


def test_each_load_that_is_waited_for_is_alone() -> None:
    one_by_one = code(
        "LDG.E.U16 R4, [R2.64]",
        "IMAD.U32 R4, R4, 0x10000, RZ",
        "LDG.E.64 R6, [R2.64+0x8]",
        "STG.E [R2.64], R7",
    )
    assert loads_under_way(one_by_one) == [2, 8]


def test_an_address_that_was_loaded_is_waited_for() -> None:
    """The target's index, then its logit."""
    chained = code("LDG.E.64 R2, [R2.64]", "LDG.E R4, [R2.64]", "EXIT")
    assert loads_under_way(chained) == [8, 4]


def test_code_without_loads() -> None:
    assert loads_under_way(code("MOV R1, RZ", "EXIT")) == []
