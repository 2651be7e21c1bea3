"""KL(teacher || student) over the next token, and its gradient, without holding all logits.

A part of the loss may be the negative log likelihood of the text's own next token ("hard labels", Hinton et al.,
arXiv 1503.02531): w (-log q_label) + (1 - w) KL.

[4096, 49152] float32 logits of two models would take 1.6 GB before the softmax. Here the head runs on some
positions at a time (logits of both models, loss and gradient), and only the gradients of hidden states and head
weight are kept. Elementwise work is done on a few positions at a time, which stay in the processor's cache.
Source of the idea: chunked linear cross-entropy, as in Liger Kernel. `LmHead` runs a model up to its head and takes
the loss there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_LOGITS_AT_ONCE = 1 << 24  # logits per model held during the products with the head
_LOGITS_IN_CACHE = 1 << 20  # float32 logits that fit the processor's cache
_PROBE = 4  # tokens

Labels = tuple[Tensor, Tensor]
"""Next tokens [N] int64, and the weight w [N] float32 of their likelihood in the loss."""
Target = Callable[[slice], "Tensor | tuple[Tensor, Tensor]"]
"""Positions -> the teacher's logits [n, V] there, or (token ids [n, k], log-probabilities [n, k])."""


def position_slices(positions: int, vocabulary: int, at_once: int = 0) -> list[slice]:
    """Slices of the positions with at most `at_once` logits each (default: as many as a product may take)."""
    step = max(1, (at_once or _LOGITS_AT_ONCE) // vocabulary)
    return [slice(begin, min(begin + step, positions)) for begin in range(0, positions, step)]


def kl_loss(
    student: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    scale: float,
    labels: Labels | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sum over positions of KL(teacher || student), or of the loss with labels, and `scale` times its gradient.

    If only the teacher's k most likely tokens are known, all others count as one token: a lower bound of the
    divergence, up to the rounding of 1 minus their sum.

    Args:
        student: [n, V] logits.
        target: the teacher at these positions, as a `Target` returns it.
        labels: next tokens at these positions, if they are part of the loss.
        share: of the positions, those with the largest loss; others count as 0.

    Returns:
        sum (float64 scalar), gradient [n, V] in the dtype of `student`.
    """
    losses: list[Tensor] = []
    gradient = torch.empty_like(student)
    in_cache = student.numel() if student.device.type != "cpu" else _LOGITS_IN_CACHE
    for part in position_slices(len(student), student.shape[1], at_once=in_cache):
        logits = student[part].to(torch.float32, copy=True)
        known = _labels_at(labels, part)
        if isinstance(target, tuple):
            found, gradient[part] = _top_k(logits, target[0][part], target[1][part], scale, known)
        else:
            found, gradient[part] = _full(logits, target[part].to(torch.float32, copy=True), scale, known)
        losses.append(found)
    if share < 1:
        every = torch.cat(losses)
        dropped = every.topk(len(every) - math.ceil(share * len(every)), largest=False).indices
        gradient[dropped], losses = 0, [every.index_fill(0, dropped, 0)]
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for part_losses in losses:
        total += part_losses.double().sum()
    return total, gradient


def _labels_at(labels: Labels | None, part: slice) -> Labels | None:
    """The labels at some positions."""
    return None if labels is None else (labels[0][part], labels[1][part])


def _full(
    student: Tensor, target: Tensor, scale: float, labels: Labels | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [n] and gradient of `kl_loss`, from float32 logits of both models; both are overwritten."""
    log_z = student.logsumexp(dim=1, keepdim=True)
    log_p = target.sub_(target.logsumexp(dim=1, keepdim=True))
    log_q = student.sub_(log_z)
    difference = log_p - log_q
    teacher = log_p.exp_()
    losses = difference.mul_(teacher).sum(dim=1)
    if labels is not None:  # the gradient is the one towards a mixture of teacher and label
        losses = _mixed(losses, log_q, labels)
        teacher.mul_(1 - labels[1][:, None]).scatter_add_(1, labels[0][:, None], labels[1][:, None])
    return losses, log_q.exp_().sub_(teacher).mul_(scale)


def _mixed(losses: Tensor, log_q: Tensor, labels: Labels) -> Tensor:
    """(1 - w) losses + w (-log q_label), all [n]."""
    ids, weight = labels
    return losses.lerp(-log_q.gather(1, ids[:, None])[:, 0], weight)


def _top_k(
    student: Tensor, ids: Tensor, log_p: Tensor, scale: float, labels: Labels | None = None
) -> tuple[Tensor, Tensor]:
    """`_full` over k tokens and the rest of the vocabulary as one token; `student` is overwritten."""
    log_q = student.sub_(student.logsumexp(dim=1, keepdim=True))
    chosen, p = log_q.gather(1, ids).exp(), log_p.exp()
    rest_p = (1 - p.sum(dim=1, keepdim=True)).clamp(min=1e-9)
    rest_q = (1 - chosen.sum(dim=1, keepdim=True)).clamp(min=1e-9)
    inside = (p * (log_p - chosen.clamp(min=1e-30).log())).sum(dim=1)
    losses = inside + (rest_p * (rest_p / rest_q).log())[:, 0]
    if labels is None:
        q = log_q.exp_()
        gradient = q.mul_(1 - rest_p / rest_q).scatter_(1, ids, chosen - p)
        return losses, gradient.mul_(scale)
    losses, weight = _mixed(losses, log_q, labels), labels[1][:, None]
    q = log_q.exp_()
    gradient = q.mul_(1 - (1 - weight) * rest_p / rest_q).scatter_(1, ids, chosen - (1 - weight) * p)
    return losses, gradient.scatter_add_(1, labels[0][:, None], -weight).mul_(scale)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, dtype, scale, labels, share):  # type: ignore[no-untyped-def]
        low, low_weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        low_bias = None if bias is None else bias.detach().to(dtype)
        needs = ctx.needs_input_grad
        hidden_grad = torch.empty_like(low) if needs[0] else None
        weight_grad = torch.zeros_like(weight) if needs[1] else None
        bias_grad = torch.zeros_like(bias) if needs[2] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in position_slices(len(hidden), len(weight)):
            logits = linear(low[part], low_weight, low_bias)
            found, gradient = kl_loss(logits, target(part), scale, _labels_at(labels, part), share)
            total += found
            if hidden_grad is not None:
                hidden_grad[part] = gradient @ low_weight
            if weight_grad is not None:
                weight_grad += gradient.T @ low[part]
            if bias_grad is not None:
                bias_grad += gradient.float().sum(dim=0)
        ctx.grads = (
            hidden_grad if hidden_grad is None else hidden_grad.to(hidden.dtype),
            weight_grad,
            bias_grad,
        )
        return total * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g * grad.to(g.dtype) for g in grads), *[None] * 5


