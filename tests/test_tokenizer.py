"""Text to ids and back: bytes, and a byte-level BPE that is trained here."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minidsv3 import checkpoints, corpus, parameters, tokenizer
from minidsv3.__main__ import main
from minidsv3.config import TINY
from minidsv3.corpus import load_corpus
from minidsv3.generation.numpy_ref import generate
from minidsv3.model.numpy_ref import forward
from minidsv3.tokenizer import TokenizerError, load_tokenizer

START, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXT = "".join(f"line {i}: naïve café, übermäßig 日本語 🙂\n" for i in range(40))


def save_bpe(folder: Path, vocab_size: int = 300, **settings: object) -> None:
    """A small tokenizer of DeepSeek's kind, with its settings if there are any."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[START, END], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([TEXT], trainer)
    bpe.add_tokens(["<think>"])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / tokenizer.FILE))
    if settings:
        (folder / tokenizer.SETTINGS).write_text(json.dumps(settings))


@pytest.fixture
def bpe(tmp_path) -> tokenizer.Tokenizer:
    save_bpe(tmp_path)
    return load_tokenizer(tmp_path)


# --- bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [None, Path(__file__).parent])
def test_without_a_file_it_is_bytes(folder) -> None:
    ours = load_tokenizer(folder)
    ids = ours.encode("naïve")
    assert ids.tolist() == list("naïve".encode()) and ids.dtype == np.int64
    assert ours.decode([*ids, 256, 65]) == "naïveA".encode()
    assert (ours.start, ours.size) == (corpus.BOUNDARY, corpus.VOCAB_SIZE)
    assert ours.decode(ids[:3]) == b"na\xc3"  # half a character


def test_bytes_need_257_rows(tmp_path) -> None:
    assert load_tokenizer(tmp_path, 257).size == 257
    with pytest.raises(TokenizerError) as refusal:
        load_tokenizer(tmp_path, 256)
    for word in (str(tmp_path), "no tokenizer.json", "257 rows", "vocab_size is 256"):
        assert word in str(refusal.value)


# --- a file ---------------------------------------------------------------------------


def test_a_file_is_read_by_its_library(tmp_path, bpe) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / tokenizer.FILE))
    ids = bpe.encode(TEXT)
    assert ids.dtype == np.int64 and ids.tolist() == theirs.encode(TEXT).ids
    assert len(ids) < len(TEXT.encode()) / 2
    assert bpe.decode(ids) == TEXT.encode() == theirs.decode(ids.tolist()).encode()
    assert bpe.size == 301  # the word that was added comes last


@given(st.text())
def test_any_text_comes_back(tmp_path_factory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "bpe"
    if not folder.exists():
        save_bpe(folder)
    bpe = load_tokenizer(folder)
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text.replace(START, "").replace(END, "").encode()
    pieces = [bpe.decode([i]) for i in ids.tolist()]
    assert b"".join(pieces) == bpe.decode(ids)


def test_half_a_surrogate_is_no_text(bpe) -> None:
    for ours in (bpe, load_tokenizer(None)):
        with pytest.raises(UnicodeEncodeError):
            ours.encode("\udcff")


def test_half_a_character_is_half_its_bytes(bpe) -> None:
    ids = bpe.encode("€")
    assert len(ids) == 3  # not in the text that it was trained on
    assert [bpe.decode([i]) for i in ids] == [b"\xe2", b"\x82", b"\xac"]


def test_special_tokens_have_no_bytes_and_added_words_have(bpe) -> None:
    ids = bpe.encode(f"{START}a<think>b{END}")
    assert ids[0] == 0 and ids[-1] == 1 and 300 in ids
    assert bpe.decode(ids) == b"a<think>b"
    assert bpe.decode([100_000]) == b""  # rows of the embedding without a token


def test_the_table_of_letters_is_the_librarys() -> None:
    assert set(tokenizer.ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(tokenizer.ALPHABET.values()) == list(range(256))
    for text in ("a b\n\t\x00\x7f", "é€🙂", "\xad\xa0ÿ"):
        [(letters, _)] = pre_tokenizers.ByteLevel(
            False, use_regex=False
        ).pre_tokenize_str(text)
        assert bytes(tokenizer.ALPHABET[x] for x in letters) == text.encode()


@pytest.mark.parametrize("token", [START, {"content": START, "lstrip": False}])
def test_the_settings_name_the_start(tmp_path, token) -> None:
    save_bpe(tmp_path, bos_token=token)
    ours = load_tokenizer(tmp_path)
    assert ours.start == 0 and ours.encode("a")[0] != 0
    save_bpe(tmp_path, bos_token=token, add_bos_token=True)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("a")[0] == 0 and len(ours.encode("a")) == 2
    assert ours.encode(f"{START}a").tolist() == ours.encode("a").tolist()
    assert ours.encode("").tolist() == [0]


def test_no_start_is_no_start(tmp_path, bpe) -> None:
    assert bpe.start is None
    save_bpe(tmp_path, bos_token=None, add_bos_token=True)
    assert load_tokenizer(tmp_path).start is None
    assert load_tokenizer(tmp_path).encode("").tolist() == []


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path, bpe) -> None:
    assert load_tokenizer(tmp_path, bpe.size).size == bpe.size
    with pytest.raises(TokenizerError) as refusal:
        load_tokenizer(tmp_path, bpe.size - 1)
    for word in ("tokenizer.json needs 301", "vocab_size is 300"):
        assert word in str(refusal.value)


def unigram() -> str:
    pieces = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], 0))
    pieces.decoder = decoders.Metaspace()
    return pieces.to_str()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (tokenizer.FILE, "{", "no readable tokenizer"),
        (tokenizer.FILE, "[]", "no readable tokenizer"),
        (tokenizer.FILE, unigram(), "decoder ByteLevel"),
        (tokenizer.SETTINGS, "{", "cannot be read as JSON"),
        (tokenizer.SETTINGS, "[]", "cannot be read as JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, message) -> None:
    save_bpe(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=message) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path / file) in str(refusal.value)


