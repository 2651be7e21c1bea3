"""The plug-in for transformers: modes, dtypes, devices, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pocketllm
from pocketllm.errors import ConfigError, FormatError, LoadError, OutputError, SourceError
from pocketllm.format.checkpoint import read_report
from pocketllm.runtime import load_checks, transformers_plugin as plugin
from tests import tiny

TOKENS = torch.arange(3, 40)[None]
ROUNDING = 1e-5  # of logits up to 1, in float32


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    pocketllm.compress(tiny.save(folder / "dense"), tiny.settings(), folder / "out")
    return folder / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS.to(model.device), use_cache=False).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_dtypes(dtype: torch.dtype, mode: str, compressed: Path) -> None:
    model, _ = pocketllm.load(compressed, mode=mode, dtype=dtype)
    reference, _ = pocketllm.load(compressed, mode="dense", dtype=torch.float32)
    assert model.lm_head.weight.dtype == dtype
    # Decoding happens in float32 and is rounded once, whatever the dtype.
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight.to(dtype))
    assert torch.allclose(logits(model).float(), logits(reference), atol=0.05)


def test_casting_a_packed_model_changes_what_it_computes_in_and_not_what_it_holds(compressed: Path) -> None:
    model, _ = pocketllm.load(compressed, mode="packed", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.pocketllm.state_dict().items()}
    model.bfloat16()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.pocketllm.state_dict().items())


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_device_maps(device_map: Any, mode: str, compressed: Path) -> None:
    model, _ = pocketllm.load(compressed, mode=mode, device_map=device_map)
    reference, _ = pocketllm.load(compressed, mode="dense")
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=ROUNDING)


def test_disk_offload_is_refused(compressed: Path) -> None:
    with pytest.raises(ConfigError, match="disk"):
        pocketllm.load(compressed, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("mode", ["auto", "dense", "packed"])
def test_tied_head_and_embedding_are_one(mode: str, compressed: Path) -> None:
    model, _ = pocketllm.load(compressed, mode=mode)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not any("lm_head" in name for name in model.state_dict()) or mode == "dense"


def test_packed_generates_as_dense(compressed: Path) -> None:
    texts = []
    for mode in ("dense", "packed"):
        model, tokenizer = pocketllm.load(compressed, mode=mode)
        prompt = tokenizer("hello", return_tensors="pt")
        texts.append(model.generate(**prompt, max_new_tokens=8, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_weights_are_not_trainable(compressed: Path) -> None:
    model, _ = pocketllm.load(compressed)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.hf_quantizer.is_trainable  # for adapters


def test_unknown_mode(compressed: Path) -> None:
    with pytest.raises(ConfigError, match="mode: got 'fast'"):
        pocketllm.load(compressed, mode="fast")
    with pytest.raises(ConfigError, match="mode: got 'fast'"):
        plugin.PocketQuantizationConfig(mode="fast")


def test_who_wrote_a_folder_is_an_object_and_was_a_string(compressed: Path, tmp_path: Path) -> None:
    config = json.loads((compressed / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["producer"] == {"name": "pocketllm-codec", "version": pocketllm.__version__}
    quantization["producer"] = f"pocketllm-codec {pocketllm.__version__}"
    shutil.copytree(compressed, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "pocketllm.json").unlink()  # it has the checksum of config.json
    model, _ = pocketllm.load(tmp_path / "old")
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["producer"] == {"name": "pocketllm-codec", "version": pocketllm.__version__}


def test_quantizing_while_loading_is_refused(compressed: Path, tmp_path: Path) -> None:
    layout = json.loads((compressed / "config.json").read_text())["quantization_config"]
    config = plugin.PocketQuantizationConfig(**layout)
    with pytest.raises(ConfigError, match=r"pocketllm\.compress"):
        AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "dense"), quantization_config=config)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_what_save_pretrained_writes_is_loaded_the_safe_way(
    mode: str, compressed: Path, tmp_path: Path
) -> None:
    model, tokenizer = pocketllm.load(compressed, mode=mode)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = pocketllm.load(tmp_path / "again", mode=mode)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(FormatError, match=r"no pocketllm\.json \(save_pretrained does not write one\)"):
        read_report(tmp_path / "again")
    path = tmp_path / "again" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight.indices"][3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        pocketllm.load(tmp_path / "again", mode=mode)


def test_changed_weights_are_not_lost_silently(compressed: Path, tmp_path: Path) -> None:
    model, _ = pocketllm.load(compressed, mode="dense")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1.0)
    with pytest.raises(OutputError, match=r"layers\.1\.mlp\.down_proj\.weight: was changed"):
        model.save_pretrained(tmp_path / "again")


def test_layout_that_does_not_fit_the_model(compressed: Path) -> None:
    model = tiny.model()
    layout = plugin.PocketQuantizationConfig(
        **json.loads((compressed / "config.json").read_text())["quantization_config"]
    ).layout()
    load_checks.check_shapes(model, layout)
    with pytest.raises(FormatError, match=r"embed_tokens\.weight has shape"):
        load_checks.check_shapes(tiny.model(vocab_size=64), layout)
    with pytest.raises(FormatError, match="no such parameter"):
        load_checks.check_shapes(tiny.model("gpt2"), layout)


def test_layers_that_did_not_load_are_noticed(compressed: Path) -> None:
    model, _ = pocketllm.load(compressed, mode="packed")
    layout = model.hf_quantizer.quantization_config.layout()
    load_checks.verify_loaded(model, layout)
    matrix = plugin.packed_matrices(model)["model.layers.0.mlp.up_proj.weight"]
    matrix.indices[3] ^= 1
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.up_proj\.weight: altered"):
        load_checks.verify_loaded(model, layout)
    matrix._buffers["indices"] = matrix.indices.to("meta")
    with pytest.raises(LoadError, match="was not loaded"):
        load_checks.verify_loaded(model, layout)
    with pytest.raises(LoadError, match="did not load compressed"):
        load_checks.verify_loaded(tiny.model(), layout)


def test_a_model_loaded_without_the_plugin_is_refused(
    compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: (tiny.model(), {}))
    with pytest.raises(LoadError, match="without pocketllm"):
        pocketllm.load(compressed)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """Loads; what needs a tokenizer says so."""
    from pocketllm.cli.model_loading import load_any
    from pocketllm.runtime.export import export

    tiny.model().save_pretrained(tmp_path / "dense")
    pocketllm.compress(tmp_path / "dense", tiny.settings(), tmp_path / "out")
    model, tokenizer = pocketllm.load(tmp_path / "out")
    assert tokenizer is None and logits(model).isfinite().all()
    for folder in ("dense", "out"):
        with pytest.raises(SourceError, match=f"{folder}: has no tokenizer"):
            load_any(str(tmp_path / folder), "dense", "auto", "cpu", False)
    assert export(tmp_path / "out", tmp_path / "again", torch.bfloat16) > 0


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    tiny.save(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="dense: its tokenizer cannot be read"):
        pocketllm.compress(tmp_path / "dense", tiny.settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("order", ["pocketllm, transformers", "transformers, pocketllm"])
def test_either_import_order_registers(order: str, compressed: Path) -> None:
    code = (
        f"import {order}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(compressed)!r})\n"
        "print(type(model.hf_quantizer).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PocketQuantizer"


def test_importing_pocketllm_is_light() -> None:
    code = "import sys, pocketllm; print(sorted({'torch', 'transformers', 'faiss'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
