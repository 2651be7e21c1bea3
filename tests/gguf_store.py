"""Stores a model of transformers in a GGUF file, as the converter of llama.cpp does: names, keys, order of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from tests import tiny

Stored = Iterator[tuple[str, Tensor]]
"""Tensors by names that `gguf` maps to its own."""


def plain(name: str, value: Tensor, config: Any) -> Stored:
    yield name, value


def llama(name: str, value: Tensor, config: Any) -> Stored:
    """Rows of a head from two halves to adjacent pairs, which llama.cpp rotates."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is not None:
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    yield name, value


def shifted_norms(name: str, value: Tensor, config: Any) -> Stored:
    yield name, value + 1 if name.endswith("norm.weight") else value


def experts(name: str, value: Tensor, config: Any) -> Stored:
    """Gate and up projections of experts separated; the gate of shared experts without its dimension of one."""
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = value.chunk(2, dim=1)
        yield f"{stem}.gate_proj.weight", gate
        yield f"{stem}.up_proj.weight", up
    elif last == "down_proj":
        yield f"{name}.weight", value
    else:
        yield (
            name.replace("e_score_correction_bias", "e_score_correction.bias"),
            value.squeeze(0) if "shared_expert_gate" in name else value,
        )


def bloom(name: str, value: Tensor, config: Any) -> Stored:
    """Queries, keys and values of each head as all queries, all keys, all values."""
    if "query_key_value" in name:
        value = value.reshape(config.n_head, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    yield name.removeprefix("transformer."), value


def gpt2(name: str, value: Tensor, config: Any) -> Stored:
    yield name, value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value


def convolutions(name: str, value: Tensor, config: Any) -> Stored:
    """State spaces as they enter the recurrence, kernels without their dimension of one."""
    if name.endswith("A_log"):
        value = -value.exp()
    yield name, value.squeeze(1) if name.endswith(("conv1d.weight", "conv.conv.weight")) else value


def qwen35(name: str, value: Tensor, config: Any) -> Stored:
    """As `convolutions` and `experts`; value heads of linear attention are in tiles over its key heads."""
    keys, own = config.linear_num_key_heads, 2 * config.linear_key_head_dim * config.linear_num_key_heads

    def tiled(rows: Tensor, width: int = config.linear_value_head_dim) -> Tensor:
        return rows.reshape(keys, -1, width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    stem, _, last = name.removesuffix(".weight").rpartition(".")
    if last in ("in_proj_qkv", "conv1d"):
        value = torch.cat([value[:own], tiled(value[own:])])
    elif last == "in_proj_z":
        value = tiled(value)
    elif last in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        value = tiled(value, 1)
    elif last == "out_proj":
        value = tiled(value.T).T
    elif not name.endswith("linear_attn.norm.weight"):
        ((name, value),) = shifted_norms(name, value, config)
    for part, stored in convolutions(f"{stem}.dt_proj.bias" if last == "dt_bias" else name, value, config):
        yield from experts(part, stored, config)


@dataclass(frozen=True)
class Type:
    """A type of model, and how it is stored.

    architecture: its name in GGUF. model: in transformers. settings: of the configuration, other than its defaults.
    keys: of the file, in addition to `_keys`, or in their place (None: left out). store: what becomes of a tensor.
    name: of the model.
    """

    architecture: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    store: Callable[[str, Tensor, Any], Stored] = plain
    name: str = "tiny"


def model(kind: Type) -> Any:
    """A random model in float32, with weights so large that every setting shows in its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(kind.model, **special, **kind.settings)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in made.state_dict().values():
            value.add_(torch.randn_like(value) * 0.25)
    return made


def _tokens(count: int) -> list[str]:
    """The tokens of the tests' tokenizer, and others beyond them."""
    known = {number: token for token, number in tiny.tokenizer().get_vocab().items()}
    return [known.get(number, f"t{number}") for number in range(count)]


def write(path: Path, dense: Any, kind: Type, added: dict[str, Tensor] | None = None) -> Path:
    """Write a model in float32. added: more tensors, by their names in GGUF."""
    config = dense.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, kind.architecture)
    writer.add_name(kind.name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_tokens(config.vocab_size))
    writer.add_pad_token_id(config.pad_token_id)
    for key, value in {**_keys(config), **kind.keys}.items():
        if value is not None:
            _add(writer, f"{kind.architecture}.{key}", value)
    tied, tensors = set(dense.all_tied_weights_keys or {}), dict(added or {})
    for name, value in dense.state_dict().items():
        for part, stored in kind.store(name, value, config) if name not in tied else ():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            tensors[found] = stored
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value.numpy()), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, adders[type(value)])(key, value)


def _keys(config: Any) -> dict[str, Any]:
    """Keys that are written for most types, None for settings that the configuration does not have."""
    rope = getattr(config, "rope_parameters", None) or {}
    own = rope.get("full_attention", rope)

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    return {
        "block_count": config.num_hidden_layers,
        "context_length": first("max_position_embeddings", "n_positions"),
        "embedding_length": config.hidden_size,
        "feed_forward_length": first("intermediate_size", "n_inner"),
        "attention.head_count": first("num_attention_heads"),
        "attention.head_count_kv": first("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": first("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": first("head_dim"),
        "attention.value_length": first("head_dim"),
        "rope.freq_base": own.get("rope_theta"),
        "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        "expert_count": first("num_experts", "num_local_experts"),
        "expert_used_count": first("num_experts_per_tok"),
        "expert_feed_forward_length": first("moe_intermediate_size"),
    }