# --- documents ------------------------------------------------------------------------


def corpus_tokens(*documents: str) -> np.ndarray:
    pieces = [[256]]
    for document in documents:
        pieces += [corpus.encode(document), [256]]
    return np.concatenate(pieces).astype(np.uint16)


def test_documents_are_translated_one_by_one(tmp_path, bpe) -> None:
    tokens = corpus_tokens("one café", "two", "three 日本")
    words = ["one café", "two", "three 日本"]
    assert tokenizer.translated(tokens, load_tokenizer(None)) is tokens
    ids = tokenizer.translated(tokens, bpe)
    assert ids.tolist() == [i for word in words for i in bpe.encode(word)]
    for settings in ({}, {"add_bos_token": True}):
        save_bpe(tmp_path, bos_token=START, **settings)
        starting = tokenizer.translated(tokens, load_tokenizer(tmp_path))
        expected = [i for word in words for i in (0, *bpe.encode(word))] + [0]
        assert starting.tolist() == expected


# --- the command line -----------------------------------------------------------------


def model(folder: Path, vocab_size: int = 301, **settings: object):
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    params = parameters.initialise(config, 0, 0.3)
    checkpoints.save(folder, config, params)
    save_bpe(folder, **settings)
    return config, params


def test_generate_speaks_the_models_language(tmp_path, capfdbinary) -> None:
    config, params = model(tmp_path, bos_token=START)
    bpe = load_tokenizer(tmp_path)
    for prompt, ids in (("café", bpe.encode("café")), ("", np.array([0]))):
        asked = ["--prompt", prompt, "--max-new-tokens", "12", "--temperature", "0"]
        for drafting in ([], ["--no-speculative"]):
            assert main(["generate", "--model", str(tmp_path), *asked, *drafting]) == 0
            new = generate(params, config, ids[None], 12)[0]
            written = capfdbinary.readouterr().out
            assert written == prompt.encode() + bpe.decode(new) + b"\n"


def test_no_prompt_and_no_start(tmp_path, capsys) -> None:
    model(tmp_path)
    assert main(["generate", "--model", str(tmp_path)]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_tokenizer_that_does_not_fit(tmp_path, capsys, command: str) -> None:
    model(tmp_path, vocab_size=290)
    assert main([command, "--model", str(tmp_path)]) == 2
    assert "needs 301 rows" in capsys.readouterr().err


def test_evaluate_counts_bytes_not_tokens(tmp_path, capsys) -> None:
    """Bits by a plain sum over all tokens, divided by the bytes of the text."""
    config, params = model(tmp_path / "run", bos_token=START)
    (tmp_path / "text.txt").write_text(TEXT)
    text = load_corpus(tmp_path / "text.txt")
    bpe = load_tokenizer(tmp_path / "run")
    ids = tokenizer.translated(text.held_out, bpe)
    assert bpe.decode(ids) == corpus.decode(text.held_out).encode()
    bits = 0.0
    for i in range(0, len(ids) - 1, 32):
        window = ids[i : i + 33]
        z = forward(params, config, window[None, :-1])[0][0].astype(np.float64)
        z -= z.max(axis=-1, keepdims=True)
        law = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        bits -= law[np.arange(len(window) - 1), window[1:]].sum() / np.log(2)
    bits /= len(corpus.decode(text.held_out).encode())
    asked = ["--text", str(tmp_path / "text.txt"), "--sequence-length", "32"]
    assert main(["evaluate", "--model", str(tmp_path / "run"), *asked]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{bits:.4f} bits per byte on {len(ids)} held-out tokens")
