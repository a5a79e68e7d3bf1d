"""The config: its presets against the released numbers, its file, its refusals."""

import json
import os
from dataclasses import FrozenInstanceError, asdict, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3 import config_json
from minidsv3.config import (
    MINI,
    PLAIN,
    TINY,
    V3,
    Config,
    ConfigError,
    TrainConfig,
    Yarn,
)

# The released config.json of DeepSeek-V3; `aux_loss_alpha` is from an older one.
RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
UNUSED = {
    *("architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "ep_size"),
    *("bos_token_id", "eos_token_id", "initializer_range", "quantization_config"),
    *("torch_dtype", "transformers_version", "use_cache"),
}


# --- the presets ------------------------------------------------------------------


def test_v3_is_the_released_file() -> None:
    assert config_json.from_words(RELEASED) == V3


def test_v3_is_written_as_it_was_released() -> None:
    written = config_json.to_words(V3)
    names = RELEASED.keys() - (UNUSED - {"architectures"})
    assert written.keys() == names
    assert written == {name: RELEASED[name] for name in names}


def attention_parameters(c: Config) -> int:
    heads, D = c.num_attention_heads, c.hidden_size
    query = D * c.q_lora_rank + c.q_lora_rank  # with its norm
    query += c.q_lora_rank * heads * c.qk_head_dim
    latent = D * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    latent += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + latent + heads * c.v_head_dim * D


def parameters_by_part(c: Config) -> dict[str, int]:
    """Counted as DeepSeek's table of tensors says, with MLA, experts and one MTP."""
    D, L = c.hidden_size, c.num_hidden_layers
    moe_layers = sum(c.is_moe_layer(layer) for layer in range(L))
    expert = 3 * D * c.moe_intermediate_size
    router = (D + 1) * c.n_routed_experts  # with its bias
    parts = {
        "embedding": c.vocab_size * D,
        "head": c.vocab_size * D,
        "attention": L * attention_parameters(c),
        "dense": (L - moe_layers) * 3 * D * c.intermediate_size,
        "routed": moe_layers * c.n_routed_experts * expert,
        "shared": moe_layers * c.n_shared_experts * expert,
        "routers": moe_layers * router,
        "norms": (2 * L + 1) * D,
    }
    experts = (c.n_routed_experts + c.n_shared_experts) * expert
    block = attention_parameters(c) + experts + router + 2 * D
    mtp = c.num_nextn_predict_layers * (block + 2 * D * D + 3 * D)
    return {**parts, "main": sum(parts.values()), "mtp": mtp}


def test_v3_has_671_billion_parameters() -> None:
    assert parameters_by_part(V3) == {
        "embedding": 926_679_040,
        "head": 926_679_040,
        "attention": 61 * 187_107_328,
        "dense": 3 * 396_361_728,
        "routed": 653_908_770_816,
        "shared": 2_554_331_136,
        "routers": 106_445_312,
        "norms": 881_664,
        "main": 671_026_419_200,
        "mtp": 11_610_068_224,
    }


def test_mini_routes_like_v3_and_stays_small() -> None:
    names = "n_routed_experts num_experts_per_tok n_group topk_group n_shared_experts"
    for name in [*names.split(), "num_nextn_predict_layers", "routed_scaling_factor"]:
        assert getattr(MINI, name) == getattr(V3, name), name
    parts = parameters_by_part(MINI)
    assert 8e6 <= parts["main"] + parts["mtp"] <= 15.5e6
    assert MINI.uses_mla
    assert MINI.vocab_size == 257


def test_tiny_has_every_mechanism_and_a_dense_layer_too() -> None:
    assert TINY.uses_mla
    assert TINY.num_nextn_predict_layers == 1
    assert [TINY.is_moe_layer(layer) for layer in range(3)] == [False, True, True]
    assert TINY.topk_group < TINY.n_group


def test_plain_has_no_mechanism() -> None:
    assert not PLAIN.uses_mla
    assert not PLAIN.uses_moe
    assert not any(PLAIN.is_moe_layer(layer) for layer in range(4))
    assert PLAIN.qk_head_dim == 32
    assert (PLAIN.n_group, PLAIN.topk_group) == (1, 1)
    assert PLAIN.routed_scaling_factor == 1.0


def test_layers_beyond_the_model_do_not_exist() -> None:
    for layer in (-1, 62):
        with pytest.raises(IndexError, match="0…61"):
            V3.is_moe_layer(layer)


# --- the file ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, MINI, V3], ids=["tiny", "mini", "v3"])
def test_transformers_opens_what_we_write(tmp_path, config) -> None:
    transformers = pytest.importorskip("transformers")
    config.to_json(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DeepseekV3Config"
    for name, ours in asdict(config).items():
        if name in ("rope_theta", "rope_scaling"):
            continue
        assert getattr(theirs, name) == ours, name
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    assert rope["rope_type"] == ("yarn" if config.rope_scaling else "default")
    for name, ours in (
        asdict(config.rope_scaling) if config.rope_scaling else {}
    ).items():
        assert rope[name] == ours, name
    # And back: what transformers writes has rope_parameters.
    theirs.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )
    assert Config.from_json(tmp_path / "theirs") == config


def test_transformers_builds_the_model_it_is_promised(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    TINY.to_json(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    biases = TINY.n_routed_experts * 1  # buffers there, counted by us with the router
    assert model.num_parameters() + biases == parameters_by_part(TINY)["main"]


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, num_key_value_heads=2, num_nextn_predict_layers=2),
        replace(PLAIN, kv_lora_rank=8, qk_nope_head_dim=8),
        replace(TINY, n_shared_experts=0),
        replace(TINY, kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=0),
    ],
    ids=["plain", "gqa and mtp", "mla, dense", "no shared expert", "moe, plain"],
)
def test_other_models_have_another_name(tmp_path, config) -> None:
    config.to_json(tmp_path)
    words = json.loads((tmp_path / "config.json").read_text())
    assert words["model_type"] == "minidsv3"
    assert "architectures" not in words
    assert Config.from_json(tmp_path) == config


