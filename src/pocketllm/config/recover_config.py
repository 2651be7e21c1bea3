"""Settings of recovery: distillation, LoRA, and their training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketllm.config.checks import MOST_SEED, at_least, between, one_of, plain, positive
from pocketllm.errors import ConfigError


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the training loop, common to all methods of fine-tuning.

    batch_size: Windows or instructions per step.
    micro_batch: Windows or instructions at once, to save memory; gradients accumulate. 0 takes all.
    eval_every: Steps between validations.
    patience: Validations without improvement before training stops; 0 never stops early.
    checkpoint_every: Steps between checkpoints.
    warmup: Share of the steps (of each cycle) with a rising learning rate; the schedule follows.
    schedule: Learning rate after warm-up: cosine or linear (both fall to 0), or constant.
    cycles: Number of times that the schedule runs; each but the first starts from the best parameters so far (a
        warm restart).
    max_grad_norm: Largest norm of the gradients; 0 is off.
    gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
    dtype: Type of the matrix products: float32, bfloat16, or auto (bfloat16 where the machine supports it).
    seed: Seed of every random choice.
    """

    batch_size: int = 8
    micro_batch: int = 0
    eval_every: int = 20
    patience: int = 0
    checkpoint_every: int = 10
    warmup: float = 0.03
    schedule: str = "cosine"
    cycles: int = 1
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_every", "checkpoint_every", "cycles"):
            at_least(name, getattr(self, name), 1)
        between("seed", self.seed, 0, MOST_SEED)
        for name in ("micro_batch", "patience", "max_grad_norm"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup}, wanted 0 to less than 1")
        one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class DistillConfig:
    """Settings of distillation: tune everything stored except the indices towards the dense model's predictions.

    Learning rates of codebooks, row scales, norms and dense matrices are relative to the size of the tuned
    numbers (norms of one model differ a hundredfold); a rate of 0 leaves its group unchanged.

    steps: Training steps.
    context: Tokens per window.
    texts: Files or folders to train on; the default is Python's own documentation.
    validation_windows: Windows of the text kept for validation.
    validation_text: File or folder to validate on, instead of a part of the training text.
    lr_codebook: Learning rate of codebooks, relative to the size of their values.
    lr_decoder: Learning rate of decoders.
    lr_scale: Learning rate of row scales, relative to their size.
    lr_norm: Learning rate of norms, biases and other vectors, relative to the size of their values.
    lr_dense: Learning rate of matrices that are stored dense (such as kept embeddings), relative to their size.
    teacher_top_k: Compute the teacher's k most likely tokens once; 0 runs the teacher on every batch.
    label_weight: w in the loss w (-log q) + (1 - w) KL, q of the text's own next token; 0 is the divergence
        alone. Above 0 the model also learns the text, and matches the dense model less closely.
    token_share: Share of the tokens that are learned from, those with the largest loss among some hundred at a time;
        1 takes all.
    loop: Settings of the training loop.
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
    token_share: float = 1.0
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("context", self.context, 2)
        at_least("validation_windows", self.validation_windows, 1)
        for name in ("lr_codebook", "lr_decoder", "lr_scale", "lr_norm", "lr_dense", "teacher_top_k"):
            at_least(name, getattr(self, name), 0)
        if not 0 <= self.label_weight <= 1:
            raise ConfigError(f"label_weight: got {self.label_weight}, wanted 0 to 1")
        if not 0 < self.token_share <= 1:
            raise ConfigError(f"token_share: got {self.token_share}, wanted more than 0, at most 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(self)


@dataclass(frozen=True)
class LoraTuneConfig:
    """Settings of LoRA: train a low-rank adapter on a frozen compressed base; defaults are the paper's recipe.

    rank: Rank of the adapter, as in PEFT.
    alpha: Scale of the adapter, as in PEFT: alpha / rank.
    dropout: Dropout of the adapter's inputs.
    targets: Names of layers to adapt, or all-linear.
    epochs: Passes over the text.
    steps: Training steps, instead of epochs; none trains for epochs.
    learning_rate: Learning rate.
    context: Tokens per window of plain text; an instruction with its answer is cut to this length.
    texts: Chats, instructions (rows of JSON or parquet) or plain text; the default is Python's own documentation.
    validation_items: Windows or instructions kept for validation.
    mode: Form of the base in memory: dense (fast) or packed (small).
    dora: Also train the norm of each row (DoRA).
    init: How the adapter starts: zero; error (the closest adapter to the error of the compressed weights); or
        output_error (to the error of the layers' outputs on the text). The last two read the dense model.
    loop: Settings of the training loop.
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
    dora: bool = False
    init: str = "zero"
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
        one_of("init", self.init, ("zero", "error", "output_error"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return plain(self)
