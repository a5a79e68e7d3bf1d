"""Saving over a model, killed or failing between any two operations on files.

At every moment a reader finds the old model, the new one, or a refusal; never a
mixture. The moments are made with a real process that dies at the n-th operation.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minidsv3 import checkpoints, parameters, safetensors_files, shards
from minidsv3.checkpoints import CheckpointError
from minidsv3.config import TINY, Config, ConfigError

SMALL = dataclasses.replace(TINY, n_routed_experts=4, n_group=2, num_experts_per_tok=2)
# Same shapes, another model: only the config tells.
OTHER = dataclasses.replace(SMALL, rope_theta=500.0, rms_norm_eps=1e-3)
ONE, MANY, FEW = {}, {"max_shard_bytes": 30_000}, {"max_shard_bytes": 100_000}
HALF, FP8 = {"dtype": "bfloat16"}, {"dtype": "float8_e4m3fn"}
NOTHING = (None, {})
CHANGES = {  # what is there -> what is saved in its place
    "nothing, one file": (NOTHING, (SMALL, ONE)),
    "nothing, many files": (NOTHING, (SMALL, MANY)),
    "one file, one file": ((SMALL, ONE), (SMALL, ONE)),
    "one file, many": ((SMALL, ONE), (SMALL, MANY)),
    "many files, one": ((SMALL, MANY), (SMALL, ONE)),
    "many files, as many": ((SMALL, MANY), (SMALL, MANY)),
    "many files, fewer": ((SMALL, MANY), (SMALL, FEW)),
    "one file of another model": ((OTHER, ONE), (SMALL, ONE)),
    "many files of another model": ((OTHER, MANY), (SMALL, MANY)),
    "another model, then many files": ((OTHER, ONE), (SMALL, MANY)),
    "many files of another model, then one": ((OTHER, MANY), (SMALL, ONE)),
    "bfloat16, FP8": ((SMALL, HALF), (SMALL, FP8)),
    "FP8, bfloat16": ((SMALL, FP8), (SMALL, HALF)),
}
each_change = pytest.mark.parametrize("change", CHANGES)
# Nobody need be refused where the config and the first file's name stay.
SMOOTH = {"one file, one file", "many files, as many", "many files, fewer"}


def put(folder: Path, what: tuple[Config | None, dict], seed: int) -> None:
    config, options = what
    if config is not None:
        params = parameters.initialise(config, seed, 0.1)
        checkpoints.save(folder, config, params, **options)


def seen(folder: Path) -> tuple | None:
    """The model that a reader finds, in a form that can be compared, or None."""
    try:
        config, params = checkpoints.load(folder)
    except (CheckpointError, ConfigError):
        return None
    return config, tuple((name, array.tobytes()) for name, array in params.items())


def seen_by_others(folder: Path) -> tuple | None:
    """The same for a reader without care, such as transformers."""
    if not (folder / "config.json").is_file():
        return None
    config = Config.from_json(folder)
    single = folder / checkpoints.WEIGHTS
    names = {checkpoints.WEIGHTS}
    if not single.is_file():
        if not (folder / checkpoints.INDEX).is_file():
            return None
        names = set(shards._index(folder / checkpoints.INDEX).values())
    found = {}
    for name in names:
        found |= checkpoints.read_tensors(folder / name)[0]
    return config, tuple((k, found[k].tobytes()) for k in sorted(found))


READERS = (seen, seen_by_others)


class Stopped(Exception):
    """The n-th operation was about to be done."""


def stop_at(n: int, patch: pytest.MonkeyPatch, stop: Callable[[str], None]) -> None:
    """Call `stop` instead of the n-th operation on files; a writer writes a part."""
    left = [n]

    def counted(function: Callable, half: Callable | None = None) -> Callable:
        def wrapper(*args, **kwargs) -> object:
            left[0] -= 1
            if left[0] == -1:  # once: what cleans up may work
                if half:
                    half(*args)
                stop(function.__name__)
            return function(*args, **kwargs)

        return wrapper

    def garbage(*arguments: object) -> None:
        [path] = (one for one in arguments if isinstance(one, Path))
        with open(path, "wb") as file:
            file.write(b"half a fi")

    for name in ("replace", "unlink", "fsync"):
        patch.setattr(os, name, counted(getattr(os, name)))
    writer = counted(safetensors_files.save_file, garbage)
    patch.setattr(safetensors_files, "save_file", writer)
    patch.setattr(Path, "write_text", counted(Path.write_text, garbage))


def dies(folder: Path, what: tuple, n: int) -> bool:
    """Save in a process that is killed at its n-th operation; False if it gets done."""
    child = os.fork()
    if child == 0:
        try:
            stop_at(n, pytest.MonkeyPatch(), lambda _: os._exit(7))
            put(folder, what, seed=2)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 7)
    return status == 7


def models(folder: Path, old: tuple, new: tuple) -> list[tuple]:
    """Old and new model, as each reader sees them when nobody disturbs."""
    put(folder / "old", old, seed=1)
    put(folder / "new", new, seed=2)
    return [tuple(map(reader, (folder / "old", folder / "new"))) for reader in READERS]


def check_killed(folder: Path, change: str) -> None:
    old, new = CHANGES[change]
    wanted = models(folder, old, new)
    assert all(before != after for before, after in wanted)
    for n in range(1000):
        run = folder / f"run {n}"
        put(run, old, seed=1)
        killed = dies(run, new, n)
        for reader, (before, after) in zip(READERS, wanted, strict=True):
            found = reader(run)
            allowed = [before, after] + ([] if change in SMOOTH else [None])
            assert any(found == one for one in allowed), (change, n, reader.__name__)
        put(run, new, seed=2)
        assert seen(run) == wanted[0][1]
        left = [f for f in run.iterdir() if not f.name.endswith(".part")]
        assert len(left) == len(list((folder / "new").iterdir()))
        if not killed:
            break
    assert n >= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@each_change
def test_killed_at_any_moment(tmp_path, change: str) -> None:
    check_killed(tmp_path, change)


def check_failing(folder: Path, change: str) -> None:
    """The same with an error instead: and no half files are left."""
    old, new = CHANGES[change]
    wanted = models(folder, old, new)

    def stop(operation: str) -> None:
        raise OSError(operation)

    for n in range(1000):
        run = folder / f"run {n}"
        put(run, old, seed=1)
        before = {f.name: f.read_bytes() for f in run.glob("*")}
        with pytest.MonkeyPatch.context() as patch:
            stop_at(n, patch, stop)
            try:
                put(run, new, seed=2)
                failed = None
            except OSError as error:
                failed = str(error)
        for reader, (one, other) in zip(READERS, wanted, strict=True):
            assert reader(run) in (one, other, None), (change, n)
        if failed in ("save_file", "write_text"):  # nothing has happened
            after = {f.name: f.read_bytes() for f in run.glob("*")}
            assert after == before
        if failed is None:
            break
    assert seen(run) == wanted[0][1]


@each_change
def test_failing_at_any_moment(tmp_path, change: str) -> None:
    check_failing(tmp_path, change)


@each_change
def test_what_is_replaced_is_gone(tmp_path, change: str) -> None:
    """Nothing of the old model is left, and again and again the files stay as few."""
    old, new = CHANGES[change]
    put(tmp_path / "alone", new, seed=2)
    count = len(list((tmp_path / "alone").iterdir()))
    put(tmp_path / "run", old, seed=1)
    for _ in range(3):
        put(tmp_path / "run", new, seed=2)
        assert len(list((tmp_path / "run").iterdir())) == count
        assert seen(tmp_path / "run") == seen(tmp_path / "alone")


def test_a_stranger_beside_the_model_is_left_alone(tmp_path) -> None:
    put(tmp_path, (SMALL, MANY), seed=1)
    for name in ("notes.txt", "adapter.safetensors", "tokenizer.json",
                 "model-of-mine.safetensors"):  # fmt: skip
        (tmp_path / name).write_text("mine")
    put(tmp_path, (SMALL, ONE), seed=2)
    assert {f.name for f in tmp_path.iterdir() if f.read_bytes() == b"mine"} == {
        *("notes.txt", "adapter.safetensors", "tokenizer.json"),
        "model-of-mine.safetensors",
    }


def replaced_while_opened(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Another model takes the place between the reading of weights and config."""
    put(folder, (OTHER, ONE), seed=1)
    read = checkpoints.open_folder

    def slowly(folder: Path) -> dict:
        tensors = read(folder)
        put(folder, (SMALL, ONE), seed=2)
        return tensors

    patch.setattr(checkpoints, "open_folder", slowly)


def test_a_model_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch) -> None:
    replaced_while_opened(tmp_path, monkeypatch)
    with pytest.raises(
        CheckpointError, match="replaced while it was opened; try again"
    ):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("old", [(SMALL, MANY), (SMALL, ONE)])
def test_a_load_that_began_is_finished_with_the_old_model(tmp_path, old) -> None:
    put(tmp_path, old, seed=1)
    wanted = seen(tmp_path)
    config, lazy = checkpoints.open_lazily(tmp_path)
    first = next(iter(lazy))
    read = {first: lazy[first]}
    put(tmp_path, (OTHER, FEW), seed=2)
    read |= {name: lazy[name] for name in lazy}
    found = config, tuple((name, array.tobytes()) for name, array in read.items())
    assert found == wanted
    assert not np.array_equal(read[first], checkpoints.load(tmp_path)[1][first])
