"""Every architecture: compress, load both ways, save, and get the same logits each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pocketllm
from pocketllm.format.checkpoint import folder_bytes
from pocketllm.runtime.layers import packed_matrices
from tests import tiny

TOKENS = torch.arange(3, 40)[None]
ROUNDING = 1e-5  # of logits up to 1, in float32


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def load(folder: Path, mode: str) -> Any:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["mode"] = mode
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_round_trip(architecture: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", architecture)
    config = tiny.settings()
    planned = pocketllm.dry_run(source, config)
    report = pocketllm.compress(source, config, tmp_path / "out")
    assert report.bytes_on_disk == planned.bytes_on_disk == folder_bytes(tmp_path / "out")

    dense, packed = load(tmp_path / "out", "dense"), load(tmp_path / "out", "packed")
    assert {m.name for m in report.matrices} == set(packed_matrices(packed))
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=ROUNDING)
    for name, matrix in packed_matrices(packed).items():
        assert torch.equal(dense.get_parameter(name), matrix())

    # An ordinary model that holds the decoded weights computes the same.
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    original = {name: value.clone() for name, value in reference.state_dict().items()}
    with torch.no_grad():
        for name, matrix in packed_matrices(packed).items():
            assert not torch.equal(reference.get_parameter(name), matrix())
            reference.get_parameter(name).copy_(matrix())
    assert torch.equal(logits(reference), logits(dense))

    # What is not compressed is listed with a reason and is exact.
    tied = set(reference.all_tied_weights_keys or {})
    coded = {m.name for m in report.matrices}
    skipped = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert coded | set(skipped) == set(original)
    assert not coded & set(skipped) and all(skipped.values())
    assert tied <= set(skipped)
    state = dense.state_dict()
    for name in set(skipped) - tied:
        assert torch.equal(state[name], original[name]), name

    for mode, model in (("dense", dense), ("packed", packed)):
        model.save_pretrained(tmp_path / mode)
        again = load(tmp_path / mode, "packed")
        assert torch.equal(logits(again), logits(packed))
        assert set(packed_matrices(again)) == coded
        size = (tmp_path / mode / "model.safetensors").stat().st_size
        assert abs(size - (tmp_path / "out" / "model.safetensors").stat().st_size) < 4096


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_compressed(architecture: str, tmp_path: Path) -> None:
    report = pocketllm.dry_run(tiny.save(tmp_path / "dense", architecture), tiny.settings())
    experts = [m for m in report.matrices if len(m.shape) == 3]
    assert {m.name.rsplit(".", 1)[1] for m in experts} == {"gate_up_proj", "down_proj"}


def test_conv1d_is_coded_along_its_inputs(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", "gpt2")
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    packed = packed_matrices(load(tmp_path / "out", "packed"))
    matrix = packed["transformer.h.0.mlp.c_fc.weight"]
    assert matrix.entry.transposed and (matrix.entry.rows, matrix.entry.columns) == (144, 36)
    assert matrix().shape == (36, 144)


@pytest.mark.parametrize("form", ["row", "lookup"])
@pytest.mark.parametrize("row_scale", [True, False])
@pytest.mark.parametrize("norm", ["rln", "ln", "none"])
def test_every_form_loads_as_it_was_coded(form: str, row_scale: bool, norm: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    config = tiny.settings(codec={"decoder": form, "row_scale": row_scale, "norm": norm})
    report = pocketllm.compress(source, config, tmp_path / "out")
    packed = packed_matrices(load(tmp_path / "out", "packed"))
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for matrix in report.matrices:
        weight = reference.get_parameter(matrix.name).detach().double()
        error = (weight - packed[matrix.name]().double()).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(matrix.nmse, rel=1e-4)
