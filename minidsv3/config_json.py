"""The border between `Config` and DeepSeek's ``config.json``, both ways.

Written files have the form of the released one (``rope_theta`` and ``rope_scaling``).
Read are that form and the newer one of transformers 5 (``rope_parameters``). A file
says ``"model_type": "deepseek_v3"`` only if transformers can build the model; a plain
transformer says ``"minidsv3"``. How the weights beside it are stored (``torch_dtype``,
``quantization_config``) is no part of a `Config`; it is written and read here too.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TypeVar

from minidsv3.config import Config, ConfigError, Yarn
from minidsv3.files import replacing
from minidsv3.fp8 import BLOCK, FP8

# Keys that are no field of ours and whose other values would change the computation.
ONLY_MEANINGS = {"attention_dropout": 0.0, "mlp_bias": False, "rope_interleave": True}
# May be absent from a deepseek_v3 file: transformers does not know them, or our default
# is also its own. For any other absent key it would assume V3's 671B-size number.
MAY_BE_ABSENT = {
    *("moe_layer_freq", "norm_topk_prob", "scoring_func", "topk_method", "hidden_act"),
    *("attention_bias", "tie_word_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "num_nextn_predict_layers"),
}
QUANTISED = {  # as released; "dynamic" is about activations, which no file holds
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
Block = tuple[int, int]
Parsed = TypeVar("Parsed")


def read(path: str | Path) -> Config:
    """Read `path` if it ends with ``.json``, else the ``config.json`` in that folder.

    Keys that say nothing about the computation (``architectures``, ``torch_dtype``,
    ``quantization_config``, …) are passed over. Raises `ConfigError`, with the file's
    name, if there is no such file, if it is not JSON, or if it describes a model that
    this library does not have: another ``model_type``, softmax routing, biases, ….
    """
    return _parsed(path, from_words)


def read_with_block(path: str | Path) -> tuple[Config, Block | None]:
    """Like `read`, with the size of the blocks if the weights beside it are in FP8.

    Raises `ConfigError`, too, for weights that are quantised in any other way.
    """
    return _parsed(path, lambda words: (from_words(words), _block(words)))


def _parsed(path: str | Path, parse: Callable[[dict], Parsed]) -> Parsed:
    path = _file(path)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:  # or nested too deep
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    try:
        return parse(words)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write(config: Config, path: str | Path, dtype: str | None = None) -> Path:
    """Write `path` (``….json``, or a folder that gets a ``config.json``); returns it.

    dtype is that of the weights beside it, "float32", "bfloat16" or "float8_e4m3fn"
    (then a ``quantization_config`` is written, too); None says nothing of it. The text
    goes to a file beside it first and is then renamed, so that an interruption leaves
    the old file or the new one, never a half.
    """
    path = _file(path)
    with replacing(path) as beside:
        beside.write_text(to_text(config, dtype), encoding="utf-8")
    return path


def to_text(config: Config, dtype: str | None = None) -> str:
    """The text of the file: see `write`."""
    words = to_words(config)
    if dtype is not None:
        quantised = dtype == FP8.name
        words["torch_dtype"] = "bfloat16" if quantised else dtype  # as it is unpacked
        words |= {"quantization_config": QUANTISED} if quantised else {}
    return json.dumps(words, indent=2, sort_keys=True) + "\n"


def from_words(words: dict) -> Config:
    """The `Config` of a parsed ``config.json``. Raises `ConfigError`."""
    if not isinstance(words, dict):
        raise ConfigError(f"expected an object of names and values, got {words!r:.60}")
    _check_model_type(words)
    for name, only in ONLY_MEANINGS.items():
        if words.get(name, only) not in (only, None):
            raise ConfigError(f"{name} = {words[name]!r}: must be {only!r}")
    values = {f.name: words[f.name] for f in fields(Config) if f.name in words}
    values |= _rope(words)
    if values.get("n_shared_experts", 0) is None:
        values["n_shared_experts"] = 0  # a null in older files of DeepSeek's
    return Config(**values)


def to_words(config: Config) -> dict:
    """The content of ``config.json``: every field, and what names the model."""
    words = asdict(config)
    if config.rope_scaling is not None:
        words["rope_scaling"] = {"type": "yarn", **words["rope_scaling"]}
    if opens_in_transformers(config):
        words["architectures"] = ["DeepseekV3ForCausalLM"]
        words["model_type"] = "deepseek_v3"
    else:
        words["model_type"] = "minidsv3"
    return words


def opens_in_transformers(config: Config) -> bool:
    """Whether transformers' DeepSeek-V3 is this model.

    It always has MLA, and each of its expert layers always has a shared expert.
    """
    return config.uses_mla and config.uses_moe and config.n_shared_experts > 0


def _file(path: str | Path) -> Path:
    path = Path(path)
    is_file = path.suffix == ".json" and not path.is_dir()
    return path if is_file else path / "config.json"


def _check_model_type(words: dict) -> None:
    kind = words.get("model_type")
    if kind not in ("deepseek_v3", "minidsv3"):
        raise ConfigError(
            f"model_type = {kind!r}: must be 'deepseek_v3', or 'minidsv3' for a model "
            "with a mechanism off"
        )
    for field in fields(Config):
        absent = field.name not in words
        needed = field.default is MISSING
        if kind == "deepseek_v3":
            needed = field.name not in MAY_BE_ABSENT
        if absent and needed:
            raise ConfigError(f"{field.name} is missing; it has no safe default")


def _block(words: dict) -> Block | None:
    """The size of the FP8 blocks (rows, columns); None if nothing is quantised."""
    told = words.get("quantization_config")
    if told is None:
        return None
    if not isinstance(told, dict):
        raise ConfigError(f"quantization_config = {told!r}: must be an object or null")
    for name in ("quant_method", "fmt"):  # transformers leaves the second out
        value, only = told.get(name), QUANTISED[name]
        if value != only and not (name == "fmt" and value is None):
            raise ConfigError(
                f"quantization_config.{name} = {value!r}: must be {only!r}; give the "
                "weights in FP8 blocks, bfloat16 or float32"
            )
    block = told.get("weight_block_size")
    pair = isinstance(block, list) and len(block) == 2
    if not (pair and all(type(n) is int and n > 0 for n in block)):
        raise ConfigError(
            f"quantization_config.weight_block_size = {block!r}: must be two positive "
            f"whole numbers, as {list(BLOCK)}"
        )
    return tuple(block)


def _rope(words: dict) -> dict:
    """``rope_theta`` and ``rope_scaling`` from either form of the file."""
    older, newer = words.get("rope_scaling"), words.get("rope_parameters")
    for name, form in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(form, dict | None):
            raise ConfigError(f"{name} = {form!r}: must be an object or null")
    yarns = [_yarn(form) for form in (older, newer) if form is not None]
    homes = [form for form in (words, newer or {}) if "rope_theta" in form]
    thetas = [form["rope_theta"] for form in homes]
    found = {}
    for name, values in (("rope_scaling", yarns), ("rope_theta", thetas)):
        if any(value != values[0] for value in values):
            raise ConfigError(f"{name} and rope_parameters contradict each other")
        if values:
            found[name] = values[0]
    return found


def _yarn(words: dict) -> Yarn | None:
    kind = words.get("type", words.get("rope_type"))
    if kind != words.get("rope_type", kind) or kind not in ("yarn", "default"):
        raise ConfigError(f"rope_scaling.type = {kind!r}: must be 'yarn' or 'default'")
    if kind == "default":
        return None
    wanted = {field.name for field in fields(Yarn)}
    given = set(words) - {"type", "rope_type", "rope_theta"}
    if given != wanted:
        what, names = "is missing", wanted - given
        if not names:
            what, names = "is not implemented for YaRN", given - wanted
        raise ConfigError(f"rope_scaling.{min(names)} {what}")
    return Yarn(**{name: words[name] for name in wanted})
