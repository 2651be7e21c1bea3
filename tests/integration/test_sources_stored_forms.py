"""What checkpoints hold beside plain floats: integers, FP8 with block scales, MXFP4; and experts stored transposed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pocketllm
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.errors import SourceError, WeightError
from pocketllm.plan import classify
from pocketllm.source import load_dense, open_dense
from tests import tiny
from tests.format_reader import Reader

IDS = torch.arange(3, 40)[None]


def restored(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **quantized: Any) -> Path:
    """Store every tensor in another form, and say so in config.json."""
    path, found = folder / "model.safetensors", dict[str, Tensor]()
    for name, value in load_file(path).items():
        found |= change(name, value)
    save_file(found, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    return folder


def fp8(folder: Path) -> Path:
    """As DeepSeek and Qwen publish them: blocks with a scale each, embedding, head and router as they are."""

    def change(name: str, value: Tensor) -> dict[str, Tensor]:
        if value.ndim < 2 or "layers" not in name or "mlp.gate.weight" in name:
            return {name: value}
        rows, columns = value.shape
        size = math.gcd(rows, columns, 4)
        blocks = value.float().reshape(rows // size, size, columns // size, size)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        coded = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        return {name: coded, f"{name}_scale_inv": scales}

    return restored(folder, change, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[4, 4])


def gpt_oss(folder: Path) -> Path:
    config = t.GptOssConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=96,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    t.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def mxfp4(folder: Path) -> Path:
    """As GPT-OSS is published."""

    def change(name: str, value: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: value}
        experts, inputs, outputs = value.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    return restored(folder, change, quant_method="mxfp4", modules_to_not_convert=["lm_head"])


def bfloat16(folder: Path, architecture: str) -> Path:
    tiny.model(architecture).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


MADE = {
    "fp8": lambda folder: fp8(bfloat16(folder, "llama")),
    "fp8 experts": lambda folder: fp8(bfloat16(folder, "qwen3_moe")),
    "mxfp4": lambda folder: mxfp4(gpt_oss(folder)),
}


@pytest.mark.parametrize("form", MADE)
def test_quantized_checkpoints_are_dequantized_tensor_by_tensor(form: str, tmp_path: Path) -> None:
    folder = MADE[form](tmp_path / "dense")
    source, dense = open_dense(folder), load_dense(folder)
    wanted = dense.state_dict()
    for name in source.names():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), wanted[name]), name
    dense = load_dense(folder, torch.float32)
    pocketllm.compress(folder, tiny.target(8.0), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        error = model(IDS, use_cache=False).logits - dense(IDS, use_cache=False).logits
    assert error.norm() < 0.3 * dense(IDS, use_cache=False).logits.norm()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("scale_inv" in name or "_blocks" in name for name in stored)


def test_other_quantized_forms_are_refused(tmp_path: Path) -> None:
    folder = restored(
        bfloat16(tmp_path / "dense", "llama"), lambda name, value: {name: value}, quant_method="gptq", bits=4
    )
    with pytest.raises(SourceError, match=r"already quantized \(gptq\)"):
        open_dense(folder)


def test_settings_that_transformers_does_not_know(tmp_path: Path) -> None:
    folder = restored(
        bfloat16(tmp_path / "dense", "llama"),
        lambda name, value: {name: value},
        quant_method="fp8",
        activation_scheme="of another kind",
    )
    with pytest.raises(SourceError, match="transformers cannot build this model"):
        open_dense(folder)


def test_an_fp8_tensor_of_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    folder = bfloat16(tmp_path / "dense", "llama")
    path = folder / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(WeightError, match=r"up_proj\.weight: stored as F8_E4M3"):
        pocketllm.dry_run(folder, tiny.settings())


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
def test_integer_and_boolean_buffers(dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    made = t.LlamaForCausalLM.__init__

    def init(self: Any, config: Any) -> None:
        made(self, config)
        self.model.register_buffer("table", torch.zeros(5, 7, dtype=dtype))
        self.model.layers[0].weight_ids = nn.Parameter(torch.zeros(3, 1, dtype=dtype), requires_grad=False)

    monkeypatch.setattr(t.LlamaForCausalLM, "__init__", init)
    model = tiny.model()
    model.model.table.copy_(torch.arange(35).reshape(5, 7) % 2)
    model.save_pretrained(tmp_path / "dense")
    report = pocketllm.compress(tmp_path / "dense", tiny.settings(), tmp_path / "out")
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert reasons["model.table"] == reasons["model.layers.0.weight_ids"] == "integers or booleans"
    again, _ = pocketllm.load(tmp_path / "out", mode="packed")
    assert again.model.table.dtype == dtype and torch.equal(again.model.table, model.model.table)


def test_experts_stored_transposed_are_calibrated_for_their_inputs(tmp_path: Path) -> None:
    folder = gpt_oss(tmp_path / "dense")
    source = open_dense(folder)
    matrices, _ = classify(source, tiny.on_trellis())
    stream = BlockStream(source, IDS)
    for path, block in stream:
        inside = [m for m in matrices if m.name.startswith(f"{path}.")]
        seen = stream.inputs(block, inside)
        assert all(seen.tokens[m.name] == (2 if len(m.shape) == 3 else 1) * IDS.numel() for m in inside)
        stream.hidden = stream.run(block, stream.hidden)
    report = pocketllm.compress(folder, tiny.target(8.0), tmp_path / "out")
    experts = [m for m in report.matrices if len(m.shape) == 3]
    assert {(m.shape, m.columns) for m in experts} == {((3, 32, 64), 32), ((3, 32, 32), 32)}
    dense = load_dense(folder, torch.float32)
    packed, _ = pocketllm.load(tmp_path / "out", mode="packed", dtype=torch.float32)
    reader = Reader(tmp_path / "out")
    for m in experts:
        weight = dense.get_parameter(m.name).detach()
        parent, _, leaf = m.name.rpartition(".")
        decoded = getattr(packed.get_submodule(parent), leaf)
        assert torch.allclose(decoded.double(), torch.from_numpy(reader.decode(m.name)).double(), atol=1e-5)
        error = (weight - decoded).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(m.nmse, rel=1e-3)
