"""FORMAT.md is enough: a reader written from it alone decodes what the package decodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pocketllm
from pocketllm import CompressConfig
from pocketllm.format import read_report
from pocketllm.runtime.decode import Matrices
from tests import tiny
from tests.format_reader import Reader


def on_trellis(**codec: Any) -> CompressConfig:
    """Overlapping indices, rotated both sides; the strides of the blocks differ."""
    config = tiny.on_trellis(3.5, overrides=(("*.0.*", 2.5),), seed=3)
    return dataclasses.replace(config, codec=dataclasses.replace(config.codec, **codec))


LLAMA = {
    "lookup": tiny.settings(),
    "lookup, no row scale": tiny.settings(codec={"row_scale": False}),
    "lookup, 1 bit": tiny.settings(codebook_size=2),
    "lookup, K no power of two, per matrix": tiny.settings(codebook_size=33, codebook_scope="matrix"),
    "lookup, one block": tiny.settings(codec={"depth": 1}),
    "lookup, affine": tiny.settings(codec={"hidden": 0}),
    "lookup, no network": tiny.settings(codec={"depth": 0}),
    "lookup, rotated": tiny.calibrated(tiny.settings()),
    "row, rln": tiny.settings(codec={"decoder": "row"}),
    "row, ln": tiny.settings(codec={"decoder": "row", "norm": "ln"}),
    "row, affine": tiny.settings(codec={"decoder": "row", "hidden": 0}),
    "row, no norm": tiny.settings(codec={"decoder": "row", "norm": "none"}),
    "trellis": on_trellis(),
    "trellis, codebook from a seed": on_trellis(codebook_source="seed"),
    "trellis, hashed": on_trellis(**tiny.HASHED),
    "trellis, hashed, pairs, no network": dataclasses.replace(
        on_trellis(**tiny.HASHED, depth=0), vector_len=2
    ),
}


def agrees(source: Path, config: CompressConfig, output: Path) -> Reader:
    """Compress, and compare both readers on every tensor."""
    pocketllm.compress(source, config, output)
    reader, ours = Reader(output), Matrices.open(output)
    assert set(reader.matrices) == set(ours.names())
    for name in reader.matrices:
        expected = ours.read(name).double().numpy()
        found = reader.decode(name)
        assert found.shape == expected.shape
        # Float32 against float64: 1e-5 of the matrix's own size leaves room for rounding only.
        assert np.abs(found - expected).max() <= 1e-5 * np.sqrt((expected**2).mean()) + 1e-30, name
    dense = load_file(source / "model.safetensors")
    for name, (_, values) in reader.stored.items():
        if not name.endswith((".indices", ".row_scale")) and not name.startswith("pocketllm."):
            assert torch.equal(torch.from_numpy(values.copy()), dense[name]), name
    return reader


@pytest.mark.parametrize("kind", LLAMA)
def test_second_reader(kind: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    reader = agrees(source, LLAMA[kind], tmp_path / "out")
    assert "model.embed_tokens.weight" in reader.matrices
    strides = {entry[4] for entry in reader.matrices.values()}
    rotations = {tuple(entry[6]) for entry in reader.matrices.values()}
    assert (strides != {0}) == kind.startswith("trellis")
    assert (len(rotations) > 1) == (kind.startswith("trellis") or kind.endswith("rotated"))
    assert all((entry[2] is not None) == kind.endswith("seed") for entry in reader.codebooks)
    windows = {entry[4] for entry in reader.codebooks}
    assert windows == ({9} if "hashed" in kind else {0})
    assert read_report(tmp_path / "out")["format_version"] == (3 if "hashed" in kind else 2)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("config", [tiny.settings(), on_trellis()], ids=["plain", "trellis"])
def test_second_reader_on_other_shapes(architecture: str, config: CompressConfig, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", architecture)
    pocketllm.compress(source, config, tmp_path / "out")
    reader, ours = Reader(tmp_path / "out"), Matrices.open(tmp_path / "out")
    special = [n for n, entry in reader.matrices.items() if entry[1] or len(entry[0]) == 3]
    assert special
    for name in special:
        expected = ours.read(name).double().numpy()
        assert np.abs(reader.decode(name) - expected).max() <= 1e-5 * np.sqrt((expected**2).mean()), name


def test_second_reader_on_several_strips(tmp_path: Path) -> None:
    """640 rows: 2.5 strips of 256 become 2."""
    source = tiny.save(tmp_path / "dense", intermediate_size=640, num_hidden_layers=1)
    shorter = agrees(source, tiny.on_trellis(3.0), tmp_path / "two-sided").matrices
    assert {entry[5] for entry in shorter.values()} > {256}  # some have shorter strips
    one_sided = tiny.on_trellis(3.0, calibration={"two_sided": False})
    reader = agrees(source, one_sided, tmp_path / "out")
    assert {entry[5] for entry in reader.matrices.values()} == {256}
    assert reader.matrices["model.layers.0.mlp.up_proj.weight"][0] == [640, 36]
