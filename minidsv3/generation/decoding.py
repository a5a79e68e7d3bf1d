r"""The loop that writes text: sampling, speculation, stops, batches of many lengths.

Whoever computes, the loop is this one. A `Decoder` knows a model, a `Session` of it
holds the caches of one batch. Each text of a batch advances on its own: where a draft
was kept it is two tokens further, where not, one.
"""

import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from minidsv3.config import Config
from minidsv3.generation.numpy_ref import Speculation, check_sampling
from minidsv3.generation.prompts import Request, checked, side_by_side
from minidsv3.generation.rules import Given, Greedy, Sampled, Uniforms
from minidsv3.generation.stopping import Ending, endings
from minidsv3.parameters import blame
from minidsv3.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from minidsv3.model.torch_port import DeepSeekV3

    Model = DeepSeekV3 | tuple[dict[str, np.ndarray], Config] | "Decoder"

Array = np.ndarray
PREFILL = 1024  # tokens of a prompt that are read at once
NOTHING = -1  # stands behind a text that ended before the others of its batch


class Session(Protocol):
    """The caches of one batch of B texts, and what reads on from them.

    Text b has read lengths[b] tokens. A step reads T tokens more in each; `keep` says
    how many of them count. Nothing is moved to forget a token: its place is written
    over.
    """

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """Read the prompts, ids (B, T) filled up behind: logits (B, V) of the next."""
        ...

    def step(self, ids: Array) -> Array:
        """Read ids (B, T) behind what is kept: logits (B, T, V)."""
        ...

    def keep(self, counts: Array) -> None:
        """Of the step before, counts (B,) tokens of each text belong to it."""
        ...

    def draft(self, ids: Array, counts: Array) -> Array:
        """MTP module 1 reads the first counts[b] of ids (B, T), each with the hidden
        state before it; logits (B, V) of the token after the last."""
        ...

    def select(self, texts: Array) -> None:
        """Go on with these texts alone; the others have ended."""
        ...


class Decoder(Protocol):
    """A model that can decode."""

    config: Config

    def session(self, B: int, capacity: int, drafts: bool, chunk: int) -> Session:
        """Caches for B texts of up to ``capacity`` tokens, prompts read by chunks."""
        ...

    def culprit(self) -> str | None:
        """The name of a parameter that holds NaN or infinity, if one does."""
        ...


class Step(NamedTuple):
    """What one pass of the trunk brought: new tokens of each text, counts so far."""

    tokens: list[list[int]]  # of each text: none if it has ended, else one or two
    statistics: Speculation


# --- what a caller asks -------------------------------------------------------------


def generate(
    model: "Model",
    ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    speculative: bool = True,
    seed: int | Sequence[int] | None = None,
    *,
    stop: Sequence[str | bytes | int] = (),
    tokenizer: Tokenizer | None = None,
    chunk: int = PREFILL,
) -> "Tensor | Array":
    """Continue texts; returns the new ids alone, (B, n), behind a stop `NOTHING`.

    model is a PyTorch model, a pair (params, config) for NumPy, or a `Decoder`. All
    arguments are those of `stream`. A tensor on the device of a PyTorch model, else an
    array.
    """
    decoder = decoder_for(model)
    speculative = _drafting(decoder.config, speculative)
    steps = stream(
        decoder, ids, max_new_tokens, temperature, top_p, speculative, seed,
        stop=stop, tokenizer=tokenizer, chunk=chunk,
    )  # fmt: skip
    texts: list[list[int]] = []
    for step in steps:
        texts = texts or [[] for _ in step.tokens]
        for text, new in zip(texts, step.tokens, strict=True):
            text += new
    new_ids = side_by_side(texts, NOTHING)
    if hasattr(model, "session") or isinstance(model, tuple):
        return new_ids
    import torch

    return torch.from_numpy(new_ids).to(model.lm_head.weight.device)


