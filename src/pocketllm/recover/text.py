"""Text to train on: windows of tokens, some of them kept for validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError
from pocketllm.model.texts import default_text, read_calibration


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """[N] int64 token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]


def windows_of(tokenizer: Any, texts: tuple[str, ...], context: int) -> Tensor:
    """[windows, context] int64: all windows of all texts (files or folders; none takes Python's own).

    Raises:
        SourceError: a text cannot be read. ConfigError: not one window.
    """
    read = [read_calibration(path) for path in texts] or [default_text()]
    tokens = [tokenize(tokenizer, text) for text in read]
    parts = [ids[: len(ids) // context * context].reshape(-1, context) for ids in tokens]
    found = torch.cat(parts)
    if not len(found):
        raise ConfigError(
            f"the text has {sum(map(len, tokens))} tokens, not one window of {context}; "
            "give more text or lower the context"
        )
    return found


def split(windows: Tensor, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) windows: random ones are kept out, at most a tenth of them all but at least one.

    Raises:
        ConfigError: fewer than two windows.
    """
    if len(windows) < 2:
        raise ConfigError(
            f"the text has {len(windows)} window of {windows.shape[1]} tokens, wanted at least two "
            "(one to train, one to validate); give more text or lower the context"
        )
    count = min(validation, max(1, len(windows) // 10))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    kept, rest = order[:count].sort().values, order[count:].sort().values
    return windows[rest], windows[kept]
