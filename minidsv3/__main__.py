"""The command line: ``python -m minidsv3 train | generate | evaluate``."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minidsv3 import checkpoints, config, corpus, parameters

PRESETS = {"plain": config.PLAIN}

RECIPE = {  # options of `train` that are fields of TrainConfig
    "steps": "optimiser steps",
    "batch_size": "sequences a step",
    "sequence_length": "tokens a sequence",
    "learning_rate": "peak learning rate",
    "min_learning_rate": "learning rate of the last step",
    "warmup_steps": "steps of linear warm-up",
    "seed": "seed of weights and batches",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after Ctrl-C, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
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
        FloatingPointError,
        MemoryError,
        NotImplementedError,
        OSError,
    ) as error:
        print(f"minidsv3 {options.command}: {error}", file=sys.stderr)
        return 2


class BadOption(ValueError):
    """A command-line value that cannot be used."""


def _train(options: argparse.Namespace) -> int:
    from minidsv3.model.numpy_ref import check_supported
    from minidsv3.training import numpy_ref as training
    from minidsv3.training import run_folder

    model, recipe = _configs(options)
    check_supported(model)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise BadOption(f"--out {out}: is a file, name a folder")
    if run_folder.is_used(out) and not options.resume:
        raise BadOption(
            f"{out} holds a run already, or a model; add --resume to continue a run, "
            "or name another folder"
        )
    text = _text(options)
    needed = recipe.sequence_length + 1
    if len(text.train) < needed:
        raise BadOption(
            f"the text has {len(text.train)} tokens to train on, one sequence takes "
            f"{needed}; give more text or a smaller --sequence-length"
        )
    if options.resume:
        state = run_folder.resume(out, model, recipe, text.sha256)
    else:
        params = parameters.initialise(model, recipe.seed, recipe.init_std)
        state = training.new_state(params)
    print(
        f"{parameters.count(model):,} parameters, {len(text.train):,} training tokens, "
        f"steps {state.step} to {recipe.steps}"
    )
    finished = _training_loop(state, model, recipe, text, out, options.save_every)
    if not finished:
        print(f"stopped after step {state.step}; continue with the same command and "
              "--resume")  # fmt: skip
        return 1
    length = recipe.sequence_length
    bits = training.evaluate(state.params, model, text.held_out, length)
    print(f"held-out text: {bits:.4f} bits per byte; the model is in {out}")
    return 0


def _text(options: argparse.Namespace) -> corpus.Corpus:
    """The text of --text; says which files were passed over."""
    if options.text == "":
        raise BadOption("--text is empty: name a text file or a folder")
    text = corpus.load_corpus(options.text)
    if text.files_skipped:
        some = ", ".join(text.files_skipped[:3])
        print(f"{len(text.files_skipped)} files are no UTF-8 text: {some} …")
    return text


def _training_loop(
    state: Any, model: Any, recipe: Any, text: Any, out: Path, save_every: int
) -> bool:
    """Train with a progress bar; True if it reached the end, False after Ctrl-C."""
    from tqdm import tqdm

    from minidsv3.training import numpy_ref as training
    from minidsv3.training import run_folder

    def save() -> None:
        run_folder.save(out, state, model, recipe, text.sha256)

    save()
    progress = tqdm(total=recipe.steps, initial=state.step, unit="step")
    with progress, _ctrl_c_finishes_the_step() as asked:
        for record in training.train(state, model, recipe, text.train):
            run_folder.append_log(out, record)
            bits = record.losses["main"] / math.log(2)
            progress.set_postfix_str(f"{bits:.3f} bits per byte")
            progress.update()
            if asked.stop:
                break
            if record.step % save_every == 0 and record.step < recipe.steps:
                save()
    save()
    return not asked.stop


@contextmanager
def _ctrl_c_finishes_the_step() -> Iterator[SimpleNamespace]:
    """Turn the first Ctrl-C into a request; a second one interrupts at once.

    An update runs in place, so stopping in its middle would leave half a step.
    """
    asked = SimpleNamespace(stop=False)

    def note(*_: Any) -> None:
        asked.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _generate(options: argparse.Namespace) -> int:
    from minidsv3.generation.numpy_ref import check_sampling, stream

    try:
        check_sampling(options.temperature, options.top_p)
    except ValueError as error:
        raise BadOption(str(error)) from error
    params, model = checkpoints.load(options.model)
    longest = model.max_position_embeddings
    prompt = np.array([corpus.BOUNDARY])  # without a prompt, begin a document
    if options.prompt:
        try:
            prompt = corpus.encode(options.prompt).astype(np.int64)
        except UnicodeEncodeError as error:
            raise BadOption(f"--prompt is not UTF-8 text: {error}") from error
    if len(prompt) > longest:
        raise BadOption(
            f"--prompt has {len(prompt)} bytes, this model reads at most {longest}"
        )
    room = longest - len(prompt) + 1  # the last token is not read again
    if not 1 <= options.max_new_tokens <= room:
        raise BadOption(
            f"--max-new-tokens {options.max_new_tokens}: with a prompt of "
            f"{len(prompt)} tokens this model has room for 1 to {room}"
        )
    _write(prompt)
    new = stream(
        params,
        model,
        prompt[None],
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    )
    for ids in new:
        _write(ids)
    print()
    return 0


def _write(ids: np.ndarray) -> None:
    """Print ids as raw bytes: a character may be spread over several of them."""
    sys.stdout.buffer.write(bytes(i for i in ids.tolist() if i < corpus.BOUNDARY))
    sys.stdout.buffer.flush()


def _evaluate(options: argparse.Namespace) -> int:
    from minidsv3.training import run_folder
    from minidsv3.training.numpy_ref import evaluate

    params, model = checkpoints.load(options.model)
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
    bits = evaluate(params, model, tokens, length)
    print(f"{bits:.4f} bits per byte on {len(tokens):,} {which}, windows of {length}")
    return 0


def _configs(options: argparse.Namespace) -> tuple[config.Config, config.TrainConfig]:
    """The preset and the default recipe with the options' changes, validated."""
    model, recipe = PRESETS[options.preset], config.TrainConfig()
    sizes: dict[str, Any] = {}
    changes = {
        k: getattr(options, k) for k in RECIPE if getattr(options, k) is not None
    }
    for assignment in options.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise BadOption(f"--set {assignment}: write FIELD=VALUE")
        if name in _field_names(model):
            sizes[name] = _literal(value)
        elif name in _field_names(recipe):
            changes[name] = _literal(value)
        else:
            raise BadOption(f"--set {name}: neither Config nor TrainConfig has it")
    # all at once: two changes may be possible only together
    model = replace(model, **sizes)
    recipe = replace(recipe, **_fitting(recipe, changes), **changes)
    if model.vocab_size < corpus.VOCAB_SIZE:
        raise BadOption(
            f"vocab_size = {model.vocab_size}: text needs {corpus.VOCAB_SIZE}, a row "
            "for each byte and one for the boundary"
        )
    if recipe.sequence_length > model.max_position_embeddings:
        raise BadOption(
            f"--sequence-length {recipe.sequence_length} is beyond the model's "
            f"max_position_embeddings {model.max_position_embeddings}"
        )
    return model, recipe