def stream(
    model: "Model",
    ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    speculative: bool = True,
    seed: int | Sequence[int] | None = None,
    *,
    stop: Sequence[str | bytes | int] = (),
    tokenizer: Tokenizer | None = None,
    chunk: int = PREFILL,
) -> Iterator[Step]:
    r"""Yield the new tokens of each pass of the trunk as they come.

    ids are (B, T), or a list of B texts whose lengths may differ. At temperature 0 the
    largest logit wins (the first of equal ones), above it tokens are drawn from the
    softmax of logits / temperature, cut to the most probable ones that reach top_p.
    With speculative, MTP module 1 drafts: the text is the same at temperature 0, up to
    logits that tie but for rounding, and follows the same law above. A model without
    a module gets a warning and decodes plainly.

    The same seed gives the same text. Each text of a batch has random numbers of its
    own: text b those of ``seed[b]``, or for one seed its b-th stream, of which the
    first is what that seed gives alone. So a text does not depend on its neighbours, up
    to rounding: a batch may be added up in another order.

    A text ends after max_new_tokens, or with the token that completes one of the
    strings in stop, or is one of its ids. Strings need the model's tokenizer (default:
    that of bytes). Prompts are read ``chunk`` tokens at a time, which bounds memory,
    and all to the length of the longest: very different lengths in a batch cost more.

    Raises ValueError for what cannot be done, before anything is computed: an empty
    prompt, ids outside the vocabulary, a text beyond ``max_position_embeddings``, bad
    sampling values, stop strings without a tokenizer. While the text is written,
    FloatingPointError for logits that are not finite, a draft's included.
    """
    decoder = decoder_for(model)
    request = checked(decoder.config, ids, max_new_tokens, chunk)
    check_sampling(temperature, top_p)
    rule = Greedy() if temperature == 0 else Sampled(temperature, top_p)
    B = len(request.lengths)
    ends = endings(stop, tokenizer, decoder.config, B)
    speculative = _drafting(decoder.config, speculative)
    loop = _Loop(decoder, request, rule, ends, Uniforms(seed, B), speculative)
    return loop.run()


def _drafting(config: Config, asked: bool) -> bool:
    """Whether to speculate; the line of our caller's caller is warned if we cannot."""
    if asked and not config.num_nextn_predict_layers:
        warnings.warn(
            "the model has no MTP module to draft with: decoding without speculation",
            stacklevel=3,
        )
        return False
    return asked


def decoder_for(model: "Model") -> Decoder:
    """The fastest decoder at hand for a model; a `Decoder` is its own.

    The compiled loops where they apply: with numba installed, for what
    `CompiledDecoder` takes. They read the weights alone, so a model with hooks, or of
    a class of its own, is asked through its modules instead. The first use on a
    machine compiles, some ten seconds. Raises ValueError for what is no model.
    """
    if hasattr(model, "session"):
        return model
    other, reader = _by_the_model(model)
    if not find_spec("numba") or (reader and not reader.weights_say_all):
        return other
    try:
        from minidsv3.generation.compiled import CompiledDecoder

        params, config = reader.weights if reader else model
        return CompiledDecoder(params, config, reader)
    except ImportError as error:
        warnings.warn(f"decoding without numba, which fails: {error}", stacklevel=3)
    except ValueError:  # not for the loops
        pass
    return other


def _by_the_model(model: "Model") -> tuple[Decoder, Any]:
    """A decoder that asks the model itself, and what reads prompts for torch."""
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], Config):
        from minidsv3.generation.numpy_decoder import NumpyDecoder

        return NumpyDecoder(*model), None
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"model is {type(model).__name__}: give a DeepSeekV3, a pair (params, "
            "config), or a decoder"
        )
    from minidsv3.generation.torch_port import ModuleDecoder

    decoder = ModuleDecoder(model)
    return decoder, decoder.reader


# --- the loop -----------------------------------------------------------------------


