"""The corpus: what is read, how it is split, what a batch is, and what is refused."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3 import corpus as module
from minidsv3.corpus import (
    BOUNDARY,
    VOCAB_SIZE,
    Corpus,
    CorpusError,
    batch,
    decode,
    encode,
    load_corpus,
)


@pytest.fixture(scope="module")
def library() -> Corpus:
    return load_corpus()


def documents(tokens: np.ndarray) -> list[bytes]:
    """Cut at the boundaries, in plain Python."""
    found, current = [], bytearray()
    for token in tokens.tolist():
        if token == BOUNDARY:
            found.append(bytes(current))
            current.clear()
        else:
            current.append(token)
    assert not current, "the last document ends with a boundary"
    assert found[0] == b"", "the first document begins with a boundary"
    return found[1:]


def folder_of(root: Path, texts: dict[str, str | bytes]) -> Path:
    for name, text in texts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def story(seed: int, lines: int = 30) -> str:
    """Text that shares no line with another seed's."""
    words = np.random.default_rng(seed).integers(0, 10**9, size=(lines, 4))
    return "\n".join(" ".join(map(str, row)) for row in words) + "\n"


# --- the standard library ---------------------------------------------------------


def test_the_library_is_some_megabytes_of_python(library) -> None:
    total = len(library.train) + len(library.held_out)
    assert 6e6 < total < 12e6
    assert 0.06 < len(library.held_out) / total < 0.14
    assert "argparse.py" in library.files_train + library.files_held_out
    assert "topics/for" in library.files_train + library.files_held_out
    assert library.name.startswith("standard library of Python 3.")
    for tokens in (library.train, library.held_out):
        assert tokens.dtype == np.uint16
        assert tokens.ndim == 1
        assert tokens.max() == BOUNDARY
        assert not tokens.flags.writeable


def test_every_module_of_the_list_is_there_and_nothing_else(library) -> None:
    files = library.files_train + library.files_held_out
    tops = {name.split("/")[0].removesuffix(".py") for name in files}
    assert tops == {*module.STANDARD_LIBRARY.split(), "topics"}
    unwanted = {"test", "tests", "idlelib", "lib2to3", "encodings", "distutils"}
    assert not [name for name in files if unwanted & set(name.split("/"))]
    assert not {"html/entities.py", "pydoc_data/topics.py", "token.py"} & set(files)


def test_the_library_is_mostly_readable_python(library) -> None:
    for name, text in zip(
        library.files_held_out, documents(library.held_out), strict=True
    ):
        if name.endswith(".py"):
            ast.parse(text)
        assert b"\r" not in text


def test_no_file_is_on_both_sides(library) -> None:
    train, held = set(library.files_train), set(library.files_held_out)
    assert len(train) == len(library.files_train)
    assert not train & held
    assert len(documents(library.train)) == len(train)
    assert all(text.strip() for text in documents(library.train))
    # bz2 and lzma have most of their lines in common, and so have profile and cProfile.
    for a, b in [("bz2.py", "lzma.py"), ("profile.py", "cProfile.py")]:
        assert (a in train) == (b in train), (a, b)


def test_held_out_text_is_not_in_the_training_text(library) -> None:
    """At most half of a held-out document's telling lines stand in a training one."""

    def telling(text: bytes) -> set[bytes]:
        return {line.strip() for line in text.split(b"\n") if len(line.strip()) >= 20}

    train = [telling(text) for text in documents(library.train)]
    for name, text in zip(
        library.files_held_out, documents(library.held_out), strict=True
    ):
        own = telling(text)
        if len(own) >= 10:
            worst = max(len(own & other) for other in train) / len(own)
            assert worst < 0.5, name


def test_two_processes_agree(library) -> None:
    code = (
        "from minidsv3.corpus import *\n"
        "c = load_corpus()\n"
        "print(c.sha256, *c.files_held_out, batch(c.train, 3, 5, 7, 11).tolist())"
    )
    root = Path(module.__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "42", "PYTHONPATH": str(root)}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ours = batch(library.train, 3, 5, 7, 11).tolist()
    assert answer.split("\n")[0] == " ".join(
        [library.sha256, *library.files_held_out, str(ours)]
    )


def test_loading_is_quick() -> None:
    start = time.perf_counter()
    load_corpus()
    assert time.perf_counter() - start < 15  # takes 0.3 s; this is only against hanging


# --- files and folders ------------------------------------------------------------


def test_a_folder_is_split_by_file(tmp_path) -> None:
    texts = {f"part{i // 10}/{i:02}.txt": story(i) for i in range(60)}
    corpus = load_corpus(folder_of(tmp_path / "book", texts), held_out=0.2)
    assert corpus.name == "book"
    files = corpus.files_train + corpus.files_held_out
    assert sorted(files) == sorted(texts)
    assert 4 <= len(corpus.files_held_out) <= 20
    for names, tokens in (
        (corpus.files_train, corpus.train),
        (corpus.files_held_out, corpus.held_out),
    ):
        assert documents(tokens) == [texts[name].encode() for name in names]


