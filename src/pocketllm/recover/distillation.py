"""What distillation trains: the compressed model beside its teacher, window by window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pocketllm.config import DistillConfig
from pocketllm.format import checkpoint as ckpt
from pocketllm.recover.divergence import Labels, Target, head_divergence, logits_divergence
from pocketllm.recover.loop import Group
from pocketllm.recover.readout import Readout
from pocketllm.recover.teacher import Teacher
from pocketllm.recover.text import split, warn_of_shared, windows_of
from pocketllm.recover.trainable import TrainableMatrix

_SMALLEST = 1e-3


def training_windows(tokenizer: Any, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """(training, validation) windows of the texts.

    Raises:
        SourceError, ConfigError: as `windows_of` and `split`.
    """
    windows = windows_of(tokenizer, config.texts, config.context)
    if config.validation_text is None:
        return split(windows, config.validation_windows, config.loop.seed)
    warn_of_shared(config.texts, config.validation_text)
    return windows, windows_of(tokenizer, (config.validation_text,), config.context)[
        : config.validation_windows
    ]


class Distillation:
    """The task that the loop trains: a compressed model beside its teacher.

    Args:
        student: in its trainable form. windows: [training, context] and [validation, context] token ids.
    """

    def __init__(
        self,
        student: Any,
        teacher: Teacher,
        windows: tuple[Tensor, Tensor],
        config: DistillConfig,
        dtype: torch.dtype,
    ) -> None:
        self.student, self.teacher, self.config, self.dtype = student, teacher, config, dtype
        self.train, self.validation = windows
        self.items = len(self.train)
        self.readout = Readout.of(student)
        self._targets: dict[int, Target] = {}

    def groups(self) -> list[Group]:
        """Codebooks, decoders, row scales, vectors (norms, biases), and matrices that are not coded."""
        store, config = getattr(self.student, ckpt.STORE), self.config
        gains = [m.gain for m in self.student.modules() if isinstance(m, TrainableMatrix)]
        coded = {id(p) for p in [*store.parameters(), *gains]}
        others = [p for p in self.student.parameters() if p.requires_grad and id(p) not in coded]
        codebooks = [c for c in store.codebooks if c.requires_grad]
        return [
            *(Group("codebooks", config.lr_codebook * _rms(c), [c]) for c in codebooks),
            Group("decoders", config.lr_decoder, [*store.ups, *store.downs]),
            Group("row scales", config.lr_scale, [gain for gain in gains if gain.requires_grad]),
            *(Group("norms and biases", config.lr_norm * _rms(p), [p]) for p in others if p.ndim < 2),
            *(Group("dense matrices", config.lr_dense * _rms(p), [p]) for p in others if p.ndim > 1),
        ]

    def weight(self, numbers: Tensor) -> float:
        """Positions."""
        return float(len(numbers) * self.train.shape[1])

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Gradient of scale * summed divergence of these training windows."""
        ids = self.train[numbers].to(self.student.device)
        loss = self._loss(ids, self.teacher.target(numbers, ids), scale, self.config.label_weight)
        loss.backward()
        return float(loss.detach())

    def validate(self) -> float:
        """Mean loss per position on the validation windows."""
        return self._mean(self.config.label_weight)

    def divergence(self) -> float:
        """Mean KL(teacher || student) per position on the validation windows."""
        return self._mean(0.0)

    @torch.no_grad()
    def _mean(self, label_weight: float) -> float:
        total, size = 0.0, self.config.loop.micro_batch or self.config.loop.batch_size
        for begin in range(0, len(self.validation), size):
            ids = self.validation[begin : begin + size].to(self.student.device)
            numbers = torch.arange(begin, begin + len(ids)) + len(self.train)
            target = self._targets.get(begin) or self.teacher.target(numbers, ids)
            if self.readout.is_plain:  # such targets hold hidden states at most
                self._targets[begin] = target
            total += float(self._loss(ids, target, 1.0, label_weight))
        return total / self.validation.numel()

    def _loss(self, ids: Tensor, target: Target, scale: float, label_weight: float) -> Tensor:
        labels = _labels(ids, label_weight) if label_weight else None
        getattr(self.student, ckpt.STORE).refresh()
        kind = ids.device.type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if not self.readout.is_plain:
                return logits_divergence(self.readout.logits(ids), target, scale, labels)
            hidden = self.readout.hidden(ids)
            weight, bias = self.readout.head()
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        return head_divergence(hidden, weight, bias, target, self.dtype, scale, labels)


def _labels(ids: Tensor, weight: float) -> Labels:
    """Next tokens of windows [B, T], all positions in a row; a window's last one has none, and no weight."""
    weights = torch.full(ids.shape, weight, device=ids.device)
    weights[:, -1] = 0
    return ids.roll(-1, dims=1).reshape(-1), weights.reshape(-1)


def _rms(values: Tensor) -> float:
    """Typical size of numbers; of a vector of zeros a small one, so that it can be tuned."""
    return max(_SMALLEST, float(values.detach().square().mean().sqrt()))
