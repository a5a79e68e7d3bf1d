"""Prompts of different lengths, side by side; what cannot be continued is refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidsv3.config import Config

Array = np.ndarray


@dataclass(frozen=True)
class Request:
    """Prompts side by side, and how many tokens may be added to each."""

    ids: Array  # (B, T), behind the end of the shorter ones their last token again
    lengths: Array  # (B,)
    new: int
    chunk: int


def checked(config: Config, ids: Any, new: int, chunk: int) -> Request:
    """Prompts as an array. Raises ValueError, and says what is wrong with which."""
    texts = [_one_text(text, b, config) for b, text in enumerate(_texts(ids))]
    longest, most = max(map(len, texts)), config.max_position_embeddings
    new, chunk = _count("max_new_tokens", new), _count("chunk", chunk)
    if longest > most:
        raise ValueError(
            f"a prompt has {longest} tokens, but max_position_embeddings is {most}: "
            f"give its last {most} at most"
        )
    if longest + new - 1 > most:  # the last token is not read again
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones do not fit: "
            f"max_position_embeddings is {most}, so at most {most - longest + 1} can "
            "follow"
        )
    lengths = np.array([len(text) for text in texts])
    # filled up with tokens of its own: no text may meet a row that it does not use
    filled = [text + text[-1:] * (longest - len(text)) for text in texts]
    return Request(np.array(filled, np.int64), lengths, new, chunk)


def _count(name: str, value: Any) -> int:
    """A number of tokens. Raises ValueError unless it is whole and positive."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}, must be at least 1, a whole number")
    return int(value)


def _texts(ids: Any) -> list:
    """One entry a text, whether a tensor, an array or a list came."""
    if isinstance(ids, list | tuple):
        texts = [_numpy(text) for text in ids]
    else:
        texts = list(_numpy(ids)) if _numpy(ids).ndim else [ids]
    if not texts or any(np.ndim(_numpy(text)) != 1 for text in texts):
        raise ValueError(
            "the prompt must have shape (batch, time), or be a list of texts, each a "
            f"list of ids; got {_shape(ids)}"
        )
    return texts


def _shape(ids: Any) -> str:
    if isinstance(ids, list | tuple):
        return f"a list of {len(ids)}" + (f" × {type(ids[0]).__name__}" if ids else "")
    return f"shape {tuple(_numpy(ids).shape)}"


def _one_text(text: Any, b: int, config: Config) -> list[int]:
    """The ids of one prompt as a list."""
    text = _numpy(text)
    if text.size == 0:
        raise ValueError(
            f"prompt {b} is empty: give one token at least, a document boundary for "
            "instance"
        )
    if not np.issubdtype(text.dtype, np.integer):
        raise ValueError(f"prompt {b} holds {text.dtype}, ids are integers")
    outside = text[(text < 0) | (text >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"prompt {b}: token id {outside[0]} is outside the vocabulary "
            f"0…{config.vocab_size - 1}"
        )
    return text.tolist()


def _numpy(ids: Any) -> Array:
    """A list, an array or a tensor of any device as an array."""
    if hasattr(ids, "cpu"):
        ids = ids.cpu() if not ids.is_floating_point() else ids.cpu().float()
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise ValueError(
            "the prompt is nested unevenly: give a list of texts, each a list of ids"
        ) from error


def side_by_side(texts: Sequence[Sequence[int]], filler: int) -> Array:
    """Texts of different lengths as one array (B, T)."""
    T = max(map(len, texts))
    return np.array([[*text, *[filler] * (T - len(text))] for text in texts], np.int64)
