"""Token perplexity in non-overlapping windows, the convention of the GPTQ and AQLM papers.

The text is tokenized once, without special tokens, and cut into windows of `context` tokens; each window is
scored separately (its first token is given, not scored), and

    perplexity = exp(sum of negative log likelihoods / number of scored tokens).

A perplexity is comparable only for the same text, context length and number of windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.errors import WeightError
from pocketllm.evaluate.logits import logit_parts
from pocketllm.text.vocabulary import check_positions, check_tokens, name_of
from pocketllm.text.windows import token_windows
from pocketllm.torch_state import in_default_torch_state

_LOGITS_AT_ONCE = 128  # positions whose float32 logits are held at once


@dataclass(frozen=True)
class Perplexity:
    """A perplexity per token, and what it was measured on.

    context: tokens per window. windows, tokens: number of scored ones.
    """

    perplexity: float
    context: int
    windows: int
    tokens: int


@in_default_torch_state
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
        for part, logits in logit_parts(model, ids):
            total += check_likelihood(_negative_log_likelihood(logits, ids[0, 1:][part]), model)
        scored += context - 1
        progress((number + 1) / len(parts))
    return Perplexity(exp_mean(total / scored), context=context, windows=len(parts), tokens=scored)


def check_likelihood(value: float, model: Any) -> float:
    """Return a (negative) log likelihood in nats unless it is NaN; infinite ones are tokens a model rules out.

    Raises:
        WeightError: NaN, the result of softmax if a logit is NaN or +inf; names the model.
    """
    if math.isnan(value):
        raise WeightError(
            f"{name_of(model)}: its logits are not finite (NaN or Inf) in {model.dtype}; "
            "look for damaged weights, or evaluate in a wider dtype"
        )
    return value


def exp_mean(mean: float) -> float:
    """Perplexity of a mean negative log likelihood; infinite if a float cannot hold it."""
    return math.exp(mean) if mean < 700 else math.inf


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions; softmax in float32, sum in float64."""
    total = 0.0
    for part, wanted in zip(logits.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
        losses = torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        total += float(losses.double().sum())
    return total
