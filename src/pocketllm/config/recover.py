"""Settings of recovery: distillation and LoRA, and how both step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketllm.config.checks import at_least, one_of, plain, positive
from pocketllm.errors import ConfigError


@dataclass(frozen=True)
class LoopConfig:
    """How fine-tuning steps, whatever the method.

    batch_size: items per step. micro_batch: items at once, their gradients added up; 0 takes all.
    eval_every: steps between validations. patience: validations without a better one before it stops; 0
        never stops early. checkpoint_every: steps between checkpoints.
    warmup: share of the steps with a rising rate; a cosine follows. max_grad_norm: gradients are scaled down
        to it; 0 is off.
    gradient_checkpointing: compute activations again on the way back instead of keeping them.
    dtype: of the matrix products; auto is bfloat16 where the machine has it, else float32.
    """

    batch_size: int = 8
    micro_batch: int = 0
    eval_every: int = 20
    patience: int = 0
    checkpoint_every: int = 10
    warmup: float = 0.03
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_every", "checkpoint_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("micro_batch", "patience", "max_grad_norm", "seed"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup}, wanted 0 to less than 1")
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class DistillConfig:
    """Tune what is stored beside the indices until the next-token distributions match the dense model's.

    texts: files or folders; none takes the text that comes with Python. context: tokens per window.
    validation_windows: kept out of training. validation_text: take them from here instead.
    lr_codebook, lr_scale, lr_norm, lr_dense: of codebooks, of row scales, of norms, biases and other vectors, and
        of matrices that are stored dense (embedding and head where they are kept), each relative to the size of
        what is tuned (norms of one model differ a hundredfold). lr_decoder: of decoders. A rate of 0 leaves its
        group as it is.
    teacher_top_k: keep the teacher's k most likely tokens, computed once; 0 runs it on every batch.
    label_weight: w in the loss w (-log q) + (1 - w) KL, q of the text's own next token; 0 is the divergence alone.
        With it the model learns the text, too, and comes less close to the dense one.
    """

    steps: int = 200
    context: int = 512
    texts: tuple[str, ...] = ()
    validation_windows: int = 16
    validation_text: str | None = None
    lr_codebook: float = 1e-3
    lr_decoder: float = 1e-4
    lr_scale: float = 1e-3
    lr_norm: float = 1e-3
    lr_dense: float = 3e-4
    teacher_top_k: int = 0
    label_weight: float = 0.0
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("context", self.context, 2)
        at_least("validation_windows", self.validation_windows, 1)
        for name in ("lr_codebook", "lr_decoder", "lr_scale", "lr_norm", "lr_dense", "teacher_top_k"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.label_weight <= 1:
            raise ConfigError(f"label_weight: got {self.label_weight}, wanted 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(self)


@dataclass(frozen=True)
class LoraTuneConfig:
    """Train a low-rank adapter on a frozen compressed base; defaults are the paper's recipe.

    rank, alpha, dropout, targets: as in PEFT; targets is `all-linear` or names of layers.
    epochs: over the text; steps sets the number of steps instead.
    texts: instruction data (JSON or JSON lines) or plain text; none takes the text that comes with Python.
    context: tokens per window of plain text, and the most that are kept of an instruction with its answer.
    mode: how the base is held, `dense` (fast) or `packed` (small).
    """

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float = 1e-4
    context: int = 512
    texts: tuple[str, ...] = ()
    validation_items: int = 64
    mode: str = "dense"
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=16, max_grad_norm=1.0))

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "validation_items"):
            at_least(name, getattr(self, name), 1)
        at_least("context", self.context, 2)
        if self.steps is not None:
            at_least("steps", self.steps, 1)
        for name in ("epochs", "learning_rate"):
            positive(name, getattr(self, name))
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: got {self.dropout}, wanted 0 to less than 1")
        one_of("mode", self.mode, ("dense", "packed"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(self)