class _Loop:
    r"""Prefill, then rounds. Before a round :math:`x_1 … x_n` of a text are settled,
    and :math:`x_n` has not been read.

    Plain: read :math:`x_n`, draw. Speculative: module 1 drafts d for :math:`x_{n+1}`,
    the trunk reads :math:`x_n` and d at once; kept, d and a token after it are
    settled, else the trunk's own. A text that ends leaves the batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: Request,
        rule: Greedy | Sampled,
        endings: list[Ending],
        uniforms: Uniforms,
        speculative: bool,
    ) -> None:
        self.decoder, self.request, self.rule = decoder, request, rule
        self.endings, self.uniforms = endings, uniforms
        self.speculative = speculative
        self.alive = np.arange(len(request.lengths))  # texts that go on
        self.left = np.full(len(request.lengths), request.new)  # tokens to come, each
        self.passes = self.tokens = self.drafts = self.accepted = 0

    def run(self) -> Iterator[Step]:
        ids, lengths = self.request.ids, self.request.lengths
        B, T = ids.shape
        capacity = T + self.request.new + 1  # where others draft, one place too many
        drafts = self.speculative and self.request.new > 2  # 2: nothing to draft
        session = self.decoder.session(B, capacity, drafts, self.request.chunk)
        p = self._law(session.prefill(ids, lengths))
        new = self.rule.draw(p, self.uniforms)[:, None]  # (B, 1)
        counts = np.ones(B, int)  # of new, the tokens that are settled
        while True:
            yield self._settled(new, counts)
            going = np.flatnonzero(self.left > 0)
            if not going.size:
                return
            if len(going) < len(self.left):
                self._select(going, session)
                new, counts = new[going], counts[going]
            if drafts and (self.left > 1).any():
                new, counts = self._guess(session, new, counts)
            else:
                p = self._law(session.step(_last(new, counts)[:, None])[:, 0])
                new = self.rule.draw(p, self.uniforms)[:, None]
                counts = np.ones(len(new), int)
            session.keep(counts)

    def _guess(
        self, session: Session, new: Array, counts: Array
    ) -> tuple[Array, Array]:
        """One speculative round: tokens (B, 2), and how many of them are settled.

        Each text uses four random numbers, needed or not. A text that misses a single
        token takes part, for a step has one width; its token is drawn as it would be
        alone, without a draft and with the first number.
        """
        first = Given(self.uniforms.random(len(counts)))
        q = self._law(session.draft(new, counts))  # (B, V)
        draft = self.rule.draw(q, first)  # (B)
        pair = np.array([_last(new, counts), draft]).T  # (B, 2)
        laws = self._law(session.step(pair))  # (B, 2, V)
        p, after = laws[:, 0], laws[:, 1]
        kept, token = self.rule.judge(p, q, draft, self.uniforms)
        bonus = self.rule.draw(after, self.uniforms)  # (B)
        single = self.left == 1
        if single.any():
            token = np.where(single, self.rule.draw(p, first), token)
            kept = kept & ~single
        self.drafts += len(single) - int(single.sum())
        self.accepted += int(kept.sum())
        return np.array([token, bonus]).T, 1 + kept

    def _law(self, logits: Array) -> Array:
        """The rule's law. Raises FloatingPointError for logits that are not finite."""
        if np.isfinite(logits.sum()) or np.isfinite(logits).all():
            return self.rule.law(logits)
        why = blame(self.decoder.culprit())
        raise FloatingPointError(f"the logits are not finite{why}")

    def _settled(self, new: Array, counts: Array) -> Step:
        """Give each text its settled tokens, up to where it ends; count."""
        texts: list[list[int]] = [[] for _ in self.endings]
        for at, b in enumerate(self.alive.tolist()):
            for token in new[at, : counts[at]].tolist():
                texts[b].append(token)
                self.left[at] -= 1
                if self.endings[b].after(token):
                    self.left[at] = 0
                    break
        self.passes += len(self.alive)
        self.tokens += sum(map(len, texts))
        counted = (self.passes, self.tokens, self.drafts, self.accepted)
        return Step(texts, Speculation(*counted))

    def _select(self, going: Array, session: Session) -> None:
        """Let the texts go that have ended."""
        self.alive, self.left = self.alive[going], self.left[going]
        session.select(going)
        self.uniforms.select(going)


def _last(new: Array, counts: Array) -> Array:
    """The last settled token of each text: new (B, ≤ 2), counts (B,) -> (B,)."""
    return new[np.arange(len(new)), counts - 1]
