"""`from_pretrained` called directly checks a folder as `pocketllm.load` does, before it reads weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping

import pocketllm
from pocketllm.errors import FormatError, LoadError
from pocketllm.format import checkpoint as ckpt
from pocketllm.runtime import load_checks

IDS = torch.arange(3, 20)[None]


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(small: Path, tmp_path: Path) -> Path:
    """What `save_pretrained` writes: without a report."""
    pocketllm.load(small)[0].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("cls", [t.AutoModelForCausalLM, t.AutoModel, t.LlamaForCausalLM])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "added_tokens.json",
            "additional_chat_templates/tool_use.jinja",
            "pytorch_model.bin",
            "modeling.py",
        ),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"),
    ],
)
def test_a_file_that_nobody_verified(
    name: str, cls: Any, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    monkeypatch.setattr(t.PreTrainedModel, "_load_pretrained_model", None)  # no weight is read
    with pytest.raises(FormatError, match=f"{name}.*remove it"):
        cls.from_pretrained(copy)


@pytest.mark.parametrize("cls", [t.AutoModelForCausalLM, t.LlamaForCausalLM])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_altered_file(name: str, cls: Any, copy: Path) -> None:
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(FormatError, match=name):
        cls.from_pretrained(copy)


@pytest.mark.parametrize("cls", [t.AutoModelForCausalLM, t.LlamaForCausalLM])
def test_pickles_are_not_opened(cls: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    (saved / "weights.bin").write_bytes(b"\x80\x04.")
    configured(saved, transformers_weights="weights.bin")
    # A class that is named gets its configuration without its place: transformers itself refuses such a name.
    with pytest.raises((FormatError, ValueError), match=r"weights\.bin|transformers_weights"):
        cls.from_pretrained(saved)
    configured(saved, transformers_weights=None)
    (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
    for named, found in (
        ("weights.bin", r"weights\.bin"),
        ("../outside.safetensors", r"outside\.safetensors|no pocketllm\.json"),
    ):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        (saved.parent / "outside.safetensors").write_bytes(b"")
        with pytest.raises(FormatError, match=found):
            cls.from_pretrained(saved)


def test_weights_of_several_folders_are_refused(saved: Path) -> None:
    files = [str(saved / "model.safetensors"), str(saved.parent / "other.safetensors")]
    with pytest.raises(FormatError, match=r"other\.safetensors: only"):
        load_checks.verify_before_reading(files, None)
    load_checks.verify_before_reading(None, None)


def test_sizes_that_the_files_cannot_hold_are_not_built(saved: Path) -> None:
    configured(saved, num_hidden_layers=1 << 40)
    with pytest.raises(FormatError, match="num_hidden_layers is"):
        t.AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("cls", [t.AutoModelForCausalLM, t.AutoModel, t.AutoModelForSequenceClassification])
def test_a_missing_tensor_is_not_filled_at_random(cls: Any, saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(LoadError, match=r"no file contains (model\.)?norm\.weight \(1 tensors missing\)"):
        cls.from_pretrained(saved)


def test_a_new_head_may_start_at_random(small: Path) -> None:
    model, info = t.AutoModelForSequenceClassification.from_pretrained(small, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert model(IDS).logits.isfinite().all()


def test_a_folder_of_the_hub_cache_may_lack_files(small: Path, copy: Path) -> None:
    """transformers fetches what it needs; the rest of the report's files is not there."""
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json: missing"):
        ckpt.verify(copy)
    load_checks.verify_folder(copy, is_partial=True)
    (copy / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no \*\.safetensors"):
        load_checks.verify_folder(copy, is_partial=True)


def test_a_subfolder_is_verified_when_its_weights_are_found(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "outer" / "inner")
    t.LlamaForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")
    (tmp_path / "outer" / "inner" / "added_tokens.json").write_text("{}")
    with pytest.raises(FormatError, match=r"added_tokens\.json"):
        t.LlamaForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")


def test_load_verifies_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    verify = load_checks.verify_folder

    def counted(folder: Path, is_partial: bool = False) -> None:
        seen.append(folder)
        verify(folder, is_partial)

    monkeypatch.setattr(load_checks, "verify_folder", counted)
    pocketllm.load(small)
    assert not seen  # load's own verification is not repeated
    t.AutoModelForCausalLM.from_pretrained(small)
    assert seen == [small]


def test_conversions_only_of_tensors_that_need_them(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' table of conversions is built only if a stored name or shape is not the model's own."""
    path, built = saved / "model.safetensors", []
    called = "get_model_conversion_mapping"
    monkeypatch.setattr(conversion_mapping, called, lambda *given, **options: built.append(given) or [])
    t.LlamaForCausalLM.from_pretrained(saved)
    assert not built
    tensors = load_file(path)
    save_file({**tensors, "of.another.name": torch.zeros(1)}, path, {"format": "pt"})
    t.LlamaForCausalLM.from_pretrained(saved)
    assert len(built) == 1
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        t.LlamaForCausalLM.from_pretrained(saved)
    assert len(built) == 2
    t.LlamaForCausalLM.from_pretrained(
        saved.parent / "saved", key_mapping={"x": "y"}, ignore_mismatched_sizes=True
    )
    assert len(built) == 3
