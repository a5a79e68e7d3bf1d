r"""The model in PyTorch: `DeepSeekV3`, an ``nn.Module`` with DeepSeek's own names.

Its state dict has the keys of the NumPy dict, so ``load_state_dict`` takes that dict,
and one file feeds NumPy, this module and Hugging Face transformers. It runs wherever
torch does: ``model.to("cuda")``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidsv3 import checkpoints, parameters
from minidsv3.config import Config, TrainConfig
from minidsv3.mla.torch_port import LatentAttention
from minidsv3.model.numpy_ref import loss_names
from minidsv3.moe.torch_port import MoE, Routing, balance_loss, load
from minidsv3.mtp.numpy_ref import check_depths
from minidsv3.mtp.torch_port import MTPModule
from minidsv3.primitives.attention_torch_port import PlainAttention
from minidsv3.primitives.cache import Cache, common_length
from minidsv3.primitives.torch_port import RMSNorm, SwiGLU, linear, rope_rotation


class Block(nn.Module):
    """One transformer block: attention and feed-forward of whichever kind."""

    def __init__(self, config: Config, sparse: bool) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        attention = LatentAttention if config.uses_mla else PlainAttention
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MoE(config) if sparse else SwiGLU(D, config.intermediate_size)

    def forward(
        self, x: Tensor, rotation: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Shapes: x (B, T, D) -> (B, T, D), and where a layer of experts sent it.

        The first chunk that a cache receives is read naively, what follows in the form
        that multiplies less.
        """
        u, attention = self.input_layernorm(x), self.self_attn
        form: dict[str, bool] = {}
        if cache is not None and isinstance(attention, LatentAttention):
            few = x.shape[1] < attention.crossover
            form["absorbed"] = cache.length > 0 and few
        x = x + attention(u, rotation, cache, **form)
        u = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(u)
            return x + y, routing
        return x + self.mlp(u), None

    def remember(self, x: Tensor, rotation: Tensor, cache: Cache) -> None:
        """Leave x (B, T, D) in the cache for what follows, and answer nothing."""
        self.self_attn.remember(self.input_layernorm(x), rotation, cache)


class Loss(NamedTuple):
    """What `DeepSeekV3.loss` returns: ``losses["total"].backward()``."""

    losses: dict[str, Tensor]  # nats a token, under the names of `loss_names`
    load: dict[str, Tensor]  # tokens an expert (E,), by the name of the layer's bias


