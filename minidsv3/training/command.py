"""``python -m minidsv3 train``: a run from its options to its last line of output."""

import argparse
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from minidsv3 import config, corpus, parameters
from minidsv3.options import BadOption, configs
from minidsv3.training import numpy_ref, run_folder
from minidsv3.training.numpy_ref import StepRecord, TrainState


class Run(NamedTuple):
    """What a run is made of."""

    config: config.Config
    recipe: config.TrainConfig
    text: corpus.Corpus
    out: Path
    backend: str


def run(options: argparse.Namespace, text: corpus.Corpus) -> int:
    """Train as the options say; 0, or 1 if Ctrl-C stopped it between two steps."""
    this = Run(*configs(options), text, Path(options.out), options.backend)
    _check(this, options)
    folder, recipe = this.out, this.recipe
    if options.resume:
        start = run_folder.resume(
            folder, this.config, recipe, text.sha256, this.backend
        )
    else:
        params = parameters.initialise(this.config, recipe.seed, recipe.init_std)
        start = numpy_ref.new_state(params)
    state, train, evaluate = _on_backend(this, start, options.device)
    print(
        f"{parameters.count(this.config):,} parameters, {len(text.train):,} training "
        f"tokens, steps {state.step} to {recipe.steps}"
    )
    finished = _loop(this, state, train, evaluate, options)
    if not finished:
        print(f"stopped after step {state.step}; continue with the same command and "
              "--resume")  # fmt: skip
        return 1
    print("held-out text:", end=" ", flush=True)  # this takes a while
    print(f"{evaluate():.4f} bits per byte; the model is in {folder}")
    return 0


def _check(this: Run, options: argparse.Namespace) -> None:
    """Raise BadOption for what can be known before anything is computed."""
    if options.tensorboard:
        _summary_writer()
    out, needed = this.out, this.recipe.sequence_length + 1
    if out.exists() and not out.is_dir():
        raise BadOption(f"--out {out}: is a file, name a folder")
    if run_folder.is_used(out) and not options.resume:
        raise BadOption(
            f"{out} holds a run already, or a model; add --resume to continue a run, "
            "or name another folder"
        )
    if len(this.text.train) < needed:
        raise BadOption(
            f"the text has {len(this.text.train)} tokens to train on, one sequence "
            f"takes {needed}; give more text or a smaller --sequence-length"
        )
    if this.backend == "numpy":
        for field, only in (("precision", "float32"), ("accumulate", 1)):
            if (value := getattr(this.recipe, field)) != only:
                raise BadOption(
                    f"--{field} {value}: --backend numpy has {only} only; "
                    "take --backend torch"
                )
        if options.device not in (None, "cpu"):
            raise BadOption(
                f"--device {options.device}: --backend numpy computes on the cpu; "
                "take --backend torch"
            )


def _on_backend(this: Run, start: TrainState, device: str | None) -> tuple:
    """The state, its training loop and its evaluation, for NumPy or PyTorch."""
    length, held_out = this.recipe.sequence_length, this.text.held_out
    if this.backend == "numpy":
        return (
            start,
            numpy_ref.train,
            lambda: numpy_ref.evaluate(start.params, this.config, held_out, length),
        )
    from minidsv3.training import processor, torch_port

    try:
        device = torch_port.chosen_device(device)
    except ValueError as error:
        raise BadOption(f"--device {device}: {error}") from error
    processor.keep_freed_memory()
    processor.float32_through_onednn()
    state = torch_port.TrainState(this.config, this.recipe, start, device)
    return (
        state,
        torch_port.train,
        lambda: torch_port.evaluate(
            state.model, held_out, length, precision=this.recipe.precision
        ),
    )


def _loop(
    this: Run, state: Any, train: Any, evaluate: Any, options: argparse.Namespace
) -> bool:
    """Train with a progress bar; True if it reached the end, False after Ctrl-C."""
    from tqdm import tqdm

    recipe, out = this.recipe, this.out
    every = options.evaluate_every

    def save() -> None:
        run_folder.save(out, state, this.config, recipe, this.text.sha256, this.backend)

    save()
    write_curves = _curves(out, state.step) if options.tensorboard else None
    progress = tqdm(total=recipe.steps, initial=state.step, unit="step")
    with progress, _ctrl_c_finishes_the_step() as asked:
        for record in train(state, this.config, recipe, this.text.train):
            bits = evaluate() if every and record.step % every == 0 else None
            run_folder.append_log(out, record)
            if bits is not None:
                run_folder.append_held_out(out, record.step, bits)
            if write_curves:
                write_curves(record, bits)
            progress.set_postfix_str(_in_bits(record.losses, bits))
            progress.update()
            if asked.stop:
                break
            if record.step % options.save_every == 0 and record.step < recipe.steps:
                save()
    save()
    return not asked.stop


def _curves(out: Path, step: int) -> Any:
    """A function that adds a step to the curves TensorBoard shows."""
    writer = _summary_writer()(str(out / "tensorboard"), purge_step=step + 1)

    def write(record: StepRecord, bits: float | None) -> None:
        numbers = {f"loss/{name}": loss for name, loss in record.losses.items()}
        numbers |= {"rate": record.learning_rate, "gradient norm": record.grad_norm}
        if bits is not None:
            numbers["held-out bits per byte"] = bits
        for name, number in numbers.items():
            writer.add_scalar(name, number, record.step)
        writer.flush()

    return write


def _summary_writer() -> Any:
    """TensorBoard's class. Raises BadOption where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadOption(
            f"--tensorboard: {error}; install it with: pip install tensorboard"
        ) from error
    return SummaryWriter


def _in_bits(losses: dict[str, float], held_out: float | None) -> str:
    """The main loss, and behind it those of the MTP modules; balance is no bits."""
    said = [f"{losses['main'] / math.log(2):.3f} bits per byte"]
    modules = (name for name in losses if name.startswith("mtp_"))
    said += [f"{name} {losses[name] / math.log(2):.3f}" for name in modules]
    said += [f"balance {losses[name]:.2f}" for name in losses if name == "balance"]
    said += [f"held-out {held_out:.3f}"] if held_out is not None else []
    return ", ".join(said)


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
