"""A quick distillation of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm import DistillConfig, LoopConfig
from tests import tiny

SENTENCE = "the quick brown fox jumps over the lazy dog. "


def make(folder: Path) -> Path:
    """A folder with a dense model `m`, its compressed form `c` and a text `t.txt`."""
    torch.manual_seed(0)
    source = tiny.save(folder / "m")
    pocketllm.compress(source, tiny.calibrated(tiny.settings()), folder / "c")
    (folder / "t.txt").write_text(SENTENCE * 40)
    return folder


def quick_loop(**changes: Any) -> LoopConfig:
    """Small batches, validated and saved often, in float32."""
    values = {"batch_size": 4, "eval_every": 4, "checkpoint_every": 3, "dtype": "float32"}
    return LoopConfig(**{**values, **changes})


def config(made: Path, **changes: Any) -> DistillConfig:
    """A quick distillation; `loop` changes settings of the loop."""
    loop = quick_loop(**changes.pop("loop", {}))
    values = {
        "lr_codebook": 1e-2,
        "steps": 8,
        "context": 24,
        "texts": (str(made / "t.txt"),),
        "validation_windows": 4,
        "loop": loop,
    }
    return DistillConfig(**{**values, **changes})


def stop_at(step: int) -> Callable[[Any], None]:
    """A progress callback that ends the run after a step, as Ctrl-C does."""

    def progress(event: Any) -> None:
        if event.stage == "train" and f"step {step} " in event.detail:
            raise KeyboardInterrupt

    return progress
