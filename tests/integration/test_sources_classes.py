"""Models of other classes than a causal language model, and other classes of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
)

import pocketllm
from pocketllm.cli.model_loading import load_any
from pocketllm.errors import ConfigError, FormatError, SourceError
from pocketllm.source import load_dense
from tests import tiny

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "dense"
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny.config("llama", num_labels=1)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_reward_model_keeps_its_head(reward: Path, tmp_path: Path) -> None:
    report = pocketllm.compress(reward, tiny.settings(), tmp_path / "out")
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert reasons["score.weight"] == "a linear layer outside the blocks"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    dense = load_dense(reward)
    for mode in ("dense", "packed"):
        model, _ = pocketllm.load(tmp_path / "out", mode=mode)
        assert type(model) is LlamaForSequenceClassification
        assert torch.equal(model.score.weight, dense.score.weight)
        found, wanted = model(IDS).logits, dense(IDS).logits
        assert found.shape == wanted.shape == (1, 1)
    for folder in (reward, tmp_path / "out"):
        with pytest.raises(SourceError, match="LlamaForSequenceClassification has no language model head"):
            load_any(str(folder), "dense", "auto", "cpu", False)


def test_a_model_without_a_language_model_head_is_not_calibrated(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no head that gives the logits of tokens"):
        pocketllm.compress(reward, tiny.on_trellis(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_model_stays_one(tmp_path: Path) -> None:
    LlamaModel(tiny.config("llama")).save_pretrained(tmp_path / "dense")
    pocketllm.compress(tmp_path / "dense", tiny.settings(), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out")
    assert type(model) is LlamaModel


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_classes_of_a_compressed_model(mode: str, tied: bool, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", tie_word_embeddings=tied)
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    config = AutoModel.from_pretrained(tmp_path / "out").config
    config.quantization_config.mode = mode
    whole, _ = pocketllm.load(tmp_path / "out", mode="packed")  # as `auto` does for these classes
    with torch.no_grad():
        wanted = whole.model(IDS, use_cache=False).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(base(IDS, use_cache=False).last_hidden_state, wanted)
        base.save_pretrained(tmp_path / "base")
        again, _ = pocketllm.load(tmp_path / "base", mode=mode)
        assert type(again) is LlamaModel
        found = again(IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        scored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
        assert torch.equal(scored.model(IDS, use_cache=False).last_hidden_state, wanted)
        assert scored.score.weight.isfinite().all()


def test_a_class_of_another_model_is_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense")
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    (tmp_path / "out" / "pocketllm.json").unlink()  # its checksums would be refused first
    with pytest.raises(FormatError, match=r"layers\.1.*no such parameter"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(FormatError, match=r"layers\.1.*no such parameter"):
        AutoModel.from_pretrained(tmp_path / "out")
