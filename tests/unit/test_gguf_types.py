"""Every type of GGUF file gives exactly the model that it was made from, or is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pocketllm.source import gguf_model, resolve
from pocketllm.source.folder import load_dense
from tests import gguf_store, tiny
from tests.gguf_types import TYPES

IDS = torch.arange(3, 33)[None]  # more than a sliding window


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    tiny.tokenizer().save_pretrained(tmp_path)


def check(file: Path, dense: Any) -> None:
    with torch.inference_mode():
        found = load_dense(resolve(str(file)), torch.float32)(IDS).logits
        torch.testing.assert_close(found, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_the_model_of_the_file(name: str, tmp_path: Path) -> None:
    dense = gguf_store.model(TYPES[name])
    check(gguf_store.write(tmp_path / "tiny.gguf", dense, TYPES[name]), dense)
