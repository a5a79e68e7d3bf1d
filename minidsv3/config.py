"""One frozen `Config` for every model of the book, and one `TrainConfig` for training.

The names are those of DeepSeek's ``config.json`` (the released file of DeepSeek-V3), so
the same words appear in our code, in theirs and in Hugging Face transformers.
The plain transformer of chapter 1 is the same `Config` with the mechanisms off:

==========================================  ====================================
``n_routed_experts=None``                   no experts, every feed-forward dense
``kv_lora_rank=None``                       plain attention (MHA, GQA or MQA)
``num_nextn_predict_layers=0``              no multi-token prediction
==========================================  ====================================

Values are checked once, when a config is made: an impossible one raises `ConfigError`
with the field, its value and what is allowed. ``dataclasses.replace`` checks again.
`minidsv3.config_json` reads and writes the file.
"""

from collections.abc import Container
from dataclasses import dataclass, fields
from pathlib import Path

from minidsv3.checks import ConfigError as ConfigError
from minidsv3.checks import check_numbers, refuse


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN, the stretched rotary angles of long contexts: ``rope_scaling`` in the file.

    `mscale` and `mscale_all_dim` set the softmax temperature. DeepSeek's code reads the
    first and transformers the second; every released config has them equal, and so
    must yours. Source: the released config.json and DeepSeek-V3 report, section 4.3.
    """

    factor: float  # s: how many times longer the context becomes
    original_max_position_embeddings: int  # the context of the pre-training
    beta_fast: float  # pairs that turn more often than this keep their angle
    beta_slow: float  # pairs that turn less often than this are divided by s
    mscale: float
    mscale_all_dim: float

    def __post_init__(self) -> None:
        positive = dict.fromkeys((field.name for field in fields(self)), 0)
        check_numbers(self, least={}, above=positive, where="rope_scaling.")
        if self.factor < 1:
            refuse("rope_scaling.factor", self.factor, "at least 1")
        if self.beta_fast <= self.beta_slow:
            wish = f"more than beta_slow, which is {self.beta_slow}"
            refuse("rope_scaling.beta_fast", self.beta_fast, wish)
        if self.mscale != self.mscale_all_dim:
            wish = f"equal to mscale_all_dim, which is {self.mscale_all_dim}"
            refuse("rope_scaling.mscale", self.mscale, wish)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model, in DeepSeek's words. Raises `ConfigError`.

    The symbols of the book stand behind the fields. Fields of a mechanism that is off
    must keep their default: half a mechanism is more likely a slip than a wish.
    """

    vocab_size: int  # V: rows of the embedding and of the head
    hidden_size: int  # D
    intermediate_size: int  # width of a dense feed-forward block
    num_hidden_layers: int  # L, without the MTP modules
    num_attention_heads: int  # N_h
    num_key_value_heads: int  # = N_h: MHA (and MLA), fewer: GQA, 1: MQA
    v_head_dim: int  # d_v
    qk_rope_head_dim: int  # d_R: the part of a head that rotates, all of it without MLA
    max_position_embeddings: int  # the longest context

    # Multi-head latent attention; off: None, None, 0.
    kv_lora_rank: int | None = None  # d_c: the cached latent
    q_lora_rank: int | None = None  # d_c': None leaves the queries uncompressed
    qk_nope_head_dim: int = 0  # d_h: the part of a head without position

    # Mixture of experts; off: all as here.
    n_routed_experts: int | None = None  # E
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None  # K
    moe_intermediate_size: int | None = None  # width of one expert
    n_group: int = 1  # groups of E / n_group consecutive experts, a node each
    topk_group: int = 1  # groups a token may reach
    routed_scaling_factor: float = 1.0  # the gates of a token sum to this
    first_k_dense_replace: int = 0  # the first layers that stay dense

    num_nextn_predict_layers: int = 0  # multi-token prediction: modules, one per depth

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None

    # Words of the file that have one meaning here; another value is refused.
    hidden_act: str = "silu"
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    moe_layer_freq: int = 1
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        self._must_keep_defaults(SETTLED, "the one form that is implemented")
        check_numbers(self, LEAST, ABOVE)
        self._check_heads()
        self._check_rope_scaling()
        if self.first_k_dense_replace > self.num_hidden_layers:
            wish = f"at most num_hidden_layers, which is {self.num_hidden_layers}"
            refuse("first_k_dense_replace", self.first_k_dense_replace, wish)
        (self._check_latents if self.uses_mla else self._check_plain_attention)()
        (self._check_experts if self.uses_moe else self._check_no_experts)()

    # What follows from the fields.

    @property
    def uses_mla(self) -> bool:
        """Whether attention caches a latent (MLA) instead of keys and values."""
        return self.kv_lora_rank is not None

    @property
    def uses_moe(self) -> bool:
        """Whether some layers have experts. The MTP modules' blocks then have too."""
        return self.n_routed_experts is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head: the part without position, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has experts; MTP module k is block L + k, from 0.

        Raises IndexError for a block that the model does not have.
        """
        blocks = self.num_hidden_layers + self.num_nextn_predict_layers
        if not 0 <= layer < blocks:
            raise IndexError(f"layer {layer} does not exist: blocks are 0…{blocks - 1}")
        return self.uses_moe and layer >= self.first_k_dense_replace

    # The file.

    @classmethod
    def from_json(cls, path: str | Path) -> "Config":
        """Read ``config.json`` (or the one in a folder); see `config_json.read`."""
        from minidsv3 import config_json

        return config_json.read(path)

    def to_json(self, path: str | Path) -> Path:
        """Write ``config.json``, whole or not at all; see `config_json.write`."""
        from minidsv3 import config_json

        return config_json.write(self, path)

    # The checks.

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            wish = f"a divisor of num_attention_heads, {self.num_attention_heads}"
            refuse("num_key_value_heads", self.num_key_value_heads, wish)
        if self.qk_rope_head_dim % 2:
            wish = "even: RoPE turns pairs"
            refuse("qk_rope_head_dim", self.qk_rope_head_dim, wish)

    def _check_rope_scaling(self) -> None:
        yarn = self.rope_scaling
        if yarn is None:
            return
        if not isinstance(yarn, Yarn):
            refuse("rope_scaling", yarn, "a Yarn(…) or None")
        if yarn.original_max_position_embeddings > self.max_position_embeddings:
            refuse(
                "rope_scaling.original_max_position_embeddings",
                yarn.original_max_position_embeddings,
                f"at most max_position_embeddings, {self.max_position_embeddings}",
            )

    def _check_latents(self) -> None:
        if self.qk_nope_head_dim < 1:
            wish = "at least 1 with MLA (kv_lora_rank is set)"
            refuse("qk_nope_head_dim", self.qk_nope_head_dim, wish)
        if self.num_key_value_heads != self.num_attention_heads:
            wish = f"num_attention_heads, {self.num_attention_heads}, with MLA"
            refuse("num_key_value_heads", self.num_key_value_heads, wish)

    def _check_plain_attention(self) -> None:
        names = ("q_lora_rank", "qk_nope_head_dim")
        self._must_keep_defaults(names, "because kv_lora_rank is None")

    def _check_no_experts(self) -> None:
        self._must_keep_defaults(MOE, "because n_routed_experts is None")

    def _must_keep_defaults(self, names: Container[str], why: str) -> None:
        for field in fields(self):
            value, only = getattr(self, field.name), field.default
            if field.name in names and (value != only or type(value) is not type(only)):
                refuse(field.name, value, f"{only!r}, {why}")

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            if getattr(self, name) is None:
                wish = f"set, because n_routed_experts is {experts}"
                refuse(name, None, wish)
        if experts % groups:
            refuse("n_group", groups, f"a divisor of n_routed_experts, {experts}")
        if experts // groups < 2:
            wish = f"at most {experts // 2}: a group's score is the sum of its best two"
            refuse("n_group", groups, wish + f", and n_routed_experts is {experts}")
        if self.topk_group > groups:
            refuse("topk_group", self.topk_group, f"at most n_group, {groups}")
        kept = experts // groups * self.topk_group
        if self.num_experts_per_tok > kept:
            wish = (
                f"at most {kept}, the experts in {self.topk_group} of {groups} groups"
            )
            refuse("num_experts_per_tok", self.num_experts_per_tok, wish)


# Whole numbers are at least 1, others at least 0, except these.
LEAST = {"qk_rope_head_dim": 2, "n_routed_experts": 2, "qk_nope_head_dim": 0}
LEAST |= {"n_shared_experts": 0, "first_k_dense_replace": 0}
LEAST |= {"num_nextn_predict_layers": 0}
ABOVE = {"rms_norm_eps": 0, "routed_scaling_factor": 0, "rope_theta": 1}
MOE = {"n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group"}
MOE |= {"topk_group", "routed_scaling_factor", "first_k_dense_replace"}
SETTLED = {"hidden_act", "scoring_func", "topk_method", "norm_topk_prob"}
SETTLED |= {"moe_layer_freq", "attention_bias", "tie_word_embeddings"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What training needs and ``config.json`` does not hold. Raises `ConfigError`.

    The defaults of AdamW, clipping, λ, γ and α are DeepSeek-V3's (report, section 4.2);
    `init_std` is not: their 0.006 suits a width of 7168, not ours.
    """

    steps: int = 1000
    batch_size: int = 16  # sequences a step
    sequence_length: int = 128  # T: targets a sequence; T + 1 bytes are read
    learning_rate: float = 2e-3  # the peak, reached after the warm-up
    min_learning_rate: float = 2e-4  # where the cosine ends
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0  # the gradient's norm is cut down to this
    seed: int = 0
    init_std: float = 0.02
    mtp_weight: float = 0.3  # λ
    mtp_weight_final: float = 0.1  # λ late in training
    bias_update_speed: float = 1e-3  # γ
    balance_weight: float = 1e-4  # α
    precision: str = "float32"  # of matrix products: this, or "bfloat16" (PyTorch only)
    accumulate: int = 1  # parts that a batch is worked off in (PyTorch only)

    def __post_init__(self) -> None:
        above = ("learning_rate", "adam_eps", "clip_norm", "init_std")
        check_numbers(self, {"warmup_steps": 0, "seed": 0}, dict.fromkeys(above, 0))
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                refuse(name, getattr(self, name), "less than 1")
        if self.min_learning_rate > self.learning_rate:
            wish = f"at most learning_rate, {self.learning_rate}"
            refuse("min_learning_rate", self.min_learning_rate, wish)
        if self.warmup_steps > self.steps:
            refuse("warmup_steps", self.warmup_steps, f"at most steps, {self.steps}")
        if self.precision not in ("float32", "bfloat16"):
            refuse("precision", self.precision, "'float32' or 'bfloat16'")
        if self.batch_size % self.accumulate:
            wish = f"a divisor of batch_size, which is {self.batch_size}"
            refuse("accumulate", self.accumulate, wish)


# The presets.

PLAIN = Config(  # chapter 1: a transformer without the three mechanisms
    vocab_size=257,  # 256 bytes and the boundary between documents
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    v_head_dim=32,
    qk_rope_head_dim=32,
    max_position_embeddings=512,
)

TINY = Config(  # for tests: everything on, and few widths alike, so that mix-ups show
    vocab_size=257,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    v_head_dim=9,
    qk_rope_head_dim=6,
    max_position_embeddings=64,
    kv_lora_rank=10,
    q_lora_rank=14,
    qk_nope_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)

MINI = Config(  # V3's routing at full breadth, about 10M parameters; sizes may change
    vocab_size=257,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    v_head_dim=32,
    qk_rope_head_dim=16,
    max_position_embeddings=512,
    kv_lora_rank=32,
    q_lora_rank=64,
    qk_nope_head_dim=32,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=32,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)

V3 = Config(  # the released DeepSeek-V3: 671B parameters, 37B of them active
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    v_head_dim=128,
    qk_rope_head_dim=64,
    max_position_embeddings=163840,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    first_k_dense_replace=3,
    num_nextn_predict_layers=1,
    rope_scaling=Yarn(
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
