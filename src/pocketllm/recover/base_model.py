"""The compressed model that recovery starts from: opened, checked and loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.calibrate.autocast import fast_dtype
from pocketllm.errors import SourceError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import check_not_nested
from pocketllm.source.dense_checkpoint import open_dense, resolve
from pocketllm.source.folder import need_tokenizer, read_config, read_vocabulary
from pocketllm.text.vocabulary import check_positions, check_vocabularies


@dataclass(frozen=True)
class Base:
    """A compressed model to start from.

    tokenizer: the model's own. identity: as returned by the function `identity`.
    """

    folder: Path
    report: dict[str, Any]
    tokenizer: Any
    identity: str
    trust_remote_code: bool = False

    def load(self, mode: str, device: Any) -> Any:
        """The model in float32, verified, in mode `dense` or `packed`."""
        model, _ = pocketllm.load(
            self.folder, mode=mode, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        )
        return model.to(device)


def open_base(folder: Path, output: Path | None, trust_remote_code: bool = False) -> Base:
    """Check the base without loading its weights.

    Args:
        output: folder of the result, which must not lie in the base; None skips that check.

    Raises:
        FormatError: not a compressed model, or damaged.
        OutputError: the output is the base itself, or lies in it.
        SourceError: no tokenizer, or it cannot be read.
    """
    if output is not None:
        check_not_nested(output, folder)
    report = ckpt.read_report(folder)
    ckpt.verify(folder)
    tokenizer = need_tokenizer(folder, trust_remote_code)
    return Base(
        folder=folder,
        report=report,
        tokenizer=tokenizer,
        identity=identity(report),
        trust_remote_code=trust_remote_code,
    )


def identity(report: Mapping[str, Any]) -> str:
    """Identity of a compressed model, from its report: changes with any bit of its files."""
    return hashlib.sha256(repr(sorted(report["files"].items())).encode()).hexdigest()[:16]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where the machine computes in it at full speed."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return fast_dtype(device)


def check_context(base: Base, context: int) -> None:
    """Check that the model has as many positions as a window has tokens.

    Raises:
        ConfigError: it has fewer.
    """
    check_positions(read_config(base.folder, base.trust_remote_code), context, str(base.folder))


def find_teacher(name: str, base: Base, on_message: Callable[[str], None] = lambda message: None) -> Path:
    """The folder of the dense model of a base: found and checked.

    Raises:
        SourceError: it cannot be found. ConfigError: as `check_teacher`.
    """
    try:
        dense = resolve(name, on_message)
    except SourceError as error:
        raise SourceError(f"the teacher of {base.folder}: {error}; name it with --teacher") from error
    check_teacher(dense, base)
    return dense


def check_teacher(teacher: Path, base: Base) -> None:
    """Check that the teacher is a dense model with the vocabulary of the base.

    Raises:
        ConfigError: it is already compressed, or has another vocabulary; names both.
        SourceError: not a model.
    """
    ckpt.check_dense(teacher, f"the teacher {teacher}", "with --teacher")
    trust = base.trust_remote_code
    open_dense(teacher, trust)  # its errors are clearer, and it refuses pickles
    check_vocabularies(
        read_vocabulary(base.folder, str(base.folder), trust),
        read_vocabulary(teacher, f"the teacher {teacher}", trust),
    )


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; layers stay in evaluation mode (no dropout)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # on the wrapper alone, not on what it contains
