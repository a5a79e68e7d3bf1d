"""What the command line can say: its options, and the configs they ask for."""

import argparse
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

from minidsv3 import config, corpus
from minidsv3.shipped import MINI_FOLDER

DESCRIPTION = "The command line: python -m minidsv3 train | generate | evaluate."

PRESETS = {"plain": config.PLAIN, "tiny": config.TINY, "mini": config.MINI}

RECIPE = {  # options of `train` that are fields of TrainConfig
    "steps": "optimiser steps",
    "batch_size": "sequences a step",
    "sequence_length": "tokens a sequence",
    "learning_rate": "peak learning rate",
    "min_learning_rate": "learning rate of the last step",
    "warmup_steps": "steps of linear warm-up",
    "precision": "float32 or bfloat16, of matrix products",
    "accumulate": "parts that a batch is worked off in",
    "seed": "seed of weights and batches",
}


class BadOption(ValueError):
    """A command-line value that cannot be used."""


def configs(options: argparse.Namespace) -> tuple[config.Config, config.TrainConfig]:
    """The preset and the default recipe with the options' changes, validated."""
    model, recipe = PRESETS[options.preset], config.TrainConfig()
    sizes: dict[str, Any] = {}
    if options.mtp is not None:
        sizes["num_nextn_predict_layers"] = options.mtp
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
    recipe = replace(recipe, **_fitting(recipe, model, changes), **changes)
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
    modules = model.num_nextn_predict_layers
    if recipe.sequence_length < modules + 1:
        raise BadOption(
            f"--sequence-length {recipe.sequence_length} leaves MTP module {modules} "
            f"nothing to predict; it needs {modules + 1} at least"
        )
    return model, recipe


def _fitting(
    recipe: config.TrainConfig, model: config.Config, changes: dict[str, Any]
) -> dict[str, Any]:
    """Defaults that a short run, a low rate or a short context contradicts: fitted."""
    limits = {
        "warmup_steps": changes.get("steps"),
        "min_learning_rate": changes.get("learning_rate"),
        "sequence_length": model.max_position_embeddings,
    }
    return {
        name: min(getattr(recipe, name), limit)
        for name, limit in limits.items()
        if name not in changes and isinstance(limit, int | float)
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


def parser() -> argparse.ArgumentParser:
    """The commands and their options; ``command`` is the name of the one chosen."""
    whole = argparse.ArgumentParser(prog="minidsv3", description=DESCRIPTION)
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")

    _add_train(commands.add_parser("train", help="train a model on text"))
    _add_generate(commands.add_parser("generate", help="continue a text"))
    judge = commands.add_parser("evaluate", help="bits per byte on held-out text")
    _add_evaluate(judge)
    return whole


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--out", required=True, help="folder of the run")
    _text_option(train)
    train.add_argument(
        "--preset", choices=sorted(PRESETS), default="plain",
        help="the model to start from (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--mtp", type=_whole, metavar="D",
        help="modules for multi-token prediction (default: the preset's)",
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
    train.add_argument(
        "--evaluate-every", type=_positive, metavar="STEPS",
        help="measure on held-out text this often (default: once, at the end)",
    )  # fmt: skip
    train.add_argument(
        "--backend", choices=["numpy", "torch"],
        default="torch" if find_spec("torch") else "numpy",
        help="what computes (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--device", metavar="NAME",
        help="where torch computes: cpu, cuda, mps (default: a GPU if there is one)",
    )  # fmt: skip
    train.add_argument(
        "--tensorboard", action="store_true",
        help="write curves for TensorBoard into --out, too (pip install tensorboard)",
    )  # fmt: skip


def _add_generate(generate: argparse.ArgumentParser) -> None:
    _model_option(generate)
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument(
        "--seed", type=_whole, metavar="N", help="the same seed, the same text"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be repeated",
    )  # fmt: skip
    generate.add_argument(
        "--no-speculative", action="store_true",
        help="do not let the MTP module draft, if the model has one",
    )  # fmt: skip


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    _model_option(evaluate)
    _text_option(evaluate)
    evaluate.add_argument(
        "--sequence-length", type=_positive, metavar="N",
        help="bytes of a window (default: as the model was trained)",
    )  # fmt: skip


def _text_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", metavar="PATH",
        help="a text file or a folder (default: the sources of Python's library)",
    )  # fmt: skip


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", default=str(MINI_FOLDER),
        help="folder of a model (default: the trained MINI that comes with this)",
    )  # fmt: skip


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a positive whole number")
    return int(text)