def test_both_forms_of_rope_are_read() -> None:
    words = {n: v for n, v in RELEASED.items() if not n.startswith("rope_")}
    yarn = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"}
    newer = {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}
    assert config_json.from_words({**words, "rope_parameters": newer}) == V3
    assert config_json.from_words({**RELEASED, "rope_parameters": newer}) == V3
    default = {"rope_type": "default", "rope_theta": 50000.0}
    moonlight = config_json.from_words({**words, "rope_parameters": default})
    assert (moonlight.rope_theta, moonlight.rope_scaling) == (50000.0, None)
    short = config_json.from_words(words)  # as before the contexts were extended
    assert (short.rope_theta, short.rope_scaling) == (10000.0, None)


def test_absent_mtp_means_none_and_null_means_off() -> None:
    words = {n: v for n, v in RELEASED.items() if n != "num_nextn_predict_layers"}
    words |= {"q_lora_rank": None, "rope_scaling": None}  # as Moonlight's
    config = config_json.from_words(words)
    assert config.num_nextn_predict_layers == 0
    assert config.q_lora_rank is None
    assert config.rope_scaling is None
    no_shared = config_json.from_words({**words, "n_shared_experts": None})
    assert no_shared.n_shared_experts == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': must be 'deepseek_v3'"),
        ({"model_type": None}, "model_type = None"),
        ({"model_type": ["deepseek_v3"]}, "model_type = ["),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax': must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy': must be 'noaux_tc'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ({"attention_bias": True}, "attention_bias = True: must be False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True: must be False"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False: must be True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2: must be 1"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1: must be 0.0"),
        ({"rope_interleave": False}, "rope_interleave = False: must be True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear': must be 'yarn'"),
        ({"rope_scaling": {}}, "rope_scaling.type = None"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object or null"),
        ({"rope_parameters": 3}, "rope_parameters = 3: must be an object or null"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_param"),
        (
            {"rope_parameters": {**RELEASED["rope_scaling"], "rope_theta": 5e4}},
            "rope_theta and rope_parameters contradict",
        ),
        (
            {"rope_scaling": {**RELEASED["rope_scaling"], "rope_type": "linear"}},
            "rope_scaling.type = 'yarn'",
        ),
        (
            {"rope_scaling": {**RELEASED["rope_scaling"], "truncate": False}},
            "rope_scaling.truncate is not implemented for YaRN",
        ),
        ({"hidden_size": "7168"}, "hidden_size = '7168': must be a whole number"),
        ({"hidden_size": None}, "hidden_size = None: must be a whole number"),
        ({"rope_theta": [1e4]}, "rope_theta = [10000.0]: must be a number"),
        ({"n_group": 7}, "n_group = 7: must be a divisor of n_routed_experts, 256"),
    ],
)
def test_a_file_of_another_model_is_refused_by_name(tmp_path, changes, message) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**RELEASED, **changes}))
    with pytest.raises(ConfigError) as refusal:
        Config.from_json(file)
    assert str(refusal.value).startswith(f"{file}: ")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["kv_lora_rank", "q_lora_rank", "n_group", "v_head_dim"]
)
def test_a_missing_size_is_not_guessed(name) -> None:
    words = {n: v for n, v in RELEASED.items() if n != name}
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        config_json.from_words(words)


