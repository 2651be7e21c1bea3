"""The identity of a dense model: half-done runs and what calibration measured are kept under it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pocketllm.source.dense_checkpoint import open_dense
from tests import tiny


def another_late_weight(folder: Path) -> None:
    """Same names, sizes and header; one number is another one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    last = tensors[max(tensors)]
    last.reshape(-1)[-1] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def another_epsilon(folder: Path) -> None:
    """The same weights in a model that computes otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")


def test_the_same_files_are_the_same_model(tmp_path: Path) -> None:
    one, other = (open_dense(tiny.save(tmp_path / name)).fingerprint() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("change", [another_late_weight, another_epsilon])
def test_every_byte_counts(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense", hidden_size=256, intermediate_size=512)  # more than one MiB
    before = open_dense(folder).fingerprint()
    size = (folder / "model.safetensors").stat().st_size
    change(folder)
    assert (folder / "model.safetensors").stat().st_size == size > 1 << 20
    assert open_dense(folder).fingerprint() != before
