"""The language model's blocks are found and calibrated whatever else a model holds, or calibration is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import pocketllm
from pocketllm.calibrate.blocks import BlockStream, check_blocks
from pocketllm.errors import ConfigError
from pocketllm.source import open_dense
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_class import find_blocks, language_model_path
from tests import tiny

IDS = torch.arange(3, 40)[None]
QUICK = {"tokens": 64, "context": 32, "sensitivity_tokens": 32}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def multimodal() -> Any:
    """A text model of two blocks beside a vision tower of four."""
    text = t.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, sliding_window=16)
    vision = t.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = t.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=94
    )
    config.boi_token_index, config.eoi_token_index = 92, 93
    return t.Gemma3ForConditionalGeneration(config)


def routed() -> Any:
    """Llama 4: the router is an nn.Linear whose forward returns a tuple, experts are stored transposed."""
    return t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **{**SIZES, "num_hidden_layers": 1},
            intermediate_size_mlp=48,
            num_local_experts=3,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            max_position_embeddings=64,
        )
    )


def save(folder: Path, model: Any) -> Path:
    model.eval().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [tiny.settings(), tiny.on_trellis(calibration=QUICK)])
def test_towers_stay_dense_and_are_listed(settings: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "dense", multimodal())
    report = pocketllm.compress(source, settings, tmp_path / "out")
    coded = {m.name for m in report.matrices}
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    towers = [name for name in open_dense(source).names() if "vision_tower" in name and ".layers." in name]
    assert towers and all("a vision or audio tower" in reasons[name] for name in towers)
    assert sum("language_model.layers" in name for name in coded) == 14
    model, _ = pocketllm.load(tmp_path / "out", mode="packed")
    assert type(model) is t.Gemma3ForConditionalGeneration
    with torch.no_grad():
        assert model(IDS, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("settings", [tiny.target(9.0), tiny.on_trellis(6.5, calibration=QUICK)])
def test_towers_are_compressed_where_that_is_wanted(settings: Any, tmp_path: Path) -> None:
    dense = multimodal()
    source = save(tmp_path / "dense", dense)
    settings = dataclasses.replace(settings, towers=True)
    report = pocketllm.compress(source, settings, tmp_path / "out")
    coded = {m.name: m for m in report.matrices}
    vision = [m for name, m in coded.items() if "vision_tower" in name]
    assert len(vision) == 4 * 6 and sum("language_model.layers" in name for name in coded) == 14
    assert all(0 < m.nmse < 0.05 and m.input_tokens is None for m in vision)
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert "4-D" in next(why for name, why in reasons.items() if "patch_embedding.weight" in name)
    assert pocketllm.dry_run(source, settings).bytes_on_disk == report.bytes_on_disk
    ids = torch.tensor([[3, 4, *[94] * 4, 5, 6]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        wanted = dense(ids, pixel_values=pixels, use_cache=False).logits
        found = []
        for mode in ("dense", "packed"):
            model, _ = pocketllm.load(tmp_path / "out", mode=mode)
            found.append(model(ids, pixel_values=pixels, use_cache=False).logits)
        assert (found[0] - wanted).norm() < 0.2 * wanted.norm()
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_the_setting_of_towers_changes_no_older_file() -> None:
    settings = tiny.settings()
    assert "towers" not in settings.to_dict()
    both = tiny.settings(towers=True)
    assert (
        type(both).from_dict(both.to_dict()) == both and type(both).from_dict(settings.to_dict()) == settings
    )


@pytest.mark.parametrize("settings", [tiny.settings(), tiny.on_trellis(calibration=QUICK)])
def test_linear_layers_with_a_forward_of_their_own_stay_dense(settings: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "dense", routed())
    report = pocketllm.compress(source, settings, tmp_path / "out")
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert "no plain linear layer" in reasons["model.layers.0.feed_forward.router.weight"]
    experts = [m for m in report.matrices if len(m.shape) == 3]
    assert {(m.shape, m.columns) for m in experts} == {((3, 32, 96), 32), ((3, 48, 32), 48)}
    if settings.calibration:
        assert all(m.input_tokens and m.input_tokens <= 64 for m in experts)


REFUSED = {
    "blocks that return something other than activations": lambda: t.OpenAIGPTLMHeadModel(
        t.OpenAIGPTConfig(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ),
    "blocks that do not form a simple chain": lambda: t.Gemma3nForCausalLM(
        t.Gemma3nTextConfig(
            **SIZES,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            num_kv_shared_layers=0,
            sliding_window=16,
        )
    ),
    "no single token embedding": lambda: t.MusicgenForCausalLM(
        t.MusicgenDecoderConfig(
            vocab_size=96, max_position_embeddings=64, hidden_size=32, num_hidden_layers=2, ffn_dim=32
        )
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_blocks_that_cannot_be_calibrated_are_refused_before_any_work(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "dense", REFUSED[reason]())

    def work(*_: Any) -> None:
        raise AssertionError("weights were checked")

    with monkeypatch.context() as patched:
        patched.setattr(DenseCheckpoint, "check", work)
        for run in (pocketllm.dry_run, lambda *args: pocketllm.compress(*args, tmp_path / "out")):
            with pytest.raises(ConfigError, match=f"{reason}; use a preset without calibration"):
                run(source, tiny.on_trellis(calibration=QUICK))
    assert pocketllm.compress(source, tiny.target(8.0), tmp_path / "out").matrices
    assert pocketllm.load(tmp_path / "out", mode="packed")


def test_whatever_a_block_raises_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_dense(tiny.save(tmp_path / "dense"))
    ids = torch.arange(3, 35)[None]
    check_blocks(source, ids)
    with monkeypatch.context() as patched:
        patched.setattr(BlockStream, "call", lambda self, block, hidden, number: hidden[:, 1:])
        with pytest.raises(ConfigError, match="blocks that change the shape of activations"):
            check_blocks(source, ids)

    def fail(*_: Any) -> None:
        raise KeyError("state")

    for method, reason in (
        ("after_blocks", "needs more than the output of its blocks after them"),
        ("embedding_gradient", "runs what lies before its blocks without gradients"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(BlockStream, method, fail)
            with pytest.raises(ConfigError, match=reason):
                check_blocks(source, ids)
    monkeypatch.setattr(BlockStream, "call", fail)
    with pytest.raises(ConfigError, match=r"cannot be run block by block \('state'\)"):
        check_blocks(source, ids)


def test_blocks_lie_beside_the_embedding() -> None:
    with torch.device("meta"):
        assert find_blocks(multimodal()) is not None
        path, blocks = find_blocks(multimodal()) or ("", None)
        assert (path, len(blocks or ())) == ("model.language_model.layers", 2)
        assert language_model_path(multimodal()) == "model.language_model"
        assert (find_blocks(tiny.model("gpt2")) or ("",))[0] == "transformer.h"
        path, _ = find_blocks(REFUSED["blocks that do not form a simple chain"]()) or ("", None)
        assert path == "model.layers"  # shorter than its list of projections


def test_of_several_lists_the_one_with_the_most_weights_is_taken() -> None:
    small = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model = nn.ModuleDict({"small": small, "layers": nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])})
    assert (find_blocks(model) or ("",))[0] == "layers"
