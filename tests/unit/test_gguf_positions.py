"""Positions and attention of models in GGUF files are those of the models that the files were made from."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM

from pocketllm.errors import SourceError
from pocketllm.source import gguf_model, resolve
from pocketllm.source.folder import load_dense
from pocketllm.source.gguf_positions import RotaryScaling
from tests import gguf_files, tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))


@pytest.fixture(scope="module")
def dense() -> Any:
    return gguf_files.model()


def scaled(dense: Any, **parameters: Any) -> Any:
    """The model with other rotary positions."""
    config = deepcopy(gguf_files.CONFIG)
    config.rope_parameters = {"rope_theta": 10000.0, **parameters}
    made = LlamaForCausalLM(config).eval()
    made.load_state_dict(dense.state_dict())
    return made


def frequencies(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


LLAMA = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "llama3", "factor": 8.0, **LLAMA},
        {"rope_type": "llama3", "factor": 32.0, **LLAMA},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "default"},
    ],
    ids=["llama 3.1", "llama 3.2", "linear", "yarn", "factors of one"],
)
def test_scaled_positions(dense: Any, tmp_path: Path, parameters: dict[str, Any]) -> None:
    """transformers does not read them; they are those of the model that the file was made from."""
    wanted, method = scaled(dense, **parameters), parameters["rope_type"]
    if method in ("linear", "yarn"):
        how: dict[str, Any] = {"scaling": (method, parameters["factor"])}
    else:
        how = {"factors": frequencies(dense) / frequencies(wanted)}
    folder = resolve(str(gguf_files.write(tmp_path / "tiny.gguf", dense, **how)))
    found = load_dense(folder, torch.float32)
    torch.testing.assert_close(frequencies(found), frequencies(wanted))
    assert found.model.rotary_emb.attention_scaling == wanted.model.rotary_emb.attention_scaling


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"factors": [1.0] * 15 + [7.0]}, "by factors for each frequency"),
        ({"factors": [8.0] * 5}, "by factors for each frequency"),
        ({"scaling": ("longrope", 4.0)}, "by the method 'longrope'"),
        ({"factors": [1.0] * 8 + [8.0] * 8, "scaling": ("linear", 4.0)}, "by the method 'linear'"),
    ],
)
def test_scaled_positions_that_cannot_be_translated(
    dense: Any, tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", dense, **how)
    with pytest.raises(
        SourceError, match=f"tiny.gguf: scales rotary positions {words}, .* original checkpoint"
    ):
        resolve(str(file))


@pytest.mark.parametrize("wrong", [0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["factor", "factors"])
def test_scaling_that_is_not_possible(what: str, wrong: float, dense: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"scaling": ("linear", wrong)} if what == "factor" else {"factors": [1.0, wrong]}
    name = "llama.rope.scaling.factor" if what == "factor" else "rope_freqs.weight"
    file = gguf_files.write(tmp_path / "tiny.gguf", dense, **how)
    with pytest.raises(
        SourceError, match=rf"tiny.gguf: {name} is {wrong}, wanted a positive number; .* fetch it again"
    ):
        resolve(str(file))


@pytest.mark.parametrize(("number", "refused"), [(1.0, False), (1.2, True)])
def test_scaled_attention_without_a_method(number: float, refused: bool, tmp_path: Path) -> None:
    """llama.cpp multiplies by it, whatever the method is."""
    keys = {"rope.scaling.attn_factor": number, "rope.scaling.original_context_length": 64}
    file = gguf_files.write_header(tmp_path / "x.gguf", "llama", keys)
    found = RotaryScaling.of(gguf.GGUFReader(file), "llama", file)
    with pytest.raises(SourceError, match="scales rotary positions") if refused else nullcontext():
        found.put_into(deepcopy(gguf_files.CONFIG), file)


def test_a_factor_without_a_method_is_linear(tmp_path: Path) -> None:
    file = gguf_files.write_header(tmp_path / "x.gguf", "llama", {"rope.scaling.factor": 4.0})
    found = RotaryScaling.of(gguf.GGUFReader(file), "llama", file)
    assert (found.method, found.values) == ("linear", {"factor": 4.0})


def gemma3(factor: float | None = None, **changes: Any) -> Any:
    """A tiny random Gemma 3, its global layers with positions scaled by a factor."""
    parts: dict[str, Any] = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    for part in parts.values():
        part["rope_type"] = "default"
    if factor is not None:
        parts["full_attention"] |= {"rope_type": "linear", "factor": factor}
    sizes = {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, **changes}
    return tiny.model("gemma3", layer_types=None, rope_parameters=parts, **sizes)


@pytest.mark.parametrize(
    ("factor", "changes"),
    [(None, {}), (8.0, {}), (None, {"num_hidden_layers": 62, "query_pre_attn_scalar": 18})],
)
def test_gemma_3(factor: float | None, changes: dict[str, Any], tmp_path: Path) -> None:
    """Only global layers are scaled; the scale of attention is that of llama.cpp, which sets it by the size."""
    wanted = gemma3(factor, **changes)
    scaling = None if factor is None else ("linear", factor)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = load_dense(
        resolve(str(gguf_files.write_gemma3(tmp_path / "g.gguf", wanted, scaling))), torch.float32
    )
    for part in ("full_attention", "sliding_attention"):
        name = f"{part}_inv_freq"
        torch.testing.assert_close(
            getattr(found.model.rotary_emb, name), getattr(wanted.model.rotary_emb, name)
        )
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-4)


def test_gemma_3_scaled_otherwise(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    file = gguf_files.write_gemma3(tmp_path / "g.gguf", gemma3(), ("yarn", 8.0))
    with pytest.raises(SourceError, match=r"g\.gguf: scales rotary positions by the method 'yarn'"):
        resolve(str(file))
