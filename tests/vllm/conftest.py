"""Tiny models that vLLM runs, compressed and decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.runtime.export import export
from tests import tiny

# Sizes that vLLM's kernels for CPUs take; weights far enough apart that tokens differ.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ROTARY = {**SIZES, "head_dim": 32, "initializer_range": 0.3}
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "tied": ("llama", ROTARY, tiny.on_trellis(4.0)),
    "untied": ("qwen3", ROTARY, tiny.settings()),
    "experts": ("qwen3_moe", {**ROTARY, "moe_intermediate_size": 32, "num_experts": 4}, tiny.settings()),
    "renamed experts": ("mixtral", {**ROTARY, "num_local_experts": 4}, tiny.settings()),
    "transposed": ("gpt2", {"n_embd": 64, "n_head": 2, "initializer_range": 0.3}, tiny.settings()),
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Folders of a compressed model, and of the same decoded."""

    @cache
    def made(name: str) -> Pair:
        architecture, changes, settings = MODELS[name]
        root = tmp_path_factory.mktemp("models")
        source = tiny.save(root / "source", architecture, **changes)
        pocketllm.compress(source, settings, root / "small")
        export(root / "small", root / "dense", torch.float32)
        return root / "small", root / "dense"

    return made
