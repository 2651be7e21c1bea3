"""Tied parameters: what the checkpoint holds counts, whatever its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

import pocketllm
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.errors import SourceError, WeightError
from pocketllm.source import open_dense
from tests import tiny

IDS = torch.arange(3, 40)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """A model folder with tensors (`.` as `__`) added, replaced, or taken away."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name, value in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if value is not None:
            stored[name.replace("__", ".")] = value
    save_file(stored, path, {"format": "pt"})
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """Tied by its configuration, with a head of its own."""
    tiny.model().bfloat16().save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    return changed(tmp_path / "dense", lm_head__weight=(torch.randn(96, 36) * 0.02).bfloat16())


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_a_head_that_is_stored_apart_is_kept(mode: str, apart: Path, tmp_path: Path) -> None:
    report = pocketllm.compress(apart, tiny.target(8.0), tmp_path / "out")
    assert {EMBEDDING, HEAD} <= {m.name for m in report.matrices}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    dense = AutoModelForCausalLM.from_pretrained(apart, dtype=torch.float32)
    model, _ = pocketllm.load(tmp_path / "out", mode=mode, dtype=torch.float32)
    error = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert error < 0.3  # 1.4 with the embedding in the head's place


def test_a_head_that_is_stored_apart_is_kept_exactly_where_it_stays_dense(
    apart: Path, tmp_path: Path
) -> None:
    pocketllm.compress(apart, tiny.settings(keep_embeddings=True), tmp_path / "out")
    stored = load_file(apart / "model.safetensors")
    model, _ = pocketllm.load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, stored[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, stored[EMBEDDING])


def test_a_head_that_is_stored_apart_is_calibrated(apart: Path) -> None:
    stream = BlockStream(open_dense(apart), IDS)
    stream.load_head()
    stored = load_file(apart / "model.safetensors")
    assert not stream.is_tied
    assert torch.equal(stream.model.lm_head.weight, stored[HEAD].float())
    looked_up = stored[EMBEDDING].float()[IDS]
    assert torch.equal(stream.model.model.embed_tokens(IDS), looked_up)
    assert torch.equal(stream.embedding_rows(IDS.flatten()), looked_up.flatten(0, 1))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_same_values_stored_twice_are_tied(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense", architecture)
    once = open_dense(folder)
    changed(folder, lm_head__weight=once.read(EMBEDDING).clone())
    twice = open_dense(folder)
    assert twice.tied == once.tied == {HEAD: EMBEDDING} and not twice.is_untied
    assert twice.names() == once.names()


def test_one_of_the_two_is_stored_under_the_other_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense")
    value = open_dense(folder).read(EMBEDDING).clone()
    changed(folder, model__embed_tokens__weight=None, lm_head__weight=value)
    source = open_dense(folder)
    assert source.tied == {HEAD: EMBEDDING}
    assert torch.equal(source.read(EMBEDDING), value)
    pocketllm.compress(folder, tiny.settings(keep_embeddings=True), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, value.bfloat16().to(model.dtype))


def test_a_head_that_is_not_tied_and_not_stored_is_missing(tmp_path: Path) -> None:
    folder = changed(tiny.save(tmp_path / "dense", tie_word_embeddings=False), lm_head__weight=None)
    with pytest.raises(SourceError, match=r"no file contains lm_head\.weight.*tie_word_embeddings: true"):
        open_dense(folder)


def test_a_model_that_cannot_be_untied(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketllm.source.folder.untie", lambda config: None)
    with pytest.raises(
        SourceError, match=r"stores separate values for parameters that LlamaForCausalLM always ties"
    ):
        open_dense(apart)


@pytest.fixture
def fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that stores q, k and v of a block in one tensor, which transformers splits."""
    names = [f"self_attn.{part}_proj.weight" for part in "qkv"]

    def mapping(model: Any, **_: Any) -> list[Any]:
        return [WeightConverter("self_attn.qkv.weight", list(names), [Chunk(dim=0)])]

    folder = tiny.save(tmp_path / "dense", num_key_value_heads=2)
    stored = load_file(folder / "model.safetensors")
    for block in ("model.layers.0.", "model.layers.1."):
        parts = [stored.pop(block + name) for name in names]
        stored[f"{block}self_attn.qkv.weight"] = torch.cat(parts)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
    return folder


def test_one_stored_tensor_feeds_several_parameters(fused: Path) -> None:
    source, model = open_dense(fused), tiny.model(num_key_value_heads=2)
    assert all(torch.equal(source.read(name), model.get_parameter(name)) for name in source.names())
    assert set(source.names()) | set(source.tied) == set(model.state_dict())


def test_what_a_conversion_cannot_take_is_named(fused: Path) -> None:
    changed(fused, **{"model__layers__0__self_attn__qkv__weight": torch.zeros(1)})
    with pytest.raises((SourceError, WeightError), match=r"layers\.0\.self_attn\.[qkv]"):
        open_dense(fused).check()