class DeepSeekV3(nn.Module):
    """The whole model; fresh weights are those of `parameters.initialise`.

    seed and init_std set them. Under ``torch.device("meta")`` no memory is taken.
    """

    def __init__(self, config: Config, seed: int = 0, init_std: float = 0.02) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):
            self._build(config)
        if device.type != "meta":
            fresh = parameters.initialise(config, seed, init_std)
            self.load_state_dict(tensors(fresh), assign=True)
            self.to(device)

    def _build(self, config: Config) -> None:
        D, L = config.hidden_size, config.num_hidden_layers
        layers = [Block(config, config.is_moe_layer(n)) for n in range(L)]
        for n in range(L, L + config.num_nextn_predict_layers):
            block = Block(config, config.is_moe_layer(n))
            layers.append(MTPModule(D, config.rms_norm_eps, block))
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(D, config.rms_norm_eps)
        self.lm_head = linear(D, config.vocab_size)

    def forward(self, ids: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits of the next token at every position: ids (B, T) -> (B, T, vocab).

        With caches, one a layer, ids continue what they hold. MTP modules are not
        asked. Raises ValueError for ids that are no integers, lie outside the
        vocabulary or exceed ``max_position_embeddings``.
        """
        h, _ = self.hidden_states(ids, caches)
        return self.lm_head(h)

    def hidden_states(
        self, ids: Tensor, caches: Sequence[Cache] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """What the head reads, (B, T, D) after the final norm, and every routing."""
        _check_ids(ids, self.config)
        x, L = self.model.embed_tokens(ids), self.config.num_hidden_layers
        T = ids.shape[1]
        if caches is None:
            positions = np.arange(T)
        else:
            common_length(caches, L)
            positions = caches[0].positions(T)
        rotation = self._rotation(positions)
        routings = []
        for n in range(L):
            cache = None if caches is None else caches[n]
            x, routing = self.model.layers[n](x, rotation, cache)
            routings += [routing] if routing else []
        return self.model.norm(x), routings

    def loss(self, ids: Tensor, train_config: TrainConfig | None = None) -> Loss:
        """Losses of one batch, ready for ``backward``, and the load of every expert.

        ids (B, T+1): the first T columns are read, the last T are predicted. The losses
        are those of `loss_names`; total = main + λ/D · (mtp_1 + … + mtp_D) + α ·
        balance (eqs. 17 and 25). λ and α are train_config's ``mtp_weight`` and
        ``balance_weight``. Raises ValueError for too few columns, and for ids as
        `forward` does.
        """
        config, c = self.config, train_config or TrainConfig()
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise ValueError(
                f"ids of shape {tuple(ids.shape)}: needs (batch, time), with two "
                "columns at least"
            )
        D = config.num_nextn_predict_layers
        check_depths(ids, D)
        _check_ids(ids[:, -1:], config)  # a target alone; the others are read, too
        h, routings = self.hidden_states(ids[:, :-1])
        values = [self._head_loss(h, ids[:, 1:])]
        sequences = [ids.shape[1] - 1] * len(routings)
        e = self.model.embed_tokens(ids[:, :-1])
        for k in range(1, D + 1):  # depth k reads h_1 … h_{T-k} and t_{k+1} … t_T
            module = self.model.layers[config.num_hidden_layers + k - 1]
            h, routing = module(
                h[:, :-1], e[:, k:], self._rotation(np.arange(ids.shape[1] - 1 - k))
            )
            values.append(self._head_loss(h, ids[:, k + 1 :]))
            if routing:
                routings.append(routing)
                sequences.append(ids.shape[1] - 1 - k)
        total = values[0] + c.mtp_weight * sum(values[1:]) / max(D, 1)
        if routings:
            K = config.num_experts_per_tok
            balances = [
                balance_loss(r.affinities.unflatten(0, (-1, T)), K)
                for r, T in zip(routings, sequences, strict=True)
            ]
            values.append(sum(balances))
            total = total + c.balance_weight * values[-1]
        losses = dict(zip(loss_names(config), [*values, total], strict=True))
        return Loss(losses, self._load(routings))

    def _head_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.lm_head(h), targets)

    def _load(self, routings: list[Routing]) -> dict[str, Tensor]:
        biases = (n for n, _ in self.named_buffers())
        E = self.config.n_routed_experts
        return {
            name: load(routing.experts, E)
            for name, routing in zip(biases, routings, strict=True)
        }

    def draft_states(
        self, h: Tensor, ids: Tensor, cache: Cache, answer: bool = True
    ) -> Tensor | None:
        """What the head reads of MTP module 1, for drafting: (B, T, D).

        It reads the pairs (h_i, t_{i+1}): h (B, T, D) of `hidden_states`, ids (B, T)
        one place further on. The cache is the module's own. Without answer the pairs
        are only left there, which costs little: there is one block, and nobody reads
        what it would say. Raises ValueError for a model without modules.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError(
                "num_nextn_predict_layers is 0: the model has no MTP module to draft "
                "with"
            )
        _check_ids(ids, self.config)
        module = self.model.layers[self.config.num_hidden_layers]
        rotation = self._rotation(cache.positions(ids.shape[1]))
        e = self.model.embed_tokens(ids)
        if not answer:
            module.block.remember(module.entrance(h, e), rotation, cache)
            return None
        return module(h, e, rotation, cache)[0]

    def _rotation(self, positions: np.ndarray) -> Tensor:
        """The angles of positions (T,) or (B, T); only differences matter.

        Texts of different lengths, (B, T), were measured by whoever settled them; a
        draft that nobody will keep may stand behind the context.
        """
        if positions.ndim == 1:
            _check_length(int(positions[-1]) + 1, self.config)
        return rope_rotation(
            torch.from_numpy(positions.astype(np.float64)),
            self.config,
            self.lm_head.weight,
        )

    def new_caches(self, capacity: int) -> list[Cache]:
        """One empty cache a layer, for ``capacity`` positions."""
        return [Cache(capacity) for _ in range(self.config.num_hidden_layers)]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "DeepSeekV3":
        """Read a model in DeepSeek's layout, one tensor at a time.

        dtype None keeps that of the file (FP8 becomes bfloat16); the biases of the
        routers are float32 at least. What is refused, and how, stands with
        `checkpoints.open_lazily`. Raises ValueError for a dtype that NumPy lacks.
        """
        if dtype not in _NUMPY:
            known = ", ".join(map(str, _NUMPY))
            raise ValueError(f"dtype is {dtype}, must be one of {known}")
        config, params = checkpoints.open_lazily(folder, _NUMPY[dtype])
        with torch.device("meta"):
            model = cls(config)
        for name, array in params.items():
            one = {name: _tensor(array).to(device)}
            model.load_state_dict(one, strict=False, assign=True)
        return model

    def save_pretrained(self, folder: str | Path, dtype: str | None = None) -> None:
        """Write the model; see `checkpoints.save` for ``dtype`` and what is refused."""
        checkpoints.save(folder, self.config, arrays(self), dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats, in float32 at least: logits (B, T, V), targets (B, T)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten().long())


# --- the border to NumPy ------------------------------------------------------------

_NUMPY = {
    None: None,
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def tensors(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The NumPy dict as a state dict: the same memory, no copy."""
    return {name: _tensor(array) for name, array in params.items()}


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The state dict as the NumPy dict; on the processor the same memory."""
    return {name: _array(tensor) for name, tensor in model.state_dict().items()}


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know NumPy's
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _check_length(length: int, config: Config) -> None:
    most = config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"{length} positions asked for, but max_position_embeddings is {most}; "
            "shorten the text or raise the limit"
        )


@torch.compiler.disable
def _check_ids(ids: Tensor, config: Config) -> None:
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "ids must be integers of shape (batch, time), neither axis empty, got "
            f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary "
            f"0…{config.vocab_size - 1}"
        )
