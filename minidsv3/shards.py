"""A model's tensors in a folder: in one safetensors file, or several with an index.

The entry is ``model.safetensors``, or ``model.safetensors.index.json``, which says in
which file each tensor lies. Whoever replaces a model replaces its entry, in one step:
new files get names that no old one has, and old ones go when nobody looks at them any
more. A folder with both entries is refused, for one of them is of another model.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from minidsv3.files import replacing
from minidsv3.safetensors_files import CheckpointError, Stored, fill, open_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
AGAIN = re.compile(r"model-\d{5}-of-\d{5}-\d+\.safetensors")  # only `write_folder` does


# --- reading ----------------------------------------------------------------------


def open_folder(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a model, unread, and the metadata of its first file.

    Raises CheckpointError if there is no model, or only a pickle, or two, and if files
    are missing, broken, or hold something else than the index says.
    """
    entry = _entry(folder)
    if entry.name == WEIGHTS:
        return open_tensors(entry)
    homes = _index(entry)
    names = sorted(set(homes.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}, one of {len(missing)} of the {len(names)} "
            "files that its index names; complete the download"
        )
    tensors: dict[str, Stored] = {}
    notes: dict[str, str] = {}
    for name in reversed(names):
        found, notes = open_tensors(folder / name)
        promised = {key for key, home in homes.items() if home == name}
        for key in sorted(promised ^ found.keys()):
            here, there = ("a", "no") if key in found else ("no", "a")
            raise CheckpointError(
                f"{folder / name} has {here} {key}, but {INDEX} says it has {there} "
                "such tensor; the two are of different downloads or saves"
            )
        tensors |= found
    return tensors, notes


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
    groups: list[list[str]],
    tensors: Callable[[str], dict[str, np.ndarray]],
    metadata: Mapping[str, str],
    beforehand: Callable[[], object],
) -> None:
    """Replace the model in ``folder``, whole or not at all, one file a group of names.

    ``tensors(name)`` gives what the file holds of a name; a group is in memory at a
    time. ``beforehand()`` is called when all is written and nothing has its name yet.
    If anything is raised, or the program is killed, up to the moment when the entry
    gets its name, the old model is there; afterwards, the new one. In between, old
    entry and new may both be there, if they have different names: then `open_folder`
    refuses them.
    """
    old = _old_files(folder)
    alone = len(groups) == 1
    names = [WEIGHTS] if alone else _free_names(folder, len(groups))
    homes: dict[str, str] = {}
    total = 0
    with ExitStack() as stack:
        # what is entered first takes its place last
        index = None if alone else stack.enter_context(replacing(folder / INDEX))
        for name, group in zip(names, groups, strict=True):
            beside = stack.enter_context(replacing(folder / name))
            content = {k: a for one in group for k, a in tensors(one).items()}
            fill(beside, content, metadata)
            homes |= dict.fromkeys(content, name)
            total += sum(a.nbytes for a in content.values())
        if index:
            words = {"metadata": {"total_size": total}, "weight_map": homes}
            index.write_text(
                json.dumps(words, indent=2, sort_keys=True) + "\n", "utf-8"
            )
        beforehand()
    other = INDEX if alone else WEIGHTS
    for name in (other, *sorted(old - set(names))):
        (folder / name).unlink(missing_ok=True)


def _old_files(folder: Path) -> set[str]:
    """The files of the index that is there, and what a killed `write_folder` left."""
    left = {file.name for file in folder.glob("model-*.safetensors")}
    ours = {name for name in left if AGAIN.fullmatch(name)}
    try:
        return ours | set(_index(folder / INDEX).values())
    except CheckpointError:
        return ours


def _free_names(folder: Path, count: int) -> Iterable[str]:
    """``model-00001-of-00003.safetensors``, …; with -2, -3, … if such files exist."""
    stems = [f"model-{i + 1:05d}-of-{count:05d}" for i in range(count)]
    round_, names = 1, [f"{stem}.safetensors" for stem in stems]
    while any((folder / name).exists() for name in names):
        round_ += 1
        names = [f"{stem}-{round_}.safetensors" for stem in stems]
    return names
