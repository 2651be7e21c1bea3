"""What the campaign damages and interrupts: tiny models, an adapter, and what they compute when all is well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.config import DistillConfig, LoopConfig, LoraTuneConfig
from tests import tiny

_CHAT = {
    "default": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "tool_use": "TOOLS {% for m in messages %}{{ m['content'] }}{% endfor %}",
}
_LOOP = LoopConfig(batch_size=2, eval_every=2, checkpoint_every=1)


@dataclass(frozen=True)
class Models:
    """Folders: a dense model, the same compressed, and an adapter on that. text: to measure and train on."""

    dense: Path
    small: Path
    adapter: Path
    text: Path


def make(folder: Path) -> Models:
    """Make the models in a folder."""
    dense = tiny.save(folder / "dense")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(dense)
    text = folder / "text.txt"
    text.write_text("a text that is long enough for some windows. " * 40, encoding="utf-8")
    pocketllm.compress(dense, settings(), folder / "small")
    pocketllm.lora(folder / "small", folder / "adapter", lora_settings(text))
    return Models(dense, folder / "small", folder / "adapter", text)


def settings() -> pocketllm.CompressConfig:
    """How the models are compressed."""
    return tiny.settings()


def lora_settings(text: Path) -> LoraTuneConfig:
    """A few steps of LoRA."""
    return LoraTuneConfig(
        texts=(str(text),), rank=2, alpha=4, steps=3, validation_items=2, context=16, loop=_LOOP
    )


def distill_settings(text: Path) -> DistillConfig:
    """A few steps of distillation."""
    return DistillConfig(texts=(str(text),), context=16, validation_windows=2, steps=3, loop=_LOOP)


def facts(folder: Path) -> dict[str, Any]:
    """What a loaded model computes, and what its tokenizer makes of a text; plain JSON types."""
    model, tokenizer = pocketllm.load(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 19)[None]).logits
    talk = [{"role": "user", "content": "hi"}]
    return {
        "logits": [round(float(value), 4) for value in logits[0, -1]],
        "words": tokenizer("hello, world")["input_ids"],
        "size": len(tokenizer),
        "chat": tokenizer.apply_chat_template(talk, tokenize=False, chat_template="tool_use"),
    }
