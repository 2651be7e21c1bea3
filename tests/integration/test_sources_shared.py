"""Custom code that holds one module under several names: stored once, and one module again when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import ConfigError, SourceError
from tests import tiny

IDS = torch.arange(3, 20)[None]
CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class SharedConfig(PretrainedConfig):
    model_type = "shared_modules"
    vocab_size = 96
    hidden_size = 36
    kind = "block"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(36, 52), nn.Linear(52, 36)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class SharedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SharedConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte, self.lm_head = nn.Embedding(96, 36), nn.Linear(36, 96, bias=False)
        self.h = nn.ModuleList([Block(), Block(), Block()])
        if config.kind == "block":
            self.h[2] = self.h[0]
        if config.kind == "layer":
            self.h[2].up = self.h[0].up
        if config.kind == "outside":
            self.first = self.h[0].up
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, **others):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))
"""


def shared(folder: Path, kind: str, stored: str) -> tuple[Path, Any]:
    """A model of such code; stored: under both names, or under the last alone."""
    folder.mkdir()
    (folder / "shared.py").write_text(CODE)
    auto = {"AutoConfig": "shared.SharedConfig", "AutoModelForCausalLM": "shared.SharedForCausalLM"}
    config = {"model_type": "shared_modules", "architectures": ["SharedForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps({**config, "kind": kind, "dtype": "float32"}))
    tiny.tokenizer().save_pretrained(folder)
    made = t.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = t.AutoModelForCausalLM.from_config(made, trust_remote_code=True).eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if stored == "last":
        places = {value.data_ptr(): name for name, value in model.state_dict().items()}
        tensors = {name: tensors[name] for name in places.values()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, model


@pytest.mark.parametrize(
    ("kind", "stored"), [("block", "both"), ("block", "last"), ("layer", "last"), ("outside", "both")]
)
def test_a_module_under_two_names(kind: str, stored: str, tmp_path: Path) -> None:
    source, dense = shared(tmp_path / "dense", kind, stored)
    report = pocketllm.compress(source, tiny.target(8.0), tmp_path / "out", trust_remote_code=True)
    names = [entry["name"] for entry in report.to_dict()["matrices"]]
    assert "h.0.up.weight" in names and "first.weight" not in names
    assert ("h.2.up.weight" in names) == (kind == "outside")
    with torch.no_grad():
        wanted = dense(IDS).logits
        for mode in ("dense", "packed"):
            model, _ = pocketllm.load(tmp_path / "out", mode=mode, trust_remote_code=True)
            assert (model(IDS).logits - wanted).norm() < 0.2 * wanted.norm()
            model.save_pretrained(tmp_path / mode)
            again, _ = pocketllm.load(tmp_path / mode, mode=mode, trust_remote_code=True)
            assert torch.equal(again(IDS).logits, model(IDS).logits)
    pocketllm.export(tmp_path / "out", tmp_path / "exported", torch.float32, trust_remote_code=True)
    exported = t.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    torch.testing.assert_close(exported(IDS).logits, again(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["block", "layer", "outside"])
def test_calibration_refuses_it_before_any_work(kind: str, tmp_path: Path) -> None:
    source, _ = shared(tmp_path / "dense", kind, "both")
    with pytest.raises(ConfigError, match=r"runs one module as h\.0(\.up)? and as (h\.2|first)"):
        pocketllm.compress(source, tiny.on_trellis(), tmp_path / "out", trust_remote_code=True)
    assert not (tmp_path / "out").exists()


def test_values_that_one_module_cannot_have(tmp_path: Path) -> None:
    source, _ = shared(tmp_path / "dense", "block", "both")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "h.2.up.bias": torch.ones(52)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"stores h\.2.* with different values"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "out", trust_remote_code=True)
