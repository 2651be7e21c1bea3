"""Text to train on: windows of tokens, some of them kept for validation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError
from pocketllm.recover.instructions import read_instructions
from pocketllm.text.read import default_text, named, read_calibration, text_files

logger = logging.getLogger(__name__)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """[N] int64 token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]


def files_of(text: str) -> list[Path]:
    """The file that is named, or those in the folder that is named.

    Raises:
        SourceError: an empty name, or a folder without a text in it.
    """
    path = named(text)
    return text_files(path) if path.is_dir() else [path]


def read_text(path: Path) -> str:
    """The text of a file; of instructions, each with its answer in the form it is trained in."""
    pairs = read_instructions(path)
    return read_calibration(path) if pairs is None else "\n\n".join(map("".join, pairs))


def windows_of(tokenizer: Any, texts: tuple[str, ...], context: int) -> Tensor:
    """[windows, context] int64: all windows of all texts (files or folders; none takes Python's own).

    Raises:
        SourceError: a text cannot be read. ConfigError: not one window.
    """
    read = {text: "\n\n".join(map(read_text, files_of(text))) for text in texts}
    return cut(tokenizer, read or own_text(), context)


def warn_of_shared(texts: tuple[str, ...], validation: str) -> None:
    """Warn where the text to validate on is trained on, too: its loss then says little about other text."""
    trained = {path.resolve() for text in texts for path in files_of(text)}
    shared = [path for path in files_of(validation) if path.resolve() in trained]
    if shared:
        logger.warning("%s is trained on and validated on; name another --validation-text", shared[0])


def own_text() -> dict[str, str]:
    """Name and text of what Python brings along."""
    return {"Python's own documentation": default_text()}


def cut(tokenizer: Any, texts: Mapping[str, str], context: int) -> Tensor:
    """[windows, context] int64: all windows of texts, given by their names; what is left over is dropped.

    Raises:
        ConfigError: not one window.
    """
    tokens = [tokenize(tokenizer, text) for text in texts.values()]
    parts = [ids[: len(ids) // context * context].reshape(-1, context) for ids in tokens]
    found = torch.cat(parts)
    if not len(found):
        raise ConfigError(
            f"the text ({', '.join(texts)}) has {sum(map(len, tokens))} tokens, not one window of {context}; "
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
