"""Distance between the next-token distributions of a compressed and the dense model, on the same text.

    kl = mean over positions of KL(dense || compressed) = sum over tokens p_dense · (log p_dense − log p)

in nats, over the windows that perplexity is measured on, and the share of positions at which both models have the
same most likely token. Both show small damage that perplexity hides: perplexity can stay the same when errors
cancel, these cannot. Positions of one window depend on each other, so standard errors are taken over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.evaluate.logits import logit_parts
from pocketllm.evaluate.perplexity import check_likelihood, exp_mean
from pocketllm.text.vocabulary import (
    Vocabulary,
    check_positions,
    check_tokens,
    check_vocabularies,
    name_of,
)
from pocketllm.text.windows import token_windows
from pocketllm.torch_state import in_default_torch_state

_LOGITS_AT_ONCE = 128  # positions whose float32 distributions are held at once


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model from a reference, per token.

    perplexity, reference_perplexity: of the model and of the reference. kl: mean KL(reference || model) in nats.
    top1_agreement: share of positions with the same most likely token. *_stderr: standard errors over windows,
    None for a single window. context: tokens per window. windows, tokens: number of scored ones. window_kl: kl of
    each window, for comparing two models window by window.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    context: int
    windows: int
    tokens: int
    window_kl: tuple[float, ...]


@in_default_torch_state
@torch.inference_mode()
def text_divergence(
    model: Any,
    reference: Any,
    tokenizer: Any,
    text: str,
    context: int = 1024,
    windows: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Divergence:
    """KL divergence, top-1 agreement and both perplexities, in one pass over the text.

    Besides the models, memory holds the logits of one window of each (of a part of it, if the vocabulary is large), and
    the float32 distributions of 128 positions.

    Args:
        model, reference: transformers causal language models with the same vocabulary.
        windows: first windows scored; None takes all.
        progress: called with the finished share.

    Raises:
        ConfigError: as `token_windows`; a context longer than a model's positions; vocabularies of different size.
        WeightError: as `check_likelihood`, of either model. SourceError: as `check_tokens`, of either model.
    """
    for each in (model, reference):
        check_positions(each.config, context, name_of(each))
    parts = token_windows(tokenizer, text, context, windows)
    for each in (model, reference):
        check_tokens(each, parts)
    sums = torch.zeros(len(parts), 4, dtype=torch.float64)
    for number, window in enumerate(parts):
        pairs = zip(
            logit_parts(model, window[None].to(model.device)),
            logit_parts(reference, window[None].to(reference.device)),
            strict=True,
        )
        for (part, logits), (_, wanted) in pairs:
            check_vocabularies(
                Vocabulary(name_of(model), logits.shape[-1]),
                Vocabulary(name_of(reference), wanted.shape[-1]),
            )
            targets = window[1:][part].to(logits.device)
            sums[number] += _window_sums(logits, wanted.to(logits.device), targets)
        check_likelihood(float(sums[number, 0]), model)
        check_likelihood(float(sums[number, 1]), reference)
        progress((number + 1) / len(parts))
    tokens = len(parts) * (context - 1)
    means = sums / (context - 1)
    return Divergence(
        perplexity=exp_mean(float(means[:, 0].mean())),
        reference_perplexity=exp_mean(float(means[:, 1].mean())),
        kl=float(means[:, 2].mean()),
        kl_stderr=standard_error(means[:, 2].tolist()),
        top1_agreement=float(means[:, 3].mean()),
        top1_agreement_stderr=standard_error(means[:, 3].tolist()),
        context=context,
        windows=len(parts),
        tokens=tokens,
        window_kl=tuple(means[:, 2].tolist()),
    )


def _window_sums(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """float64 [4]: negative log likelihoods of model and reference, KL, agreements; summed over positions.

    Args:
        logits, reference: [positions, vocabulary].
        targets: [positions] next tokens.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), _LOGITS_AT_ONCE):
        chosen = slice(start, start + _LOGITS_AT_ONCE)
        log_q = logits[chosen].float().log_softmax(-1)
        log_p = reference[chosen].float().log_softmax(-1)
        wanted = targets[chosen, None]
        total[0] -= log_q.gather(1, wanted).double().sum().cpu()
        total[1] -= log_p.gather(1, wanted).double().sum().cpu()
        total[3] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().cpu()
        p = log_p.exp()
        terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)  # masked vocabulary: 0 · −inf
        total[2] += terms.sum(-1).double().sum().cpu()
    return total


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, n − 1 in the variance; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