def test_the_split_depends_on_names_not_on_the_machine(tmp_path) -> None:
    texts = {f"{i}.txt": story(i) for i in range(40)}
    here = load_corpus(folder_of(tmp_path / "here", texts))
    there = load_corpus(folder_of(tmp_path / "some" / "where", texts))
    assert here.sha256 == there.sha256
    assert here.files_held_out == there.files_held_out
    more = load_corpus(folder_of(tmp_path / "more", {**texts, "new.txt": story(99)}))
    assert set(here.files_held_out) <= set(more.files_held_out)
    assert more.sha256 != here.sha256


def test_the_hash_names_text_and_split(tmp_path) -> None:
    texts = {f"{i}.txt": story(i) for i in range(40)}
    folder = folder_of(tmp_path, texts)
    first = load_corpus(folder).sha256
    assert load_corpus(folder, held_out=0.5).sha256 != first
    folder_of(tmp_path, {"7.txt": texts["7.txt"] + "x"})
    assert load_corpus(folder).sha256 != first


def test_line_ends_do_not_matter(tmp_path) -> None:
    texts = {f"{i}.txt": story(i) for i in range(9)}
    unix = load_corpus(folder_of(tmp_path / "unix", texts))
    dos = {name: text.replace("\n", "\r\n") for name, text in texts.items()}
    assert load_corpus(folder_of(tmp_path / "dos", dos)).sha256 == unix.sha256


@pytest.mark.parametrize("copies", [2, 12])
def test_near_duplicates_stay_together(tmp_path, copies) -> None:
    texts = {f"{i}.txt": story(i) for i in range(30)}
    originals = story(100, lines=40).splitlines()
    for i in range(copies):  # the same, with another indentation and a part rewritten
        lines = [f"{' ' * i}{line}" for line in originals[: 36 - i]]
        texts[f"copy{i}.txt"] = "\n".join(lines) + "\n" + story(200 + i, lines=9)
    corpus = load_corpus(folder_of(tmp_path, texts), held_out=0.5)
    sides = {name in corpus.files_train for name in texts if name.startswith("copy")}
    assert len(sides) == 1


def test_short_copies_stay_together_too(tmp_path) -> None:
    texts = {f"{i}.txt": story(i) for i in range(9)}
    texts |= {f"short{i}.txt": "a = 1\n" + " " * i + "b = 2\n" for i in range(12)}
    corpus = load_corpus(folder_of(tmp_path, texts), held_out=0.5)
    assert len({n in corpus.files_train for n in texts if n.startswith("short")}) == 1


def test_a_shared_licence_makes_no_family() -> None:
    licence = "".join(f"licence line {i}, said at some length\n" for i in range(25))
    texts = {f"{i:02}.txt": (licence + story(i)).encode() for i in range(40)}
    assert len(module._families(texts)) == 40


def test_half_the_lines_make_a_family_and_short_lines_do_not_count() -> None:
    lines = story(0, lines=60).splitlines(keepends=True)
    common = "".join(f"x{i} = {i}\n" for i in range(99))
    half = {"a": "".join(lines[:40]), "b": "".join(lines[20:])}
    less = {"a": "".join(lines[:39]), "b": common + "".join(lines[20:59])}
    for texts, count in ((half, 1), (less, 2)):
        found = module._families({name: text.encode() for name, text in texts.items()})
        assert len(found) == count
    texts = {str(i): (common + story(i)).encode() for i in range(5)}
    assert len(module._families(texts)) == 5


@pytest.mark.parametrize("count", range(2, 9))
def test_with_few_files_each_side_gets_one(tmp_path, count) -> None:
    texts = {f"{i}.txt": story(i) for i in range(count)}
    folder = folder_of(tmp_path, texts)
    for share in (0.001, 0.1, 0.999):
        corpus = load_corpus(folder, held_out=share)
        assert corpus.files_train
        assert corpus.files_held_out
    assert len(load_corpus(folder, held_out=0.001).files_held_out) == 1
    assert len(load_corpus(folder, held_out=0.999).files_train) == 1


def test_hidden_and_empty_files_are_passed_over_and_binary_ones_named(tmp_path) -> None:
    texts = {f"{i}.txt": story(i) for i in range(5)}
    others = {
        ".git/config.txt": story(50),
        "a/.hidden.txt": story(51),
        "empty.txt": b" \n\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\x00\x00",
        "latin.txt": "déjà vu".encode("latin-1"),
    }
    corpus = load_corpus(folder_of(tmp_path, {**texts, **others}))
    assert sorted(corpus.files_train + corpus.files_held_out) == sorted(texts)
    assert corpus.files_skipped == ("latin.txt", "picture.png")


def test_a_single_file_holds_out_its_end(tmp_path) -> None:
    text = story(0, lines=200)
    file = folder_of(tmp_path, {"tale.txt": text}) / "tale.txt"
    for path in (file, str(file), tmp_path):  # a folder with one file is that file
        corpus = load_corpus(path, held_out=0.25)
        [head], [tail] = documents(corpus.train), documents(corpus.held_out)
        assert head + tail == text.encode()
        assert head.endswith(b"\n")
        assert len(tail) / len(text) == pytest.approx(0.25, abs=0.01)
        assert corpus.files_train == ("tale.txt",)
        assert corpus.files_held_out == ("tale.txt (end)",)


