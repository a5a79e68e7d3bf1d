"""A model's tensors in a folder: in one safetensors file, or several with an index.

The entry is ``model.safetensors``, or ``model.safetensors.index.json``, which says in
which file each tensor lies. Whoever replaces a model replaces its entry, in one step:
new files get names that no old one has, and old ones go when nobody looks at them any
more. A folder with both entries is refused, for one of them is of another model.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np

from minidsv3.files import replacing
from minidsv3.safetensors_files import CheckpointError, Stored, fill, open_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
OLD_CONFIG = "config.json.old"  # while weights and config take their places
METADATA = {
    "format": "pt"
}  # as released, and as transformers 4 insists; one entry, for
# the library writes several in any order, and equal models should have equal files
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD = re.compile(r"model-\d+-of-\d+(-\d+)?\.safetensors")


# --- reading ----------------------------------------------------------------------


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model, unread.

    Raises CheckpointError if there is no model, or only a pickle, or two, and if files
    are missing, broken, or hold something else than the index says.
    """
    entry = _entry(folder)
    if entry.name == WEIGHTS:
        return open_tensors(entry)[0]
    homes = _index(entry)
    names = sorted(set(homes.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that its index "
            f"names, {missing[0]} first; complete the download"
        )
    tensors: dict[str, Stored] = {}
    for name in names:
        found, _ = open_tensors(folder / name)
        promised = {key for key, home in homes.items() if home == name}
        for key in sorted(promised ^ found.keys()):
            here, there = ("a", "no") if key in found else ("no", "a")
            raise CheckpointError(
                f"{folder / name} has {here} {key}, but {INDEX} says it has {there} "
                "such tensor; the two are of different downloads or saves"
            )
        tensors |= found
    return tensors


def version(folder: Path) -> tuple:
    """What changes when the model in ``folder`` is replaced. Raises CheckpointError."""
    status = _entry(folder).stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _entry(folder: Path) -> Path:
    """The file to begin with: the weights, or the index."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that it lies in")
    one, index = folder / WEIGHTS, folder / INDEX
    if one.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds {WEIGHTS} and {INDEX}, which are two models; a save may "
            "have been cut off. Remove the older of the two"
        )
    if (folder / OLD_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: a save was cut off while config and weights took their places. "
            f"Save the model again; or rename {OLD_CONFIG} to {CONFIG} if the weights "
            "are older than it"
        )
    if one.is_file() or index.is_file():
        return one if one.is_file() else index
    pickles = sorted(p.name for kind in PICKLES for p in folder.glob(kind))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle: opening one runs whatever program "
            f"lies in it, so none is opened here. Convert it to {WEIGHTS} where its "
            "source is trusted (transformers' save_pretrained writes that)"
        )
    raise CheckpointError(
        f"{folder} holds no {WEIGHTS}; give the folder that training wrote"
    )


def _index(path: Path) -> dict[str, str]:
    """Tensor -> name of its file, which lies beside the index."""
    try:
        homes = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {name: Path(name).name for name in homes.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no index of weights ({error!r}); it needs a weight_map from "
            "names of weights to names of files"
        ) from error
    for name, plain in names.items():
        if name != plain:
            raise CheckpointError(
                f"{path} names {name}, which is not beside it; only files of its own "
                "folder are opened"
            )
    if not homes:
        raise CheckpointError(f"{path} is no index of weights: its weight_map is empty")
    return homes


# --- writing ----------------------------------------------------------------------


def packed(sizes: Mapping[str, int], most: int | None) -> list[list[str]]:
    """Names in their order, in groups of at most ``most`` bytes; a larger one alone."""
    groups: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if most is not None and size > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(name)
        if most is not None:
            room -= size
    return groups


def write_folder(
    folder: Path,
    config: str,
    groups: list[list[str]],
    tensors: Callable[[str], dict[str, np.ndarray]],
) -> None:
    """Replace the model in ``folder``, whole or not at all, one file a group of names.

    ``tensors(name)`` gives what the file holds of a name; a group is in memory at a
    time. ``config`` is the text of ``config.json``. Whatever is raised while files are
    written leaves the old model as it was. Then they take their places, in this order:
    the old config goes aside if the new one differs, weights and index come, the old
    entry goes if it had another name, the new config comes. Killed in between, the
    folder has no config or two entries, and everybody refuses it; else it holds the old
    model, or the new one.
    """
    path, entry, other = folder / CONFIG, WEIGHTS, INDEX
    if len(groups) > 1:
        entry, other = other, entry
    old = _old_files(folder)
    changed = not path.is_file() or path.read_text("utf-8", "replace") != config
    with replacing(path) if changed else nullcontext() as new_config:
        if new_config:
            new_config.write_text(config, "utf-8")
        with ExitStack() as stack:  # what is entered first takes its place last
            new_entry = stack.enter_context(replacing(folder / entry))
            if len(groups) == 1:
                names = [entry]
                _fill(new_entry, groups[0], tensors)
            else:
                names = _free_names(folder, len(groups))
                homes: dict[str, str] = {}
                total = 0
                for name, group in zip(names, groups, strict=True):
                    beside = stack.enter_context(replacing(folder / name))
                    sizes = _fill(beside, group, tensors)
                    homes |= dict.fromkeys(sizes, name)
                    total += sum(sizes.values())
                words = {"metadata": {"total_size": total}, "weight_map": homes}
                text = json.dumps(words, indent=2, sort_keys=True) + "\n"
                new_entry.write_text(text, "utf-8")
            if new_config and path.is_file():
                os.replace(path, folder / OLD_CONFIG)
        (folder / other).unlink(missing_ok=True)
    for name in (OLD_CONFIG, *sorted(old - set(names))):
        (folder / name).unlink(missing_ok=True)


def _fill(
    path: Path, group: list[str], tensors: Callable[[str], dict[str, np.ndarray]]
) -> dict[str, int]:
    """Write a group of names to a file; returns the bytes of each tensor in it."""
    content = {key: array for name in group for key, array in tensors(name).items()}
    fill(path, content, METADATA)
    return {key: array.nbytes for key, array in content.items()}


def _old_files(folder: Path) -> set[str]:
    """The files of the index that is there, and shards that no index names.

    A killed `write_folder` may have left those; transformers clears them away, too.
    """
    left = {file.name for file in folder.glob("model-*.safetensors")}
    old = {name for name in left if SHARD.fullmatch(name)}
    try:
        named = _index(folder / INDEX).values()
    except CheckpointError:
        return old
    return old | {name for name in named if name.endswith(".safetensors")}


def _free_names(folder: Path, count: int) -> list[str]:
    """``model-00001-of-00003.safetensors``, …; with -2, -3, … if such files exist."""
    stems = [f"model-{i + 1:05d}-of-{count:05d}" for i in range(count)]
    round_, names = 1, [f"{stem}.safetensors" for stem in stems]
    while any((folder / name).exists() for name in names):
        round_ += 1
        names = [f"{stem}-{round_}.safetensors" for stem in stems]
    return names
