"""Run a causal language model up to its head, and take the loss there.

If the head is a plain linear layer, logits are computed for some positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.recover.kl_loss import Labels, Target, head_kl, logits_kl

_PROBE = 4  # tokens


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
        """Find out by trying whether the head is plain: no soft-capping or scaling of logits, no adapter on it."""
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
    ) -> Tensor:
        """`scale` times the KL loss of the model, summed over the positions of `ids` [B, T].

        Args:
            target: the teacher at these positions.
            dtype: of matrix products; float32 runs without autocast.
            positions: numbers [N] of the scored ones among all B * T; None scores all.
            labels: next tokens at the scored positions, if they are part of the loss.

        Returns:
            float64 scalar with gradients to the model's trained parameters.
        """
        scored = slice(None) if positions is None else positions
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if not self.is_plain:
                return logits_kl(self.logits(ids)[scored], target, scale, labels)
            hidden = self.hidden(ids)[scored]
            weight, bias = self.parameters()
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        return head_kl(hidden, weight, bias, target, dtype, scale, labels)
