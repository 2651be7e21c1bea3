"""Cut the tokens of texts into windows: for evaluation, for calibration, and for training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError, SourceError
from pocketllm.text.default_texts import named_default
from pocketllm.text.read import read_calibration


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """[N] int64 token ids without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def tokenize_pieces(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> tuple[Tensor, Tensor]:
    """Tokenize the text that pieces make up, at once, so that its tokens are those of the undivided text.

    A token across the end of a piece counts to the piece of its last character.

    Args:
        pieces: (text, mark).

    Returns:
        [N] int64 token ids without special tokens, and [N] bool: the mark of each token's piece.
    """
    text = "".join(piece for piece, _ in pieces)
    ends = torch.tensor([len(piece) for piece, _ in pieces]).cumsum(0)
    marks = torch.tensor([mark for _, mark in pieces])
    ids = tokenize(tokenizer, text)
    if tokenizer.is_fast:
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        last = torch.tensor([end - 1 for _, end in made["offset_mapping"]], dtype=torch.int64)
        return ids, marks[torch.searchsorted(ends, last.clamp(min=0), right=True)]
    # No offsets: a piece ends where the tokens of the text before its end differ from those of all the text.
    counts = [_common(tokenize(tokenizer, text[:end]), ids) for end in ends.tolist()[:-1]]
    places = torch.tensor([*counts, len(ids)])
    return ids, marks[torch.searchsorted(places, torch.arange(len(ids)), right=True)]


def _common(one: Tensor, other: Tensor) -> int:
    """Number of tokens with which both begin."""
    least = min(len(one), len(other))
    return int((one[:least] == other[:least]).long().cumprod(0).sum())


def full_windows(ids: Tensor, context: int) -> Tensor:
    """[N] token ids -> [N // context, context]; the remainder is dropped."""
    return ids[: len(ids) // context * context].reshape(-1, context)


def token_digest(ids: Tensor) -> str:
    """Short SHA-256 of int64 token ids."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def token_windows(tokenizer: Any, text: str, context: int, windows: int | None = None) -> Tensor:
    """[windows, context] int64 token ids: the first windows of the text, the remainder dropped.

    Args:
        windows: number of windows; None takes all.

    Raises:
        ConfigError: a context below 2, fewer than 1 window, or a text too short for these windows.
    """
    if context < 2:
        raise ConfigError(f"context: got {context}, wanted at least 2 tokens")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows: got {windows}, wanted at least 1")
    ids = tokenize(tokenizer, text)
    found = full_windows(ids, context)
    wanted = max(1, len(found) if windows is None else windows)
    if len(found) < wanted:
        raise ConfigError(
            f"the text has {len(ids)} tokens, which is {len(found)} windows of {context}, wanted {wanted}; "
            "lower context or windows, or give more text"
        )
    return found[:wanted]


def calibration_windows(
    tokenizer: Any, texts: list[str], tokens: int, context: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Random windows, about `tokens` tokens, to which texts contribute equally; and how often each token occurs.

    Returns:
        [windows, context] int64, and [largest id of all texts + 1] int64.

    Texts shorter than a window are joined. If all of them together do not fill one, the window is shorter.

    Raises:
        SourceError: the texts have fewer than two tokens.
    """
    read = [tokenize(tokenizer, text) for text in texts]
    sequences = [ids for ids in read if len(ids) >= context]
    short = torch.cat([*(ids for ids in read if len(ids) < context), torch.empty(0, dtype=torch.int64)])
    if len(short) >= context or not sequences:
        sequences.append(short)
        context = min(context, len(short))
    if context < 2:
        raise SourceError(
            f"calibration: the texts have {context} tokens, wanted at least two and preferably thousands; "
            "give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = [full_windows(ids, context) for ids in sequences]
    shares = _equal_shares([len(part) for part in parts], wanted=max(1, tokens // context))
    chosen = []
    for windows, share in zip(parts, shares, strict=True):
        order = torch.randperm(len(windows), generator=generator)[:share]
        chosen.append(windows[order.sort().values])
    return torch.cat(chosen), torch.bincount(torch.cat(read))


def _equal_shares(available: list[int], wanted: int) -> list[int]:
    """Number of windows taken from each text: equal, and more from the others if a text has fewer."""
    shares = [0] * len(available)
    order = sorted(range(len(available)), key=available.__getitem__)
    for done, position in enumerate(order):
        shares[position] = min(available[position], (wanted - sum(shares)) // (len(order) - done))
    return shares


def read_windows(tokenizer: Any, places: tuple[str, ...], context: int) -> Tensor:
    """[windows, context] int64: all windows of texts to train on.

    Args:
        places: files or folders; none takes the text that ships with Python.

    Raises:
        SourceError: a text cannot be read.
        ConfigError: not a single window.
    """
    texts = {place: read_calibration(place, tokenizer=tokenizer) for place in places}
    return all_windows(tokenizer, texts or dict([named_default()]), context)


def all_windows(tokenizer: Any, texts: Mapping[str, str], context: int) -> Tensor:
    """[windows, context] int64: all windows of texts given by name; the remainder of each is dropped.

    Raises:
        ConfigError: not a single window.
    """
    tokens = [tokenize(tokenizer, text) for text in texts.values()]
    found = torch.cat([full_windows(ids, context) for ids in tokens])
    if not len(found):
        raise ConfigError(
            f"the text ({', '.join(texts)}) has {sum(map(len, tokens))} tokens, less than one window of {context}; "
            "give more text or lower the context"
        )
    return found


def split_windows(windows: Tensor, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) windows, chosen at random; at most a tenth is kept for validation, at least one.

    Raises:
        ConfigError: fewer than two windows.
    """
    if len(windows) < 2:
        raise ConfigError(
            f"the text has {len(windows)} window of {windows.shape[1]} tokens, wanted at least two "
            "(one to train, one to validate); give more text or lower the context"
        )
    train, kept = split_numbers(len(windows), validation, one_in=10, seed=seed)
    return windows[train], windows[kept]


def split_numbers(items: int, validation: int, one_in: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the (training, validation) items, [n] int64 in order, split at random.

    Args:
        validation: items wanted for validation; at most one in `one_in`, and at least one.
    """
    count = min(validation, max(1, items // one_in))
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values