def test_a_missing_size_of_a_plain_model_is_named_too() -> None:
    words = config_json.to_words(PLAIN)
    del words["v_head_dim"]
    with pytest.raises(ConfigError, match="v_head_dim is missing"):
        config_json.from_words(words)
    del words["kv_lora_rank"], words["n_group"]  # those are off unless set
    assert config_json.from_words({**words, "v_head_dim": 32}) == PLAIN


@pytest.mark.parametrize("name", sorted(RELEASED["rope_scaling"].keys() - {"type"}))
def test_a_missing_number_of_yarn_is_named(name) -> None:
    yarn = {n: v for n, v in RELEASED["rope_scaling"].items() if n != name}
    with pytest.raises(ConfigError, match=f"rope_scaling.{name} is missing"):
        config_json.from_words({**RELEASED, "rope_scaling": yarn})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=3,
)


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from([*RELEASED, "rope_parameters"]), value=JSON)
def test_whatever_stands_in_the_file_the_answer_is_a_config_or_its_error(name, value):
    message = ""
    try:
        config = config_json.from_words({**RELEASED, name: value})
    except ConfigError as error:
        message = str(error)
    if message:
        assert name.split("_")[0] in message  # rope_parameters may say rope_scaling
    else:
        assert config_json.from_words(config_json.to_words(config)) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"[1, 2]", "expected an object of names and values, got [1, 2]"),
        (b"{}", "model_type = None"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, message) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        Config.from_json(tmp_path)
    assert message in str(refusal.value)
    assert "config.json" in str(refusal.value)


