"""Every tensor of a loaded model comes from a file, whoever wrote the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import LoadError
from tests import tiny

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def saved(small: Path, tmp_path: Path) -> Path:
    """What `save_pretrained` writes of a compressed model: without a report."""
    model, tokenizer = pocketllm.load(small)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def configured(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_no_file_holds_is_named(name: str, mode: str, saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(LoadError, match=rf"no file contains {name} \(1 tensors missing\)"):
        pocketllm.load(saved, mode=mode)


def test_a_tensor_that_the_class_may_do_without_is_missing_all_the_same(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", ["norm"])
    test_a_tensor_that_no_file_holds_is_named("model.norm.weight", "dense", saved)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_a_head_that_is_no_longer_tied_is_missing(mode: str, saved: Path) -> None:
    configured(saved, tie_word_embeddings=False)
    with pytest.raises(LoadError, match=r"no file contains lm_head\.weight"):
        pocketllm.load(saved, mode=mode)


def test_a_head_that_is_stored_and_tied_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.zeros(96, 36)}, path, {"format": "pt"})
    with pytest.raises(LoadError, match=r"a file contains lm_head\.weight, which config\.json ties"):
        pocketllm.load(saved)


def test_what_transformers_cannot_load_is_our_error(saved: Path) -> None:
    path = saved / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.zeros(7)}, path, {"format": "pt"})
    with pytest.raises(LoadError, match="transformers cannot load this model"):
        pocketllm.load(saved)


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_initialize_their_children(mode: str, tied: bool, tmp_path: Path) -> None:
    config = t.ModernBertDecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=96,
        pad_token_id=1,
        cls_token_id=0,
        sep_token_id=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    dense = t.ModernBertDecoderForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    pocketllm.compress(tmp_path / "dense", tiny.target(8.0), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out", mode=mode)
    with torch.no_grad():
        error = model(IDS).logits - dense(IDS).logits
        assert error.norm() < 0.3 * dense(IDS).logits.norm()
