"""The drawings of chapter 10: the machine, and what memory makes of 32 addresses."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from minidsv3.gpu.simulator import cuda, launch

from .test_port_drawings import STATIC, said, words

MAP = ET.parse(STATIC / "gpu_map.svg").getroot()
MEMORY = ET.parse(STATIC / "coalescing.svg").getroot()
NOTCH = 20  # how wide 16 times as many bytes are


def stated(drawing: ET.Element) -> list[str]:
    return [value for _, value in said(drawing, "number")]


# --- the machine ----------------------------------------------------------------------


def test_sizes_are_an_h200s() -> None:
    """NVIDIA's H200 data sheet and H100 white paper; the rest follows from these."""
    registers = 65_536
    assert stated(MAP) == [
        "141 GB", "4.8 TB/s", "2", "50 MB", "132", "228 KB", "256 KB", "1", "32",
        f"{registers * 4 // 1024} KB", f"{registers:,}", "4", "200", "16",
    ]  # fmt: skip
    for element, value in said(MAP, "number"):
        assert words(element) == value


def test_bars_are_as_long_as_they_say() -> None:
    wanted = {"Global memory": 141e9, "L2": 50 * 2**20, "Shared memory": 228 * 2**10}
    wanted["Registers"] = 65_536 * 4
    bars = list(said(MAP, "bytes"))
    heads = [words(one) for one in MAP.iter() if one.tag.endswith("text")]
    assert [name for name in heads if name in wanted] == [*wanted]
    for (bar, size), number in zip(bars, wanted.values(), strict=True):
        assert float(size) == number
        width = NOTCH * math.log(number) / math.log(16)
        assert float(bar.attrib["width"]) == pytest.approx(width, abs=0.06)
    paths = [one.get("d", "") for one in MAP.iter() if "v5" in one.get("d", "")]
    for path, number in zip(paths, wanted.values(), strict=True):
        assert path.count("M") == int(math.log(number) / math.log(16))


def test_a_warp_has_32_lanes() -> None:
    assert len(list(said(MAP, "lane"))) == 32
    for what in ("block", "warp", "lane"):  # and one of each is looked into
        lit = [one for one, _ in said(MAP, what) if "lit," in one.attrib["stroke"]]
        assert len(lit) == 1


# --- 32 addresses ---------------------------------------------------------------------


def strided(x, stride):
    x[stride * cuda.threadIdx.x]


def column(pitch):
    tile = cuda.shared.array((32, pitch), np.float32)
    t = cuda.threadIdx.x
    tile[t, 5] = 0


def heading(about: str) -> list[int]:
    """The numbers in a line of the drawing."""
    (line,) = [words(e) for e in MEMORY.iter() if about in words(e) and len(e)
               and e.tag.endswith("text")]  # fmt: skip
    return [int(n) for n in re.findall(r"\d+", line)]


@pytest.mark.parametrize(
    ("stride", "about"), [(1, "reads word n"), (2, "reads word 2n"), (32, "word 32n")]
)
def test_sectors_are_those_of_the_simulator(stride: int, about: str) -> None:
    x = np.zeros(1024, np.float32)
    (access,) = launch(strided, 1, 32, x, stride, count=True).accesses
    assert heading(about)[-1] == access.sectors
    drawn = [one for one, s in said(MEMORY, "stride") if int(s) == stride]
    read = [stride * lane for lane in range(32) if stride * lane < 64]
    moved = {word // 8 for word in read}
    assert len(drawn) == 8
    for sector, one in enumerate(drawn):
        assert int(one.attrib["data-sector"]) == sector
        assert (one.attrib["data-moved"] == "1") == (sector in moved)
        assert ("lit," in one.attrib["stroke"]) == (sector in moved)
    pairs = [value.split() for _, value in said(MEMORY, "word")]
    assert [int(word) for of, word in pairs if int(of) == stride] == read
    if stride == 32:
        assert heading("outside the picture") == [access.sectors - len(moved)]
        assert access.efficiency == 1 / 8


@pytest.mark.parametrize(("pitch", "about"), [(32, "A tile with"), (33, "Rows of 33")])
def test_banks_are_those_of_the_simulator(pitch: int, about: str) -> None:
    (access,) = launch(column, 1, 32, pitch, count=True).accesses
    assert heading(about)[0] == pitch and heading(about)[-1] == access.passes
    drawn = [one for one, p in said(MEMORY, "pitch") if int(p) == pitch]
    for row, one in enumerate(drawn):
        assert int(one.attrib["data-row"]) == row
        bank = (pitch * row + 5) % 32
        assert int(one.attrib["data-bank"]) == bank
        assert float(one.attrib["x"]) == 10 + 12.5 * bank
    assert len(drawn) == 8
