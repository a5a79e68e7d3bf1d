"""Mistakes of reading and writing models, planted in the library's source.

A row names the mistake, the lines that make it, and the check that fails on it; the
checks get an empty folder. Mistakes in FP8 itself are in `test_fp8`, those that
transformers notices in `test_whole_model_mistakes`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from minidsv3 import checkpoints, safetensors_files, shards
from tests import test_checkpoint_crashes as crashes
from tests import test_checkpoint_lazy as lazy
from tests import test_checkpoint_refusals as refusals
from tests import test_checkpoints as files
from tests.planting import plant


def fp8(folder: Path) -> None:
    files.check_types(folder, "float8_e4m3fn")


def half(folder: Path) -> None:
    files.check_types(folder, "bfloat16")


def refused(what: str) -> Callable:
    return lambda folder: refusals.check_refused(folder, refusals.REFUSALS[what])


def refused_in_fp8(what: str) -> Callable:
    return lambda folder: refusals.check_refused(
        folder, refusals.IN_FP8[what], "float8_e4m3fn"
    )


def refused_in_files(what: str) -> Callable:
    return lambda folder: refusals.check_refused_in_files(
        folder, refusals.IN_FILES[what]
    )


def killed(change: str) -> Callable:
    return lambda folder: crashes.check_killed(folder, change)


def failing(change: str) -> Callable:
    return lambda folder: crashes.check_failing(folder, change)


def replaced(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crashes.replaced_while_opened(folder, patch)
        message = refusals.refusal_of(lambda: checkpoints.load(folder))
    assert "replaced while it was opened" in message


SCALES = "s = scales[i // rows : i // rows + blocks]"
DEQUANTISED = "values = fp8.dequantise(values, s, block=self.block)"
BANDS = "for i in range(0, len(whole), blocks * rows):"
COMPARED = "if not np.array_equal(a, b):"
READING = {
    "divided by the scale": (
        checkpoints, [(SCALES, SCALES.replace("s = ", "s = 1 / "))], fp8),
    "scales of the first band for all": (
        checkpoints, [(SCALES, "s = scales[:blocks]"), ("BAND = 256", "BAND = 128")],
        fp8),
    "scales left out": (
        checkpoints, [(DEQUANTISED, "values = values.astype(np.float32)")], fp8),
    "scales not brought to float32": (
        checkpoints, [("{name: q, name + SCALE: scale_inv}",
                       "{name: q, name + SCALE: scale_inv.astype(BFLOAT16)}")], fp8),
    "the last ragged block is dropped": (
        checkpoints, [(BANDS, BANDS.replace("len(whole)",
                                            "len(whole) // rows * rows"))], fp8),
    "experts exchanged": (
        checkpoints, [("ones = [self._weights[one] for one in _parts(name, shape)]",
                       "ones = [self._weights[one] for one in _parts(name, shape)]"
                       "[::-1]")], fp8),
    "every expert is the first": (
        checkpoints, [("in one.bands():", "in ones[0].bands():")], fp8),
    "biases rounded in the file": (
        checkpoints, [("    if name.endswith(BIAS):\n", "    if False:\n")], half),
    "biases rounded in memory": (
        checkpoints, [('"f4" if name.endswith(BIAS) else self._dtype', "self._dtype")],
        files.check_wishes),
    "what is kept is float32": (
        checkpoints, [("return np.result_type(*{one.dtype for one in ones})",
                       "return np.dtype('f4')")], files.check_wishes),
    "FP8 comes out as FP8": (
        checkpoints, [("return BFLOAT16 if self.scales else",
                       "return self.stored.dtype if self.scales else")],
        files.check_wishes),
    "matrices kept out of FP8": (
        checkpoints, [("if quantised and fp8.is_quantised(name):",
                       "if quantised and 'experts' in name:")], fp8),
    "all read at once": (
        checkpoints, [("    config, params = open_lazily(folder, dtype)\n",
                       "    config, params = open_lazily(folder, dtype)\n"
                       "    kept = [w.stored.mapped().copy() for w in "
                       "params._weights.values()]\n")], lazy.check_memory),
    "experts collected, then stacked": (
        checkpoints, [("        for one, place in zip(",
                       "        kept = [[v.astype('f4') for _, v in o.bands()] "
                       "for o in ones]\n        for one, place in zip(")],
        lazy.check_memory),
    "read when opened": (
        checkpoints, [("return config, LazyParameters(config, weights, dtype)",
                       "all(w.stored.mapped().any() for w in weights.values())\n"
                       "    return config, LazyParameters(config, weights, dtype)")],
        lazy.check_unread),
    "the copies are compared with everything": (
        checkpoints, [("            if first == name:\n", "            if True:\n")],
        lazy.check_unread),
    "a window that is the reader's own": (
        checkpoints, [("        return array\n",
                       "        return self.__dict__.setdefault(name, array)\n")],
        lazy.check_lazily),
    "a tensor begins four bytes early": (
        safetensors_files, [("self.dtype, count, before)",
                             "self.dtype, count, max(0, before - 4))")], half),
    "tensors in the order of their names": (
        safetensors_files, [("in file.offset_keys()}", "in file.keys()}")], half),
}  # fmt: skip
COPIES = "            if first == name:\n"
CHECKING = {
    "copies are not compared": (checkpoints, [(COMPARED, "if False:")],
                                refusals.check_copies),
    "copies are compared in their first rows": (
        checkpoints, [(COMPARED, "if not np.array_equal(a[:1], b[:1]):")],
        refusals.check_copies),
    "the copies of the head alone": (
        checkpoints, [(COPIES, COPIES.replace("name:", "name != "
                                              "'model.embed_tokens.weight':"))],
        refusals.check_copies),
    "a surplus tensor is passed over": (
        checkpoints, [("sorted(tensors.keys() - expected.keys() - used)", "()")],
        refused("a layer too many")),
    "surplus scales are passed over": (
        checkpoints, [("sorted(tensors.keys() - expected.keys() - used)",
                       "sorted(k for k in tensors.keys() - expected.keys() "
                       "if SCALE not in k)")], refused("scales of nothing")),
    "as many numbers will do": (
        checkpoints, [("if stored.shape != shape:",
                       "if math.prod(stored.shape) != math.prod(shape):")],
        refused("a weight transposed")),
    "any type will do": (
        checkpoints, [("elif stored.dtype not in PLAIN_TYPES:", "elif False:")],
        refused("whole numbers")),
    "blocks are guessed": (
        checkpoints, [("    if block is None:\n", "    block = block or (128, 128)\n"
                       "    if block is None:\n")],
        refused_in_fp8("no quantization_config")),
    "as many scales will do": (
        checkpoints, [("if scales.shape != shape or", "if scales.shape[0] < 2 or")],
        refused_in_fp8("scales transposed")),
    "the index is believed": (
        shards, [("promised ^ found.keys()", "promised & set()")],
        refused_in_files("a tensor that the index leaves out")),
    "pickles are not looked for": (
        shards, [("if pickles:", "if False:")], refused("a pickle")),
    "an index may lead out": (
        shards, [("if name != plain:", "if False:")],
        refused_in_files("an index that leads out")),
}  # fmt: skip

PLACES = "stack.enter_context(replacing(folder / entry))"
ASIDE = "os.replace(path, folder / OLD_CONFIG)"
WRITING = {
    "the old entry stays": (
        shards, [("        (folder / other).unlink(missing_ok=True)\n", "")],
        killed("one file, many")),
    "the old entry goes first": (
        shards, [("        with ExitStack() as stack:",
                  "        (folder / other).unlink(missing_ok=True)\n"
                  "        with ExitStack() as stack:")], failing("one file, many")),
    "the single file wins": (
        shards, [("if one.is_file() and index.is_file():", "if False:")],
        refused("one file and an index")),
    "the index comes before its files": (
        shards, [("words = {\"metadata\"", "(folder / entry).write_text(json.dumps("
                  "{'weight_map': homes}))\n                words = {\"metadata\"")],
        killed("many files, fewer")),
    "new files under the old names": (
        shards, [("while any((folder / name).exists() for name in names):",
                  "while False:")], killed("many files, as many")),
    "the old files go first": (
        shards, [("        with ExitStack() as stack:",
                  "        for name in old:\n"
                  "            (folder / name).unlink(missing_ok=True)\n"
                  "        with ExitStack() as stack:")],
        killed("many files, fewer")),
    "the old files stay": (
        shards, [("*sorted(old - set(names))", "*()")], killed("many files, fewer")),
    "the config does not step aside": (
        shards, [(ASIDE, "pass")], killed("one file of another model")),
    "the config comes first": (
        shards, [(ASIDE, "os.replace(new_config, path)\n                "
                  "new_config.touch()")], killed("one file of another model")),
    "the config steps aside too early": (
        shards, [("        if new_config:\n", "        if new_config:\n            if "
                  "path.is_file():\n                " + ASIDE + "\n")],
        failing("one file of another model")),
    "the config always steps aside": (
        shards, [("changed = not path.is_file() or", "changed = True or")],
        killed("one file, one file")),
    "nobody looks twice": (
        checkpoints, [("if version(folder) != opened:", "if False:")], replaced),
    "shards larger than asked": (
        shards, [("size > room and groups[-1]", "room < 0 and groups[-1]")],
        files.check_shards),
    "all files in memory": (
        shards, [("    fill(path, content, METADATA)\n",
                  "    fill(path, content, METADATA)\n"
                  "    KEPT.append(content)\n"),
                 ("PICKLES = (", "KEPT = []\nPICKLES = (")],
        lazy.check_memory_of_saving),
    "scales are not counted": (
        checkpoints, [("return array.size * kind.itemsize + 4 * scales",
                       "return array.size * kind.itemsize")],
        partial(files.check_shards, most=2 * 130 * 131)),  # two experts' matrices
    "the copy of the head is left out": (
        checkpoints, [("for name, first in _copies(config).items()}\n    write",
                       "for name, first in list(_copies(config).items())[:1]}\n"
                       "    write")], half),
}  # fmt: skip

MISTAKES = READING | CHECKING | WRITING


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch, tmp_path: Path) -> None:
    module, lines, check = MISTAKES[mistake]
    plant(monkeypatch, module, *lines)
    with pytest.raises(Exception) as seen:  # noqa: PT011
        check(tmp_path)
    refused_too_much = isinstance(seen.value, checkpoints.CheckpointError | ValueError)
    assert isinstance(seen.value, AssertionError) or refused_too_much