def head_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    dtype: torch.dtype,
    scale: float,
    labels: Labels | None = None,
    share: float = 1.0,
) -> Tensor:
    """`scale` times the summed loss of the student whose logits are hidden W^T + b.

    Args:
        hidden: [N, h] inputs of the head.
        weight: [V, h]. bias: [V] or None.
        target: the teacher at the N positions.
        dtype: of the matrix products.
        labels: next tokens at the N positions, if they are part of the loss.
        share: as in `kl_loss`, of the positions whose logits are held together.

    Returns:
        float64 scalar with gradients to hidden, weight and bias.
    """
    return _HeadKL.apply(hidden, weight, bias, target, dtype, scale, labels, share)


class _LogitsKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, scale, labels, share):  # type: ignore[no-untyped-def]
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        ctx.gradient = torch.empty_like(logits)
        for part in position_slices(positions=len(logits), vocabulary=logits.shape[1]):
            known = _labels_at(labels, part)
            found, ctx.gradient[part] = kl_loss(logits[part], target(part), scale, known, share)
            total += found
        return total * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gradient, ctx.gradient = ctx.gradient, None
        return gradient * grad.to(gradient.dtype), *[None] * 4


def logits_kl(
    logits: Tensor, target: Target, scale: float, labels: Labels | None = None, share: float = 1.0
) -> Tensor:
    """`head_kl` for a model whose logits are not simply hidden W^T + b: all logits [N, V] are held."""
    return _LogitsKL.apply(logits, target, scale, labels, share)


@dataclass(frozen=True)
class LmHead:
    """A model's output layer.

    is_plain: logits are hidden W^T + b, so that they can be computed for some positions at a time.
    """

    model: Any
    is_plain: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> LmHead:
        """Determine by a trial run whether the head is plain: no soft-capping or scaling of logits, no adapter
        on it."""
        head, base = model.get_output_embeddings(), model.base_model
        if (
            head is None or base is model or hasattr(head, "base_layer")
        ):  # as PEFT's layers, 0 before training
            return cls(model, False)
        ids = torch.arange(_PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
        output = base(input_ids=ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        logits = model(input_ids=ids, use_cache=False).logits
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return cls(model, False)
        bias = getattr(head, "bias", None)
        plain = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, bias)
        tolerance = 1e-4 if plain.dtype == torch.float32 else 3e-2
        return cls(
            model,
            plain.shape == logits.shape and torch.allclose(plain, logits, rtol=tolerance, atol=tolerance),
        )

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B * T, h], the input of a plain head."""
        found = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return found.reshape(-1, found.shape[-1])

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B * T, V]."""
        found = self.model(input_ids=ids, use_cache=False).logits
        return found.reshape(-1, found.shape[-1])

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, h], bias) of a plain head."""
        module = self.model.get_output_embeddings()
        return module.weight, getattr(module, "bias", None)

    def kl(
        self,
        ids: Tensor,
        target: Target,
        scale: float,
        dtype: torch.dtype,
        *,
        positions: Tensor | None = None,
        labels: Labels | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """`scale` times the KL loss of the model, summed over the positions of `ids` [B, T].

        Args:
            target: the teacher at these positions.
            dtype: of matrix products; float32 runs without autocast.
            positions: numbers [N] of the scored ones among all B * T; None scores all.
            labels: next tokens at the scored positions, if they are part of the loss.
            share: as in `head_kl`.

        Returns:
            float64 scalar with gradients to the model's trained parameters.
        """
        scored = slice(None) if positions is None else positions
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if not self.is_plain:
                return logits_kl(self.logits(ids)[scored], target, scale, labels, share)
            hidden = self.hidden(ids)[scored]
            weight, bias = self.parameters()
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        return head_kl(hidden, weight, bias, target, dtype, scale, labels, share)
