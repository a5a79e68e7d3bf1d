"""The command line: ``python -m minidsv3 train | generate | evaluate``."""

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from minidsv3 import checkpoints, config, corpus, parameters
from minidsv3.options import BadOption, parser
from minidsv3.tokenizer import Tokenizer, TokenizerError, load_tokenizer, translated


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after Ctrl-C, 2 for bad input."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\nminidsv3 {options.command}: interrupted", file=sys.stderr)
        return 1
    except (
        checkpoints.CheckpointError,
        config.ConfigError,
        corpus.CorpusError,
        parameters.ParameterError,
        BadOption,
        TokenizerError,
        FloatingPointError,
        MemoryError,
        NotImplementedError,
        OSError,
    ) as error:
        print(f"minidsv3 {options.command}: {error}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace) -> int:
    from minidsv3.training import command

    return command.run(options, _text(options))


def _text(options: argparse.Namespace) -> corpus.Corpus:
    """The text of --text; says which files were passed over."""
    if options.text == "":
        raise BadOption("--text is empty: name a text file or a folder")
    text = corpus.load_corpus(options.text)
    if text.files_skipped:
        some = ", ".join(text.files_skipped[:3])
        print(f"{len(text.files_skipped)} files are no UTF-8 text: {some} …")
    return text


def _generate(options: argparse.Namespace) -> int:
    _check_wishes(options)
    model, params, tokenizer = _load(options.model)
    longest = model.max_position_embeddings
    prompt = _prompt(options.prompt, tokenizer)
    if len(prompt) > longest:
        raise BadOption(
            f"--prompt has {len(prompt)} tokens, this model reads at most {longest}"
        )
    room = longest - len(prompt) + 1  # the last token is not read again
    if not 1 <= options.max_new_tokens <= room:
        raise BadOption(
            f"--max-new-tokens {options.max_new_tokens}: with a prompt of "
            f"{len(prompt)} tokens this model has room for 1 to {room}"
        )
    _write(tokenizer.decode(prompt))
    _write_stream(options, (params, model), prompt, tokenizer)
    return 0


def _check_wishes(options: argparse.Namespace) -> None:
    """What can be refused before a model is read."""
    from minidsv3.generation.numpy_ref import check_sampling
    from minidsv3.generation.stopping import StopStrings

    try:
        check_sampling(options.temperature, options.top_p)
        StopStrings(options.stop)
    except UnicodeEncodeError as error:
        raise BadOption(f"--stop is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise BadOption(str(error)) from error


def _prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a prompt; without one, the id that begins a document."""
    try:
        ids = tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise BadOption(f"--prompt is not UTF-8 text: {error}") from error
    if ids.size:
        return ids
    if tokenizer.start is None:
        raise BadOption(
            "--prompt is empty, and the tokenizer names no token that begins a "
            "document; give some text"
        )
    return np.array([tokenizer.start])


def _write_stream(
    options: argparse.Namespace, model: tuple, prompt: np.ndarray, tokenizer: Tokenizer
) -> None:
    """The text as it comes, and on stderr what became of the drafts."""
    from minidsv3.generation import stream
    from minidsv3.generation.stopping import StopStrings

    drafting = model[1].num_nextn_predict_layers > 0 and not options.no_speculative
    shown = StopStrings(options.stop)
    for step in stream(
        model, prompt[None], options.max_new_tokens, options.temperature,
        options.top_p, drafting, options.seed, stop=options.stop, tokenizer=tokenizer,
    ):  # fmt: skip
        for token in step.tokens[0]:
            _write(shown.feed(tokenizer.decode([token])))
        counts = step.statistics
    _write(shown.rest())
    print()
    if counts.drafts:
        print(
            f"{counts.accepted} of {counts.drafts} drafts kept "
            f"({counts.acceptance:.0%}), {counts.tokens_per_pass:.2f} tokens a pass of "
            "the trunk",
            file=sys.stderr,
        )


def _load(folder: str) -> tuple[config.Config, dict[str, np.ndarray], Tokenizer]:
    """The model in a folder; what is remarkable about its file goes to stderr."""
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always", checkpoints.CheckpointNotice)
        model, params = checkpoints.load(folder)
    for notice in notices:
        print(f"minidsv3: {notice.message}", file=sys.stderr)
    return model, params, load_tokenizer(folder, model.vocab_size)


def _write(some: bytes) -> None:
    """Print raw bytes: a character may be spread over several tokens."""
    if not hasattr(sys.stdout, "buffer"):  # a notebook's takes text only
        sys.stdout.write(some.decode(errors="replace"))
        return
    sys.stdout.buffer.write(some)
    sys.stdout.buffer.flush()


def _evaluate(options: argparse.Namespace) -> int:
    from minidsv3.training import run_folder
    from minidsv3.training.numpy_ref import evaluate

    model, params, tokenizer = _load(options.model)
    trained_length, trained_text = run_folder.identity(Path(options.model))
    length = options.sequence_length or trained_length or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise BadOption(
            f"--sequence-length {length}: must be 1 to {model.max_position_embeddings}"
        )
    text = _text(options)
    tokens, which = text.held_out, "held-out tokens"
    if trained_text not in (None, text.sha256):  # another text: nothing is held out
        tokens = np.append(text.train[:-1], text.held_out)
        which = "tokens of another text"
    n_bytes = int(np.count_nonzero(tokens[1:] != corpus.BOUNDARY))
    ids = translated(tokens, tokenizer)
    bits = evaluate(params, model, ids, length, n_bytes=n_bytes)
    print(f"{bits:.4f} bits per byte on {len(ids):,} {which}, windows of {length}")
    return 0


COMMANDS = {"train": _train, "generate": _generate, "evaluate": _evaluate}


if __name__ == "__main__":
    sys.exit(main())
