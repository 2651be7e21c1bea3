"""The distillation task: which parameters of a compressed model are trained, and its loss towards the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketllm.config import DistillConfig
from pocketllm.format import checkpoint as ckpt
from pocketllm.recover.base_model import Base, enable_checkpointing
from pocketllm.recover.kl_loss import Labels, LmHead, Target
from pocketllm.recover.loop import Group
from pocketllm.recover.teacher import Teacher
from pocketllm.recover.trainable import TrainableMatrix, make_trainable
from pocketllm.text.read import warn_of_shared
from pocketllm.text.vocabulary import check_tokens
from pocketllm.text.windows import read_windows, split_windows

_SMALLEST = 1e-3


def training_windows(tokenizer: Any, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Read the texts; returns (training, validation) windows, [windows, context] int64 each.

    Raises:
        SourceError, ConfigError: as `read_windows` and `split_windows`.
    """
    windows = read_windows(tokenizer, config.texts, config.context)
    if config.validation_text is None:
        return split_windows(windows, config.validation_windows, config.loop.seed)
    warn_of_shared(config.texts, config.validation_text)
    validation = read_windows(tokenizer, (config.validation_text,), config.context)
    return windows, validation[: config.validation_windows]


def load_student(base: Base, config: DistillConfig, device: Any) -> Any:
    """Load the compressed model in its trainable form."""
    student = base.load("packed", device)
    make_trainable(student, dense=config.lr_dense > 0)
    if config.loop.gradient_checkpointing:
        enable_checkpointing(student)
    return student


def planned_parameters(
    sizes: Mapping[str, tuple[Any, tuple[int, ...]]], config: DistillConfig
) -> dict[str, int]:
    """Number of parameters that would be trained, by group, without loading the model.

    Args:
        sizes: stored name -> (dtype, shape) of the model's tensors.
    """
    rates = {
        "codebooks": config.lr_codebook,
        "decoders": config.lr_decoder,
        "row scales": config.lr_scale,
        "norms and biases": config.lr_norm,
        "dense matrices": config.lr_dense,
    }
    counts: dict[str, int] = {}
    for key, (_, shape) in sizes.items():
        group = _group_of(key, shape)
        if group is not None and rates[group] > 0:
            counts[group] = counts.get(group, 0) + math.prod(shape)
    return counts


def _group_of(key: str, shape: tuple[int, ...]) -> str | None:
    """The name in `Distillation.groups` of the group that trains a stored tensor; None for indices."""
    for part in ("codebooks", "decoders"):
        if key.startswith(f"{ckpt.STORE}.{part}."):
            return part
    if key.endswith(".indices"):
        return None
    if key.endswith(".row_scale"):
        return "row scales"
    return "norms and biases" if len(shape) < 2 else "dense matrices"


class Distillation:
    """The task that the loop trains: a compressed model towards its teacher.

    Args:
        student: in its trainable form.
        windows: [training, context] and [validation, context] token ids.
        dtype: of matrix products.

    Raises:
        SourceError: as `check_tokens`.
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
        check_tokens(student, torch.cat(windows))
        self.train, self.validation = windows
        self.items = len(self.train)
        self.head = LmHead.of(student)
        self._targets: dict[int, Target] = {}

    def groups(self) -> list[Group]:
        """Codebooks, decoders, row scales, vectors (norms, biases), and matrices that are stored dense."""
        store, config = getattr(self.student, ckpt.STORE), self.config
        gains = [m.gain for m in self.student.modules() if isinstance(m, TrainableMatrix)]
        encoded = {id(p) for p in [*store.parameters(), *gains]}
        others = [p for p in self.student.parameters() if p.requires_grad and id(p) not in encoded]
        codebooks = [c for c in store.codebooks if c.requires_grad]
        return [
            *(Group("codebooks", config.lr_codebook * _rms(c), [c]) for c in codebooks),
            Group("decoders", config.lr_decoder, [*store.ups, *store.downs]),
            Group("row scales", config.lr_scale, [gain for gain in gains if gain.requires_grad]),
            *(Group("norms and biases", config.lr_norm * _rms(p), [p]) for p in others if p.ndim < 2),
            *(Group("dense matrices", config.lr_dense * _rms(p), [p]) for p in others if p.ndim > 1),
        ]

    def weight(self, numbers: Tensor) -> float:
        """Number of positions."""
        return float(len(numbers) * self.train.shape[1])

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Add the gradient of scale * the loss summed over these training windows; returns that value."""
        ids = self.train[numbers].to(self.student.device)
        target, config = self.teacher.target(numbers, ids), self.config
        loss = self._loss(ids, target, scale, config.label_weight, config.token_share)
        loss.backward()
        return float(loss.detach())

    def validate(self) -> float:
        """Mean loss per position on the validation windows."""
        return self._mean(self.config.label_weight)

    def divergence(self) -> float:
        """Mean KL(teacher || student) per position on the validation windows."""
        return self._mean(label_weight=0.0)

    @torch.no_grad()
    def _mean(self, label_weight: float) -> float:
        total, size = 0.0, self.config.loop.micro_batch or self.config.loop.batch_size
        for begin in range(0, len(self.validation), size):
            ids = self.validation[begin : begin + size].to(self.student.device)
            numbers = torch.arange(begin, begin + len(ids)) + len(self.train)
            target = self._targets.get(begin) or self.teacher.target(numbers, ids)
            if self.head.is_plain:  # such targets hold hidden states at most
                self._targets[begin] = target
            total += float(self._loss(ids, target, 1.0, label_weight))
        return total / self.validation.numel()

    def _loss(
        self, ids: Tensor, target: Target, scale: float, label_weight: float, share: float = 1.0
    ) -> Tensor:
        labels = _labels(ids, label_weight) if label_weight else None
        getattr(self.student, ckpt.STORE).refresh()
        return self.head.kl(ids, target, scale, self.dtype, labels=labels, share=share)


def _labels(ids: Tensor, weight: float) -> Labels:
    """Next tokens of windows [B, T], flattened; the last position of a window has none and weight 0."""
    weights = torch.full(ids.shape, weight, device=ids.device)
    weights[:, -1] = 0
    return ids.roll(-1, dims=1).reshape(-1), weights.reshape(-1)


def _rms(values: Tensor) -> float:
    """Root mean square, at least a small number so that a vector of zeros can be tuned."""
    return max(_SMALLEST, float(values.detach().square().mean().sqrt()))
