"""Mistakes of putting the model together, planted in the library's source.

Each part may be right and the whole wrong: a norm left out, an eps handed to the wrong
place, a sum without one term, a file in another order. A row names the mistake, the
lines that make it, and the check that fails on it; the checks get an empty folder. What
goes wrong inside a part is in `test_mla_mistakes`, `test_moe_mistakes` and
`test_mtp_mistakes`.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from minidsv3 import checkpoints, parameters
from minidsv3.config import TINY
from minidsv3.generation import numpy_ref as generation
from minidsv3.mla import numpy_ref as mla
from minidsv3.model import block_numpy_ref as block
from minidsv3.model import numpy_ref as model
from minidsv3.moe import numpy_ref as moe
from minidsv3.training import numpy_ref as training
from minidsv3.training import run_folder
from tests import test_moe_model
from tests import test_whole_model as whole
from tests import test_whole_run as runs
from tests.planting import plant

SQUARE = dataclasses.replace(TINY, moe_intermediate_size=TINY.hidden_size)


def logits_of(name: str) -> Callable:
    """Our file in transformers, of a named model."""
    return lambda folder: whole.check_ours_are_theirs(folder, whole.MODELS[name])


def file_of_theirs(folder: Path) -> None:
    whole.check_theirs_are_ours(folder, whole.MODELS["V3's routing"])


def square_experts(folder: Path) -> None:
    """Matrices that can be transposed unnoticed by any check of shapes."""
    whole.check_ours_are_theirs(folder, SQUARE)


def square_experts_of_theirs(folder: Path) -> None:
    whole.check_theirs_are_ours(folder, SQUARE)


def drafts_of(name: str) -> Callable:
    def check(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            whole.check_drafts_are_theirs(folder, whole.MODELS[name], patch)

    return check


def gradients(_: Path) -> None:
    whole.check_gradients(TINY, 2, 5)


def gradients_with_eps(_: Path) -> None:
    whole.check_gradients(whole.MODELS["an eps that is felt"], 2, 5)


def cached(_: Path) -> None:
    whole.check_cached(TINY)


def causality(_: Path) -> None:
    whole.check_causality(TINY)


def drafting(_: Path) -> None:
    whole.check_drafting(how_many=20)


def sizes(_: Path) -> None:
    whole.test_v3_counts_to_the_last_parameter()


def biases_in_training(_: Path) -> None:
    test_moe_model.test_training_moves_the_biases_by_their_speed()


def log(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: naïve café\n" for i in range(400)))
    runs.trained(folder / "run", text)
    runs.check_log(folder / "run", text)


logits, eps_that_is_felt = logits_of("TINY"), logits_of("an eps that is felt")
drafts = drafts_of("TINY")

FINAL_NORM = "return h, (saved_embed, saved_blocks, saved_norm)"
SECOND_NORM = 'params["post_attention_layernorm.weight"], eps)'
FEED = 'f, saved_mlp = feed_forward(cut(params, "mlp."), u, config)'
HEAD = 'logits, saved_head = linear_forward(h, params["lm_head.weight"])'
ASSEMBLY = {
    "the first layer has experts too": (
        parameters, [("sparse = config.is_moe_layer(layer)",
                      "sparse = config.uses_moe")], logits),
    "the module's block is dense": (
        parameters, [("sparse=config.uses_moe", "sparse=False")], sizes),
    "two shared experts are one": (
        parameters, [("_swiglu(config.n_shared_experts * width, D)",
                      "_swiglu(width, D)")], logits_of("two shared experts")),
    "no final norm": (
        model, [(FINAL_NORM, FINAL_NORM.replace("h,", "x,", 1))], logits),
    "an eps of its own in the blocks": (
        block, [("eps = config.rms_norm_eps", "eps = 1e-6")], eps_that_is_felt),
    "an eps of its own in the final norm": (
        model, [('params["model.norm.weight"], config.rms_norm_eps)',
                 'params["model.norm.weight"], 1e-6)')], eps_that_is_felt),
    "the config's eps in the latents": (
        mla, [("LATENT_EPS = 1e-6", "LATENT_EPS = 0.05")], eps_that_is_felt),
    "an eps of its own in the module that drafts": (
        model, [("mtp_forward(module, h, e, block, config.rms_norm_eps)",
                 "mtp_forward(module, h, e, block, 1e-6)")],
        drafts_of("an eps that is felt")),
    "an eps of its own in the module that learns": (
        model, [("modules, h, e, block, config.rms_norm_eps",
                 "modules, h, e, block, 1e-6")], gradients_with_eps),
    "both norms of a block with one gain": (
        block, [(SECOND_NORM, 'params["input_layernorm.weight"], eps)')], logits),
    "the feed-forward reads the stream": (
        block, [(FEED, FEED.replace("u,", "x,"))], logits),
    "the feed-forward's answer replaces the stream": (
        block, [("return x + f, (", "return f, (")], logits),
    "attention's answer replaces the stream": (
        block, [("    x = x + a\n", "    x = a\n")], logits),
    "attention and feed-forward side by side": (
        block, [("    x = x + a\n    u,", "    y = x + a\n    u,"),
                ("return x + f, (", "return y + f, (")], logits),
    "the shared expert twice": (
        moe, [("return y + y_shared, saved", "return y + 2 * y_shared, saved")],
        logits),
    "the head is the embedding": (
        model, [(HEAD, HEAD.replace("lm_head", "model.embed_tokens"))], logits),
    "every layer has the first one's weights": (
        model, [('cut(params, f"model.layers.{layer}.")',
                 'cut(params, f"model.layers.{layer and 1}.")')],
        logits_of("odd sizes")),
    "YaRN forgotten": (
        model, [("rotation = rope_rotation(positions, rope_frequencies(config), x.dty",
                 "theta = config.rope_theta ** (-np.arange(0, 1, 2 / "
                 "config.qk_rope_head_dim))\n"
                 "    rotation = rope_rotation(positions, theta, x.dty")],
        logits_of("YaRN")),
    "drafts from before the final norm": (
        model, [("return saved[1][0]", "return saved[0][2][0]")], drafts),
    "a later token is seen": (
        model, [(FINAL_NORM, "h = h + 1e-6 * h.mean(axis=1, keepdims=True)\n"
                 f"    {FINAL_NORM}")], causality),
    "sequences of a batch mix": (
        model, [(FINAL_NORM, "h = h + 1e-6 * h.mean(axis=0, keepdims=True)\n"
                 f"    {FINAL_NORM}")], causality),
}  # fmt: skip

SUM = "grads[name] = grads[name] + grad if name in grads else grad"
ONCE_MORE = """balance(state, loss_and_grads(state.params, config, ids, now)[2], c)
        losses, grads, stats = loss_and_grads"""
TRAINING = {
    "no balance loss of the module": (
        model, [("sum(map(moe.balance_loss, layers))",
                 "sum(map(moe.balance_loss, layers[:-1]))")], gradients),
    "the balance loss a mean over layers": (
        model, [("sum(map(moe.balance_loss, layers))",
                 "sum(map(moe.balance_loss, layers)) / len(layers)")], gradients),
    "the balance loss weighed with λ too": (
        model, [("total += alpha * values[-1]",
                 "total += alpha * train_config.mtp_weight * values[-1]")], gradients),
    "the module's part of embedding and head alone": (
        model, [(SUM, "grads[name] = grad")], gradients),
    "loads under each other's names": (
        model, [("for n in _sparse_blocks(config)]\n    loads",
                 "for n in _sparse_blocks(config)[::-1]]\n    loads")], gradients),
    "load of the first sequence": (
        model, [("moe.routing(saved).experts, E)",
                 "moe.routing(saved).experts[: saved[0][1]], E)")], gradients),
    "biases moved before the step": (
        training, [("losses, grads, stats = loss_and_grads", ONCE_MORE),
                   ("        balance(state, stats, c)\n", "")], biases_in_training),
    "biases moved in the module only": (
        training, [('in stats.get("load", {}).items():',
                    'in list(stats["load"].items())[-1:]:')], biases_in_training),
    "biases moved twice, as another worker's sum": (
        training, [("        balance(state, stats, c)\n",
                    "        balance(state, stats, c)\n" * 2)], biases_in_training),
    "λ stays where it began": (
        training, [("mtp_weight(state.step + 1, c)", "mtp_weight(1, c)")], log),
    "MaxVio of one layer": (
        run_folder, [('loads = stats.get("load", {}).values()',
                      'loads = list(stats.get("load", {}).values())[:1]')], log),
}  # fmt: skip

START = "start = caches[0].length if caches else 0\n"
TAKEN_BACK = "            for cache in caches:\n                cache.crop(n)\n"
CACHES = {
    "absorbed, with positions from 0": (
        model, [("positions = np.arange(start, start + T)",
                 "positions = np.arange(T)")], cached),
    "the module's positions from 0": (
        model, [("start = cache.length if cache else 0", "start = 0")], cached),
    "the module does not remember": (
        model, [("_mtp_block(config, h.dtype, cache)",
                 "_mtp_block(config, h.dtype)\n    cache.length += h.shape[1]")],
        cached),
    "a chunk looks ahead": (
        block, [("absorbed = cache is not None and cache.length > 0",
                 "absorbed = cache is not None and cache.length > 0\n"
                 "    u = u + 1e-6 * u[:, -1:]")], cached),
    "a rejected draft stays in the caches": (
        generation, [(TAKEN_BACK, "")], drafting),
    "a rejected draft stays in all caches but the first": (
        generation, [(TAKEN_BACK, "            caches[0].crop(n)\n")], drafting),
    "the draft's word for the bonus": (
        generation, [("bonus = draw(law(logits[:, 1])", "bonus = draw(law(z)")],
        drafting),
}  # fmt: skip

APART = "arrays |= zip(ones, array if len(ones) > 1 else [array], strict=True)"
JOINED = "place[band] = values"
ONES = "ones = [self._weights[one] for one in _parts(name, shape)]"
ROUNDED = "    if name.endswith(BIAS):\n        return np.dtype(np.float32)\n"
FILES = {
    "experts transposed in the file": (
        checkpoints, [(APART, APART.replace("array if", "array.swapaxes(-1, -2) if"))],
        square_experts),
    "experts transposed in memory": (
        checkpoints, [(JOINED, "(place.T if len(ones) > 1 else place)[band] = values")],
        square_experts_of_theirs),
    "experts in the order of their names: 0, 1, 10": (
        checkpoints, [(ONES, ONES.replace("_parts(name, shape)",
                                          "sorted(_parts(name, shape))"))],
        file_of_theirs),
    "experts backwards, there and back": (
        checkpoints, [(APART, APART.replace("(ones,", "(ones[::-1],")),
                      (ONES, ONES + "[::-1]")], logits),
    "gate and up exchanged in the file": (
        checkpoints, [(APART, "ones = [one.replace('gate_proj', 'x_proj').replace("
                       "'up_proj', 'gate_proj').replace('x_proj', 'up_proj') "
                       "for one in ones]\n        " + APART)], logits),
    "biases rounded with the weights": (
        checkpoints, [(ROUNDED, "")], whole.check_half_files),
    "biases left out of the rounding, and weights too": (
        checkpoints, [(ROUNDED, "    return np.dtype(np.float32)\n")],
        whole.check_half_files),
    "no bias comes out of the file": (
        checkpoints, [(JOINED, "place[band] = values * (not name.endswith(BIAS))")],
        file_of_theirs),
}  # fmt: skip

MISTAKES = ASSEMBLY | TRAINING | CACHES | FILES


@cache
def passes(check: Callable) -> bool:
    """Run a check on the right code: once is enough."""
    with TemporaryDirectory() as folder:
        check(Path(folder))
    return True


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch, tmp_path: Path) -> None:
    module, lines, check = MISTAKES[mistake]
    assert passes(check)
    plant(monkeypatch, module, *lines)
    with pytest.raises(AssertionError):
        check(tmp_path)
