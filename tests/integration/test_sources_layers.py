"""Layers with their own forward and experts in parameters of several forms are compressed, and run as the dense model
with the decoded weights does; a model of which little is compressed gets a warning.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import pocketllm
from pocketllm.format.report_warnings import warnings_of
from pocketllm.runtime.layers import packed_matrices, reason_to_decode
from tests import tiny
from tests.commands import Run

IDS = torch.arange(3, 40)[None]
QUICK = {"tokens": 64, "context": 32, "sensitivity_tokens": 32}
SIZES: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def falcon() -> Any:
    return t.FalconForCausalLM(
        t.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, bias=True, **SIZES)
    )


def jetmoe() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "kv_channels": 8, "num_key_value_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return t.JetMoeForCausalLM(t.JetMoeConfig(num_hidden_layers=2, **sizes, **experts, **SIZES))


def dbrx() -> Any:
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
    sizes: dict[str, Any] = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
    return t.DbrxForCausalLM(t.DbrxConfig(ffn_config=experts, attn_config=attention, **sizes, **SIZES))


def save(folder: Path, make: Any) -> Path:
    """A model's folder, with random values where its class leaves memory as it is."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("make", [falcon, jetmoe, dbrx])
@pytest.mark.parametrize("settings", [tiny.settings(), tiny.on_trellis(calibration=QUICK)])
def test_all_but_small_tensors_is_compressed(make: Any, settings: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "dense", make)
    report = pocketllm.compress(source, settings, tmp_path / "out")
    dense = [entry["name"] for entry in report.skipped if len(entry["shape"]) > 1]
    assert all("router" in name for name in dense)
    packed, _ = pocketllm.load(tmp_path / "out", mode="packed")
    reference = t.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, matrix in packed_matrices(packed).items():
            assert not torch.equal(reference.get_parameter(name), matrix())
            reference.get_parameter(name).copy_(matrix())
    wanted = logits(reference)
    for model in (packed, pocketllm.load(tmp_path / "out", mode="dense")[0]):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    if settings.calibration:
        CHECKS[make](report, packed)


def runs_packed(report: Any, model: Any) -> None:
    """Nothing is decoded, although every layer has its own forward."""
    assert reason_to_decode(model) == ""
    calls = []
    for matrix in packed_matrices(model).values():
        matrix.register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert not calls


def has_inputs_by_declared_sizes(report: Any, model: Any) -> None:
    """Hidden and intermediate size are equal, so that only what the class declares tells inputs from outputs."""
    experts = {m.name.rpartition("layers.0.")[2]: m for m in report.matrices if len(m.shape) == 3}
    assert experts["mlp.output_linear.weight"].columns == 32
    assert experts["self_attention.experts.output_linear.weight"].columns == 16
    assert all(m.input_tokens for m in experts.values())


def has_inputs_of_products(report: Any, model: Any) -> None:
    """Experts in one matrix are calibrated only if they are multiplied by from the side of their columns."""
    stacked = {m.name.rpartition("mlp.")[2]: m for m in report.matrices if "experts" in m.name}
    assert {m.shape for m in stacked.values()} == {(96, 32)}
    assert stacked["w1"].input_tokens and stacked["v1"].input_tokens
    assert stacked["w2"].input_tokens == 0
    assert any("no input of" in text and "w2" in text for text in warnings_of(report.to_dict()))


CHECKS = {falcon: runs_packed, jetmoe: has_inputs_by_declared_sizes, dbrx: has_inputs_of_products}


def test_a_model_of_which_little_is_compressed_gets_a_warning(run: Run, tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tiny.config("gemma3", vocab_size=96).to_dict()
    config = t.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    source = save(tmp_path / "dense", lambda: t.Gemma3ForConditionalGeneration(config))
    options = ["-o", tmp_path / "out", "--preset", "lookup-8x", "--dry-run"]
    (found,) = run.json("compress", source, *options)["warnings"]
    assert re.match(r"only \d\d% of the weights are compressed; dense: \d\d% ", found)
    assert "outside the language model's blocks" in found and "model.vision_tower" in found
    assert "--set towers=true" in found
    shown = " ".join(run("compress", source, *options, "--quiet")[1].split())
    assert shown.count("of the weights are compressed") == 1

    llama = tiny.save(tmp_path / "llama")
    for more in ([], ["--keep-embeddings"], ["--override", "model.layers.*=16"]):
        assert run.json("compress", llama, *options, *more)["warnings"] == []