def test_a_missing_file_is_named(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.json"):
        with pytest.raises(ConfigError, match="there is no file"):
            Config.from_json(path)


def test_writing_takes_a_file_or_a_folder_and_makes_it(tmp_path) -> None:
    assert TINY.to_json(tmp_path / "a" / "b") == tmp_path / "a" / "b" / "config.json"
    assert TINY.to_json(str(tmp_path / "c.json")) == tmp_path / "c.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c.json"]
    (tmp_path / "folder.json").mkdir()
    assert TINY.to_json(tmp_path / "folder.json").name == "config.json"
    assert Config.from_json(tmp_path / "a" / "b") == Config.from_json(
        tmp_path / "c.json"
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    file = TINY.to_json(tmp_path)
    before = file.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        MINI.to_json(tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# --- what is refused --------------------------------------------------------------

EVERY_SIZE = [f.name for f in fields(Config) if f.type in ("int", int)]
IMPOSSIBLE = [
    (PLAIN, {"num_attention_heads": 6}, "num_key_value_heads = 4: must be a divisor"),
    (PLAIN, {"num_key_value_heads": 8}, "num_key_value_heads = 8: must be a divisor"),
    (PLAIN, {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7: must be even"),
    (PLAIN, {"qk_rope_head_dim": 0}, "qk_rope_head_dim = 0: must be at least 2"),
    (PLAIN, {"qk_nope_head_dim": 8}, "qk_nope_head_dim = 8: must be 0, because"),
    (PLAIN, {"q_lora_rank": 8}, "q_lora_rank = 8: must be None, because"),
    (PLAIN, {"kv_lora_rank": 8}, "qk_nope_head_dim = 0: must be at least 1 with MLA"),
    (TINY, {"kv_lora_rank": 0}, "kv_lora_rank = 0: must be at least 1"),
    (TINY, {"kv_lora_rank": None}, "q_lora_rank = 14: must be None, because"),
    (TINY, {"num_key_value_heads": 2}, "num_key_value_heads = 2: must be num_attent"),
    (TINY, {"n_routed_experts": None}, "n_shared_experts = 1: must be 0, because"),
    (TINY, {"n_routed_experts": 10}, "n_group = 4: must be a divisor of n_routed_exp"),
    (TINY, {"n_routed_experts": 1, "n_group": 1}, "n_routed_experts = 1: must be at"),
    (TINY, {"n_routed_experts": 4}, "n_group = 4: must be at most 2: a group's score"),
    (TINY, {"topk_group": 5}, "topk_group = 5: must be at most n_group, 4"),
    (TINY, {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be at most 4"),
    (TINY, {"num_experts_per_tok": None}, "num_experts_per_tok = None: must be set"),
    (TINY, {"moe_intermediate_size": None}, "moe_intermediate_size = None: must be s"),
    (
        PLAIN,
        {"num_experts_per_tok": 2},
        "num_experts_per_tok = 2: must be None, because",
    ),
    (PLAIN, {"topk_group": 2, "n_group": 2}, "n_group = 2: must be 1, because"),
    (PLAIN, {"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5: must be 1"),
    (
        PLAIN,
        {"first_k_dense_replace": 1},
        "first_k_dense_replace = 1: must be 0, because",
    ),
    (TINY, {"first_k_dense_replace": 3}, "first_k_dense_replace = 3: must be at most"),
    (TINY, {"first_k_dense_replace": -1}, "first_k_dense_replace = -1: must be at le"),
    (TINY, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1: must be"),
    (PLAIN, {"rope_theta": 1.0}, "rope_theta = 1.0: must be finite and more than 1"),
    (PLAIN, {"rope_theta": float("inf")}, "rope_theta = inf: must be finite"),
    (PLAIN, {"rope_theta": "10000"}, "rope_theta = '10000': must be a number"),
    (PLAIN, {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0: must be finite and more than"),
    (PLAIN, {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be finite"),
    (PLAIN, {"rms_norm_eps": True}, "rms_norm_eps = True: must be a number"),
    (PLAIN, {"rope_scaling": {"factor": 40}}, "must be a Yarn(…) or None"),
    (PLAIN, {"scoring_func": "softmax"}, "scoring_func = 'softmax': must be 'sigmoid'"),
    (PLAIN, {"moe_layer_freq": True}, "moe_layer_freq = True: must be 1"),
    (PLAIN, {"norm_topk_prob": 1}, "norm_topk_prob = 1: must be True"),
    (V3, {"max_position_embeddings": 2048}, "original_max_position_embeddings = 4096"),
]


@pytest.mark.parametrize(("base", "changes", "message"), IMPOSSIBLE)
def test_impossible_values_name_field_value_and_remedy(base, changes, message) -> None:
    with pytest.raises(ConfigError) as refusal:
        replace(base, **changes)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", EVERY_SIZE)
@pytest.mark.parametrize("value", [-1, True, 2.0, "2", None, np.float32(2), [2]])
def test_no_size_is_anything_but_a_whole_number(name, value) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        replace(TINY, **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "factor = 0.5: must be at least 1"),
        ({"factor": "40"}, "factor = '40': must be a number"),
        ({"original_max_position_embeddings": 0}, "embeddings = 0: must be at least 1"),
        ({"original_max_position_embeddings": 4096.0}, "= 4096.0: must be a whole num"),
        (
            {"beta_fast": 1},
            "beta_fast = 1.0: must be more than beta_slow, which is 1.0",
        ),
        ({"beta_slow": 0}, "beta_slow = 0: must be finite and more than 0"),
        ({"mscale": 0}, "mscale = 0: must be finite and more than 0"),
        ({"mscale": 0.707}, "mscale = 0.707: must be equal to mscale_all_dim"),
    ],
)
def test_yarn_refuses_its_own(change, message) -> None:
    with pytest.raises(ConfigError) as refusal:
        replace(V3.rope_scaling, **change)
    assert str(refusal.value).startswith("rope_scaling.")
    assert message in str(refusal.value)


def test_a_config_is_frozen_hashable_and_checked_again() -> None:
    with pytest.raises(FrozenInstanceError):
        TINY.hidden_size = 3
    assert hash(V3) == hash(config_json.from_words(RELEASED))
    wider = replace(TINY, hidden_size=64)
    assert (wider.hidden_size, TINY.hidden_size) == (64, 32)
    with pytest.raises(TypeError, match="hidden_sise"):
        replace(TINY, hidden_sise=64)


def test_the_edges_are_allowed() -> None:
    replace(V3, max_position_embeddings=4096)
    replace(V3.rope_scaling, factor=1)
    replace(TINY, topk_group=4, num_experts_per_tok=8, first_k_dense_replace=2)
    replace(TINY, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1)


def test_numbers_are_stored_as_pythons_own() -> None:
    config = replace(PLAIN, hidden_size=np.int32(64), rope_theta=np.float32(100))
    assert type(config.hidden_size) is int
    assert type(config.rope_theta) is float
    assert json.loads(json.dumps(config_json.to_words(config)))["hidden_size"] == 64
    assert replace(PLAIN, rope_theta=10000) == PLAIN


def sizes(least: int = 1, most: int = 400) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any config that should be possible, with each mechanism on or off."""
    kv_heads, each = draw(sizes(1, 8)), draw(sizes(1, 4))
    layers = draw(sizes(1, 9))
    words = {
        name: draw(sizes())
        for name in ("vocab_size", "hidden_size", "intermediate_size", "v_head_dim")
    }
    if draw(st.booleans()):
        words["kv_lora_rank"] = draw(sizes())
        words["q_lora_rank"] = draw(st.none() | sizes())
        words["qk_nope_head_dim"] = draw(sizes())
        each = 1
    if draw(st.booleans()):
        groups, in_group = draw(sizes(1, 8)), draw(sizes(2, 9))
        kept = draw(sizes(1, groups))
        words |= {"n_routed_experts": groups * in_group, "n_group": groups}
        words |= {"topk_group": kept, "moe_intermediate_size": draw(sizes())}
        words["num_experts_per_tok"] = draw(sizes(1, kept * in_group))
        words["n_shared_experts"] = draw(sizes(0, 2))
        words["first_k_dense_replace"] = draw(sizes(0, layers))
        words["routed_scaling_factor"] = draw(st.floats(0.1, 16))
    if draw(st.booleans()):
        t = draw(st.floats(0.1, 2))
        words["rope_scaling"] = Yarn(
            factor=draw(st.floats(1, 64)),
            original_max_position_embeddings=draw(sizes(1, 100)),
            beta_fast=draw(st.floats(2, 64)),
            beta_slow=draw(st.floats(0.5, 1.5)),
            mscale=t,
            mscale_all_dim=t,
        )
    return Config(
        **words,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * each,
        qk_rope_head_dim=2 * draw(sizes(1, 64)),
        max_position_embeddings=draw(sizes(100, 4096)),
        num_nextn_predict_layers=draw(sizes(0, 3)),
        rms_norm_eps=draw(st.floats(1e-9, 1e-3)),
        rope_theta=draw(st.floats(2, 1e6)),
    )


@settings(deadline=None)  # a loaded machine is no failure
@given(configs())
def test_every_possible_config_survives_the_file(config) -> None:
    text = json.dumps(config_json.to_words(config))
    assert config_json.from_words(json.loads(text)) == config
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    dense = [layer for layer in layers if not config.is_moe_layer(layer)]
    count = config.first_k_dense_replace if config.uses_moe else len(layers)
    assert dense == list(range(count))


# --- training ---------------------------------------------------------------------


def test_training_defaults_are_the_reports() -> None:
    tc = TrainConfig()
    assert (tc.beta1, tc.beta2, tc.weight_decay, tc.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (tc.mtp_weight, tc.mtp_weight_final) == (0.3, 0.1)
    assert (tc.bias_update_speed, tc.balance_weight) == (1e-3, 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"batch_size": 1.5}, "batch_size = 1.5: must be a whole number"),
        ({"sequence_length": 0}, "sequence_length = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps = -1: must be at least 0"),
        ({"warmup_steps": 1001}, "warmup_steps = 1001: must be at most steps, 1000"),
        ({"learning_rate": 0}, "learning_rate = 0: must be finite and more than 0"),
        ({"learning_rate": None}, "learning_rate = None: must be a number"),
        ({"min_learning_rate": 1}, "min_learning_rate = 1.0: must be at most learning"),
        ({"min_learning_rate": -1e-9}, "min_learning_rate = -1e-09: must be finite an"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: must be finite and at least 0"),
        ({"beta1": 1.0}, "beta1 = 1.0: must be less than 1"),
        ({"beta2": -0.1}, "beta2 = -0.1: must be finite and at least 0"),
        ({"adam_eps": 0.0}, "adam_eps = 0.0: must be finite and more than 0"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0: must be finite and more than 0"),
        ({"init_std": float("nan")}, "init_std = nan: must be finite"),
        ({"mtp_weight": -1}, "mtp_weight = -1: must be finite and at least 0"),
        ({"mtp_weight_final": False}, "mtp_weight_final = False: must be a number"),
        ({"bias_update_speed": -1}, "bias_update_speed = -1: must be finite"),
        ({"balance_weight": float("inf")}, "balance_weight = inf: must be finite"),
    ],
)
def test_impossible_training_is_refused(changes, message) -> None:
    with pytest.raises(ConfigError) as refusal:
        replace(TrainConfig(), **changes)
    assert message in str(refusal.value)


def test_training_at_the_edges_is_allowed() -> None:
    TrainConfig(steps=1, warmup_steps=1, batch_size=1, sequence_length=1)
    TrainConfig(min_learning_rate=2e-3, weight_decay=0, beta1=0.0, mtp_weight=0)


def test_a_number_beyond_every_float_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope_theta = 1000.*must be finite"):
        replace(TINY, rope_theta=10**400)


def test_a_file_nested_too_deep_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        Config.from_json(tmp_path)