def test_a_file_without_line_ends_is_not_cut_inside_a_character(tmp_path) -> None:
    file = tmp_path / "one_line.txt"
    for share in (0.3, 0.305, 0.31, 0.315, 0.32):  # at each byte of a character
        file.write_text("𝛼" * 50, encoding="utf-8")
        corpus = load_corpus(file, held_out=share)
        for [text] in (documents(corpus.train), documents(corpus.held_out)):
            text.decode("utf-8")  # would raise


def test_the_shortest_file_that_can_be_cut(tmp_path) -> None:
    (tmp_path / "x").write_text("ab")
    corpus = load_corpus(tmp_path / "x", held_out=0.9)
    assert (documents(corpus.train), documents(corpus.held_out)) == ([b"a"], [b"b"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "x does not exist: name a text file or a folder"),
        ({"x": b""}, "x is empty: there is nothing to learn from"),
        ({"x": b" \n\t\n"}, "x is empty: there is nothing to learn from"),
        ({"x": b"abc\x00def"}, "x is binary, not text: byte 3 is 0"),
        ({"x": b"abcd\xff"}, "x is not UTF-8 text: byte 4 is 0xff"),
        ({"x": b"a"}, "x is too short to hold out 0.1 of it: it has 1 bytes"),
        (
            {"x": b"\n\n\n\n\n\nb"},
            "x is too short to hold out 0.1 of it: it has 7 bytes",
        ),
        ({"x/.keep": b"text"}, "x has no text in it"),
        ({"x/a": b"", "x/b": b"\x00"}, "x has no text in it"),
        ({"x/a": b"abc\ndef", "x/b": b"abc\n  def"}, "the 2 files are near-duplicates"),
    ],
)
def test_unusable_text_is_refused(tmp_path, texts, message) -> None:
    folder_of(tmp_path, texts)
    with pytest.raises(CorpusError) as refusal:
        load_corpus(tmp_path / "x")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "share", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), True, "0.1", None]
)
def test_a_share_is_between_0_and_1(share) -> None:
    with pytest.raises(CorpusError, match=r"held_out = .* must be between 0 and 1"):
        load_corpus(held_out=share)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    file = folder_of(tmp_path, {"x": "text"}) / "x"
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CorpusError, match="x cannot be read: Permission denied"):
        load_corpus(file)


def test_a_python_without_sources_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CorpusError, match="keeps no sources in"):
        load_corpus()


# --- tokens and batches -----------------------------------------------------------


def test_a_batch_is_windows_of_the_text() -> None:
    tokens = np.arange(1000, dtype=np.uint16)  # a position names itself
    ids = batch(tokens, batch_size=64, length=9, seed=3, step=5)
    assert ids.shape == (64, 10)
    assert ids.dtype == np.int64
    assert (np.diff(ids, axis=1) == 1).all()
    assert len(set(ids[:, 0])) > 50


def test_a_batch_depends_on_its_arguments_alone() -> None:
    tokens = encode(story(1, lines=100))
    first = batch(tokens, 4, 16, seed=1, step=2)
    np.random.seed(0)
    batch(tokens, 4, 16, seed=1, step=3)
    assert (batch(tokens, 4, 16, seed=1, step=2) == first).all()
    assert (batch(tokens, 4, 16, seed=1, step=3) != first).any()
    assert (batch(tokens, 4, 16, seed=2, step=2) != first).any()
    assert (batch(tokens, 4, 16, seed=2, step=1) != first).any()


def test_a_batch_reaches_the_first_and_the_last_token() -> None:
    tokens = np.arange(6, dtype=np.uint16)
    starts = {int(row[0]) for row in batch(tokens, 200, 4, seed=0, step=0)}
    assert starts == {0, 1}
    exact = batch(tokens, 2, 5, seed=0, step=0)
    assert (exact == tokens).all()


def test_a_text_too_short_for_a_window_is_refused() -> None:
    tokens = np.arange(6, dtype=np.uint16)
    with pytest.raises(CorpusError, match="6 tokens, but a window of length 6 needs 7"):
        batch(tokens, 2, 6, seed=0, step=0)


@settings(deadline=None)
@given(st.text())
def test_text_survives_the_ids(text) -> None:
    ids = encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert decode(ids) == text
    assert decode([BOUNDARY, *ids, BOUNDARY]) == text
    assert ids.max(initial=0) < BOUNDARY < VOCAB_SIZE == 257


def test_broken_characters_show_as_such() -> None:
    assert decode([0]) == "\0"
    assert decode([0x61, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"
    assert decode(np.array([], np.int64)) == ""
    assert decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 257, 65536 + 97])
def test_other_ids_are_refused(wrong) -> None:
    with pytest.raises(CorpusError, match=f"id {wrong} is no byte and no boundary"):
        decode([97, wrong])


def test_a_title_and_one_long_line_are_cut_inside_the_line(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("A title\n" + "word " * 1000)
    text = load_corpus(path)
    assert len(text.train) == pytest.approx(9 * len(text.held_out), rel=0.05)
