"""A model on a hashed trellis: its stored form, every way to run it, and what else works on compressed models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.codec.kernels import library, select
from pocketllm.plan.bit_allocation import make_plan
from pocketllm.runtime import Matrices
from pocketllm.runtime.layers import PackedMatrix, packed_matrices
from pocketllm.source.dense_checkpoint import open_dense
from tests import tiny
from tests.packed_weights import needs_compiler

ROUNDING = 1e-4  # activations are multiplied as 16-bit integers
CONFIG = tiny.on_trellis(3.0, codec=tiny.HASHED)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("hashed") / "dense")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    pocketllm.compress(source, CONFIG, source.parent / "out")
    return source.parent / "out"


def logits(model: Any, tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(3, 3 + tokens)[None] % 90, use_cache=False).logits
    return found


def weight_of(model: Any, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(parent), leaf)
    return found


def test_it_is_stored_in_version_3_in_the_planned_bytes(source: Path, folder: Path) -> None:
    layout = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert layout["format_version"] == 3
    assert {(size, window) for size, _, _, _, window in layout["codebooks"]} == {(256, 9)}
    with (folder / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for number, (_, d, *_) in enumerate(layout["codebooks"]):
        assert header[f"pocketllm.codebooks.{number}.weight"]["shape"] == [256, d]
    report = pocketllm.dry_run(source, CONFIG)
    assert report.bytes_on_disk == sum(path.stat().st_size for path in folder.iterdir())


def test_every_way_to_decode_gives_the_same_bits(folder: Path) -> None:
    dense, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    packed, _ = pocketllm.load(folder, mode="packed", dtype=torch.float32)
    matrices = Matrices.open(folder)
    for name, matrix in packed_matrices(packed).items():
        expected = dense.get_parameter(name)
        assert torch.equal(weight_of(packed, name), expected)
        assert torch.equal(matrices.read(name), expected)
        product = matrix.product()
        assert product is not None and product.weight.sizes.banded == (
            library.hashed_runs() and matrix.form.stride < 8
        )
        unit = product.weight.unit() * product.weight.row_scale[:, None]
        if matrix.entry.rotation == (None, None):
            assert torch.equal(unit, expected)
        assert bool((product.weight.in_stream_order().table.abs() <= 127).all())


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 37, 70])
def test_packed_by_default_and_as_dense(tokens: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    model, _ = pocketllm.load(folder, dtype=torch.float32)
    assert packed_matrices(model) and not packed_matrices(dense)
    monkeypatch.setattr(PackedMatrix, "forward", None)  # nothing decodes a matrix
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens), rtol=0, atol=ROUNDING)


def test_without_kernels_and_without_this_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    wanted = logits(dense, 5)
    monkeypatch.setattr(library, "hashed_runs", lambda: False)
    plain, _ = pocketllm.load(folder, mode="packed", dtype=torch.float32)
    assert not any(
        m.product().weight.sizes.banded for m in packed_matrices(plain).values() if m.product() is not None
    )
    torch.testing.assert_close(logits(plain, 5), wanted, rtol=0, atol=ROUNDING)
    monkeypatch.setattr(select, "packed_isa", lambda: None)
    in_torch, _ = pocketllm.load(folder, mode="packed", dtype=torch.float32)
    torch.testing.assert_close(logits(in_torch, 5), wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_saved_again_it_is_the_same_model(mode: str, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = pocketllm.load(folder, mode=mode)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = pocketllm.load(tmp_path / "again", mode="dense", dtype=torch.float32)
    first, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    assert all(torch.equal(weight_of(again, n), first.get_parameter(n)) for n in packed_matrices_of(folder))


def packed_matrices_of(folder: Path) -> list[str]:
    return list(Matrices.open(folder).names())


@needs_compiler
def test_layers_compile_and_export(folder: Path) -> None:
    model, _ = pocketllm.load(folder, mode="packed", dtype=torch.float32)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 36)
    wanted = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, wanted, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted, rtol=0, atol=ROUNDING)


def test_exported_weights_are_the_decoded_ones(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from pocketllm.runtime.export import export

    export(folder, tmp_path / "dense", torch.float32)
    matrices, exported = Matrices.open(folder), load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(exported[name], matrices.read(name)) for name in matrices.names())


def test_refined_blocks_use_rounded_entries(source: Path, tmp_path: Path) -> None:
    config = tiny.on_trellis(3.0, codec=tiny.HASHED, calibration={"refine_epochs": 1})
    pocketllm.compress(source, config, tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out", mode="packed", dtype=torch.float32)
    for matrix in packed_matrices(model).values():
        product = matrix.product()
        assert product is not None
        units = product.weight.in_stream_order().table
        assert torch.equal(units, units.round()) and bool((units.abs() <= 127).all())


def test_a_table_of_its_own_for_each_matrix(source: Path, tmp_path: Path) -> None:
    config = tiny.on_trellis(8.0, codec={**tiny.HASHED, "depth": 0}, codebook_scope="matrix")
    pocketllm.compress(source, config, tmp_path / "out")
    layout = Matrices.open(tmp_path / "out").layout
    assert len(layout.codebooks) == len(layout.matrices)


def test_a_plan_knows_rates_from_half_a_bit_to_eight(source: Path) -> None:
    for bits in (0.5, 1.5, 2.5, 3.0, 8.0):
        config = dataclasses.replace(CONFIG, overrides=(("*up_proj*", bits),), target_bpw=7.0)
        plan = make_plan(open_dense(source), config)
        specs = {spec for name, spec in plan.specs.items() if "up_proj" in name}
        assert {spec.index_bpw for spec in specs} == {bits}
        assert {(spec.codebook_size, spec.window) for spec in plan.specs.values()} == {(256, 9)}
