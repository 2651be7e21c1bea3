"""Every type of GGUF file gives exactly the model that it was made from, or is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from pocketllm.errors import SourceError
from pocketllm.source import gguf_model, resolve
from pocketllm.source.folder import load_dense
from tests import gguf_files, gguf_store, tiny
from tests.gguf_types import TYPES

IDS = torch.arange(3, 33)[None]  # more than a sliding window


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    tiny.tokenizer().save_pretrained(tmp_path)


def check(file: Path, dense: Any) -> None:
    with torch.inference_mode():
        found = load_dense(resolve(str(file)), torch.float32)(IDS).logits
        torch.testing.assert_close(found, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_the_model_of_the_file(name: str, tmp_path: Path) -> None:
    dense = gguf_store.model(TYPES[name])
    check(gguf_store.write(tmp_path / "tiny.gguf", dense, TYPES[name]), dense)


REFUSED = {
    "gpt-oss": {"expert_count": 4, "expert_used_count": 2},
    "gemma4": {},
    "falcon": {"attention.head_count_kv": 2},
    "mistral": {},
    "deci": {},
    "t5": {},
    "gemma": {},
}
"""Type -> settings with which it is refused. A further type is one that transformers does not know at all."""


@pytest.mark.parametrize("architecture", REFUSED)
def test_types_that_are_refused(architecture: str, tmp_path: Path) -> None:
    keys = {"attention.head_count": 2, "attention.layer_norm_epsilon": 1e-5, **REFUSED[architecture]}
    file = gguf_files.write_header(tmp_path / "tiny.gguf", architecture, keys)
    with pytest.raises(
        SourceError, match=rf"tiny\.gguf: a GGUF file of the type '{architecture}' cannot be "
    ) as raised:
        resolve(str(file))
    assert str(raised.value).endswith("compress the original checkpoint (safetensors) instead")


def test_what_is_tested_or_refused_is_all_that_transformers_reads() -> None:
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    def bare(names: Any) -> set[str]:
        return {name.replace("_", "").replace("-", "") for name in names}

    known = bare([*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS]) - {"general", "tokenizer"}
    here = bare([*(kind.architecture for kind in TYPES.values()), *REFUSED]) | {"umt5"}
    assert known == here - {"gemma"}


def test_the_documentation_names_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip(): line.split("|")[2] for line in text.splitlines() if line.startswith("| ")
    }
    named = {what: set(re.findall(r"`([^`]+)`[ ,;]", rows[what])) for what in ("read", "refused")}
    assert named["read"] == {kind.architecture for kind in TYPES.values()}
    assert named["refused"] == {*REFUSED, "umt5", "llama-quantize"} - {"falcon", "gemma"}


def test_a_block_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    kind = TYPES["qwen3.5"]
    kind = dataclasses.replace(kind, keys={**kind.keys, "block_count": 3, "nextn_predict_layers": 1})
    dense = gguf_store.model(kind)
    added = {"blk.2.nextn.eh_proj.weight": torch.ones(48, 96), "blk.2.attn_norm.weight": torch.ones(48)}
    check(gguf_store.write(tmp_path / "tiny.gguf", dense, kind, added), dense)


def test_norms_of_heads_that_transformers_does_not_read(tmp_path: Path) -> None:
    """As StableLM 2 12B has them."""
    dense, added = gguf_store.model(TYPES["stablelm"]), {"blk.0.attn_q_norm.weight": torch.ones(4, 12)}
    with pytest.raises(
        SourceError, match=r"StableLmForCausalLM has parameters for .* would ignore the others"
    ):
        resolve(str(gguf_store.write(tmp_path / "tiny.gguf", dense, TYPES["stablelm"], added)))


def test_a_gate_with_a_dimension_of_one(tmp_path: Path) -> None:
    """transformers adds one to that of qwen2moe, which `llama-quantize` removes and the converter does not."""
    kind = dataclasses.replace(TYPES["qwen2_moe"], store=_with_gate)
    with pytest.raises(
        SourceError, match=r"shared_expert_gate.weight has the shape \[1, 1, 48\], wanted \[1, 48\]"
    ):
        resolve(str(gguf_store.write(tmp_path / "tiny.gguf", gguf_store.model(kind), kind)))


def _with_gate(name: str, value: torch.Tensor, config: Any) -> gguf_store.Stored:
    for part, stored in gguf_store.experts(name, value, config):
        yield part, stored[None] if "shared_expert_gate" in name else stored
