"""Training items for LoRA: instructions, whose answers are learned, or windows of plain text, learned whole."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError
from pocketllm.recover.instructions import read_instructions
from pocketllm.recover.text import cut, files_of, own_text, read_text, tokenize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One sequence: token ids [T] int64, and from which position on tokens are learned."""

    ids: Tensor
    learned_from: int

    @property
    def weight(self) -> int:
        """Scored tokens."""
        return len(self.ids) - self.learned_from


def read_items(tokenizer: Any, texts: tuple[str, ...], context: int) -> list[Item]:
    """Training items of all texts, at most `context` tokens each.

    Instructions whose prompt leaves no room for an answer are left out, with a warning.

    Raises:
        SourceError: a text cannot be read. ConfigError: fewer than two items.
    """
    answered: list[Item] = []
    plain: dict[str, list[str]] = {}
    for text in texts:
        for path in files_of(text):
            pairs = read_instructions(path)
            if pairs is None:
                plain.setdefault(text, []).append(read_text(path))
            else:
                answered += [_item(tokenizer, *pair, context) for pair in pairs]
    named = {name: "\n\n".join(parts) for name, parts in plain.items()} if texts else own_text()
    items = [item for item in answered if item.weight > 0]
    lost = ""
    if len(items) < len(answered):
        lost = (
            f"{len(answered) - len(items)} of {len(answered)} instructions leave no room for their answer "
            f"in a context of {context} tokens; raise --context"
        )
    if named:
        items += [Item(window, 1) for window in cut(tokenizer, named, context)]
    if len(items) < 2:
        raise ConfigError(
            f"the text gives {len(items)} items to train on, wanted at least two (one of them to validate); "
            f"{lost or 'give more text or change the context'}"
        )
    if lost:
        logger.warning("%s, or they are not trained on", lost)
    return items


def _item(tokenizer: Any, prompt: str, answer: str, context: int) -> Item:
    """Prompt and answer, ended by the end-of-sequence token; what is too long is cut off."""
    start = tokenize(tokenizer, prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = torch.cat([start, tokenize(tokenizer, answer), torch.tensor(end, dtype=torch.int64)])[:context]
    return Item(ids.long(), max(1, len(start)))
