"""Only a model whose layers really are the compressed ones passes for compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.errors import LoadError
from pocketllm.evaluate.verify import verify_compressed
from pocketllm.format.checkpoint import read_layout
from tests import tiny


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    pocketllm.compress(tiny.save(folder / "dense"), tiny.settings(), folder / "small")
    return folder / "small"


def load(folder: Path, mode: str) -> Any:
    return pocketllm.load(folder, mode=mode, dtype=torch.float32)[0]


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_every_matrix_counts(mode: str, small: Path) -> None:
    assert verify_compressed(load(small, mode)) == len(read_layout(small).matrices) > 0


def test_a_dense_model_does_not_pass() -> None:
    with pytest.raises(LoadError, match="not loaded by pocketllm"):
        verify_compressed(tiny.model())


def test_a_changed_weight_is_found(small: Path) -> None:
    model = load(small, "dense")
    first = next(iter(read_layout(small).matrices))
    with torch.no_grad():
        model.get_parameter(first).view(-1)[0] += 1
    with pytest.raises(LoadError, match="does not compute with the compressed weight"):
        verify_compressed(model)


def test_a_matrix_that_is_not_compressed_is_found(small: Path) -> None:
    model = load(small, "dense")
    packed = model.hf_quantizer.packed(model)
    name = next(iter(packed))
    del packed[name]
    with pytest.raises(LoadError, match=f"{name}: is not compressed in memory"):
        verify_compressed(model)
