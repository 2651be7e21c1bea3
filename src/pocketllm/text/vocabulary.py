"""Limits on a model's text: its positions, and the vocabulary that two models must share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.errors import ConfigError, SourceError


def name_of(model: Any) -> str:
    """Where a transformers model was loaded from, for messages."""
    return model.config.name_or_path or "the model"


def positions_of(config: Any) -> int | None:
    """Largest number of tokens in a window, by a model's transformers configuration; None if it sets no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None  # XLNet says -1


def check_positions(config: Any, context: int, name: str) -> None:
    """Check that a model has at least as many positions as a window has tokens.

    Args:
        config: its transformers configuration. context: tokens. name: of the model, for the message.

    Raises:
        ConfigError: it has fewer.
    """
    positions = positions_of(config)
    if positions is not None and context > positions:
        raise ConfigError(f"context: got {context}, {name} has {positions} positions; lower it")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model. name: of the model. size: logits per position.

    ids: number of each token; None if no tokenizer is known.
    """

    name: str
    size: int
    ids: Mapping[str, int] | None = None


def check_vocabularies(own: Vocabulary, dense: Vocabulary) -> None:
    """Check that tokens mean the same to two models, so that they can be compared token by token.

    Raises:
        ConfigError: names both models and how their vocabularies differ.
    """
    advice = f"name the dense model that {own.name} was compressed from"
    if own.size != dense.size:
        raise ConfigError(
            f"{dense.name} has a vocabulary of {dense.size} tokens, {own.name} one of {own.size}; {advice}"
        )
    if own.ids is None or dense.ids is None or own.ids == dense.ids:
        return
    token = next(token for token in {**own.ids, **dense.ids} if own.ids.get(token) != dense.ids.get(token))
    numbers = (ids.get(token, "missing") for ids in (dense.ids, own.ids))
    raise ConfigError(
        f"{dense.name} and {own.name} have the same number of tokens, but different ones "
        f"({token!r} is {' and '.join(map(str, numbers))}); {advice}"
    )


def check_tokens(model: Any, ids: Any) -> None:
    """Check that a model's embedding has a row for every token.

    Args:
        ids: token ids, of any shape.

    Raises:
        SourceError: naming the token: the tokenizer belongs to another model. Or the model has no single embedding.
    """
    embedding = model.get_input_embeddings()  # a packed one decodes all of its weight when that is asked for
    if not hasattr(embedding, "num_embeddings") and not hasattr(embedding, "weight"):
        raise SourceError(f"{name_of(model)}: has no single token embedding, so it cannot be run on text")
    rows = int(embedding.num_embeddings if hasattr(embedding, "num_embeddings") else len(embedding.weight))
    if ids.numel() and int(ids.max()) >= rows:
        raise SourceError(
            f"{name_of(model)}: the tokenizer produces token {int(ids.max())}, the model's embedding has {rows} rows; "
            "the tokenizer belongs to another model"
        )
