"""Token perplexity in non-overlapping windows, the convention of the GPTQ and AQLM papers.

The whole text is tokenized once without special tokens and cut into windows of `context` tokens; each window
is scored by itself (its first token is given, not scored), and

    perplexity = exp(sum of negative log likelihoods / number of scored tokens).

A figure means something only beside the text, the context length and the number of windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import ConfigError, SourceError, WeightError
from pocketllm.text.vocabulary import check_positions, check_tokens, name_of

_LOGITS_AT_ONCE = 128  # positions whose float32 logits are held at the same time


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and what it was measured on.

    perplexity: per token. context: tokens per window. windows, tokens: scored.
    """

    perplexity: float
    context: int
    windows: int
    tokens: int


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        SourceError: missing, a folder, unreadable, not UTF-8, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise SourceError(f"{path}: a folder; wanted a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file; wanted a UTF-8 text file") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error
    if not text.strip():
        raise SourceError(f"{path}: holds no text")
    return text


def token_windows(tokenizer: Any, text: str, context: int, windows: int | None = None) -> Tensor:
    """[windows, context] int64 token ids: the first windows of the text, the remainder dropped.

    Raises:
        ConfigError: a context below 2, fewer than 1 window, or a text shorter than the windows wanted.
    """
    if context < 2:
        raise ConfigError(f"context: got {context}, wanted at least 2 tokens")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows: got {windows}, wanted at least 1")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    available = len(ids) // context
    wanted = available if windows is None else windows
    if available < max(1, wanted):
        raise ConfigError(
            f"the text has {len(ids)} tokens, which is {available} windows of {context}, wanted "
            f"{max(1, wanted)}; lower context or windows, or give more text"
        )
    return ids[: wanted * context].reshape(wanted, context)


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    context: int = 1024,
    windows: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        model: transformers causal language model, in the dtype to evaluate in.
        windows: first windows scored; None takes all.
        progress: called with the finished share.

    Raises:
        ConfigError: as `token_windows`; or a context longer than the model's positions.
        WeightError: as `check_likelihood`.
    """
    check_positions(model.config, context, name_of(model))
    parts = token_windows(tokenizer, text, context, windows)
    total, scored = 0.0, 0
    check_tokens(model, parts)
    for number, window in enumerate(parts):
        ids = window[None].to(model.device)
        logits = model(ids, use_cache=False).logits[0, :-1]
        total += check_likelihood(_negative_log_likelihood(logits, ids[0, 1:]), model)
        scored += context - 1
        progress((number + 1) / len(parts))
    return Perplexity(exp_mean(total / scored), context, len(parts), scored)


def check_likelihood(value: float, model: Any) -> float:
    """A (negative) log likelihood in nats, as it is; -inf and inf are what a model rules out.

    Raises:
        WeightError: NaN, which is what softmax makes of a NaN or +inf among the logits; names the model.
    """
    if math.isnan(value):
        raise WeightError(
            f"{name_of(model)}: its logits are not finite (NaN or Inf) in {model.dtype}; "
            "look for damaged weights, or evaluate in a wider dtype"
        )
    return value


def exp_mean(mean: float) -> float:
    """Perplexity of a mean negative log likelihood; infinite beyond what a float holds."""
    return math.exp(mean) if mean < 700 else math.inf


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions, softmax in float32, summed in float64."""
    total = 0.0
    for part, wanted in zip(logits.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
        losses = torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        total += float(losses.double().sum())
    return total