def _fitting(recipe: config.TrainConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Defaults that a short run or a low rate would contradict, made to fit."""
    limits = {"warmup_steps": "steps", "min_learning_rate": "learning_rate"}
    return {
        name: min(getattr(recipe, name), changes[limit])
        for name, limit in limits.items()
        if name not in changes and isinstance(changes.get(limit), int | float)
    }


def _field_names(instance: Any) -> set[str]:
    return {f.name for f in fields(instance)}


def _literal(text: str) -> Any:
    """A Python literal if it is one (12, 1e-3, None), else the text itself."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minidsv3", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train a model on text")
    train.set_defaults(run=_train)
    train.add_argument("--out", required=True, help="folder of the run")
    _text_option(train)
    train.add_argument(
        "--preset", choices=sorted(PRESETS), default="plain",
        help="the model to start from (default: %(default)s)",
    )  # fmt: skip
    defaults = config.TrainConfig()
    for name, meaning in RECIPE.items():
        value = getattr(defaults, name)
        train.add_argument(
            "--" + name.replace("_", "-"), type=type(value), metavar="N",
            help=f"{meaning} (default: {value})",
        )  # fmt: skip
    train.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change any field of Config or TrainConfig; may be repeated",
    )  # fmt: skip
    train.add_argument(
        "--resume", action="store_true", help="continue the run in --out"
    )
    train.add_argument("--save-every", type=_positive, default=100, metavar="STEPS")
    train.add_argument("--backend", choices=["numpy"], default="numpy")

    generate = commands.add_parser("generate", help="continue a text")
    generate.set_defaults(run=_generate)
    _model_option(generate)
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument(
        "--seed", type=_whole, metavar="N", help="the same seed, the same text"
    )

    evaluate = commands.add_parser("evaluate", help="bits per byte on held-out text")
    evaluate.set_defaults(run=_evaluate)
    _model_option(evaluate)
    _text_option(evaluate)
    evaluate.add_argument(
        "--sequence-length", type=_positive, metavar="N",
        help="bytes of a window (default: as the model was trained)",
    )  # fmt: skip
    return parser


def _text_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", metavar="PATH",
        help="a text file or a folder (default: the sources of Python's library)",
    )  # fmt: skip


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that training wrote")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
