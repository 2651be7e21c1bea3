"""Tiny models of every type that transformers reads from GGUF files, stored as the converter of llama.cpp stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

Tensors = Iterator[tuple[str, torch.Tensor]]
_TOKENS = 96


def plain(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Store a tensor as it is."""
    yield name, value


def _permuted(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head from two halves to adjacent pairs, which llama.cpp rotates."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def llama(name: str, value: torch.Tensor, config: Any) -> Tensors:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    yield name, _permuted(value, heads[part]) if part in heads else value


def shifted_norms(name: str, value: torch.Tensor, config: Any) -> Tensors:
    yield name, value + 1 if name.endswith("norm.weight") else value


def qwen2_moe(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """As `llama-quantize` leaves it: without a dimension of one at the end (of ggml's order)."""
    yield from experts(name, value.squeeze(0) if "shared_expert_gate" in name else value, config)


def experts(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Fused gate and up projections of experts apart."""
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = value.chunk(2, dim=1)
        yield f"{stem}.gate_proj.weight", gate
        yield f"{stem}.up_proj.weight", up
    else:
        yield (f"{name}.weight" if last == "down_proj" else name), value


def gpt_oss(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Experts transposed, with gate and up projections that alternate taken apart."""
    stem, _, last = name.rpartition(".")
    kind, bias = last.removesuffix("_bias"), last.endswith("_bias")
    if last == "sinks":
        yield f"{name}.weight", value
    elif kind in ("gate_up_proj", "down_proj") and "experts" in stem:
        value, end = (value, "bias") if bias else (value.transpose(1, 2), "weight")
        if kind == "down_proj":
            yield f"{stem}.down_proj.{end}", value
        else:
            yield f"{stem}.gate_proj.{end}", value[:, ::2]
            yield f"{stem}.up_proj.{end}", value[:, 1::2]
    else:
        yield name, value


def falcon(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Groups of queries, a key and a value as all queries, all keys, all values."""
    if "query_key_value" in name:
        groups = _falcon_groups(config)
        parts = value.reshape(groups, config.num_attention_heads // groups + 2, -1, *value.shape[1:])
        rows = (parts[:, :-2], parts[:, -2], parts[:, -1])
        value = torch.cat([part.reshape(-1, *value.shape[1:]) for part in rows])
    yield name, value


def _falcon_groups(config: Any) -> int:
    return config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1


def bloom(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Queries, keys and values of a head as all queries, all keys, all values."""
    if "query_key_value" in name:
        value = value.reshape(config.n_head, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    yield name.removeprefix("transformer."), value


def gpt2(name: str, value: torch.Tensor, config: Any) -> Tensors:
    yield name, value.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else value


def minimax(name: str, value: torch.Tensor, config: Any) -> Tensors:
    if name.endswith("e_score_correction_bias"):
        name = name.replace("_bias", ".bias")
    yield from experts(name, value, config)


def mamba(name: str, value: torch.Tensor, config: Any) -> Tensors:
    if name.endswith("A_log"):
        value = -value.exp()
    yield name, value.squeeze(1) if "conv1d.weight" in name else value


def stablelm(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Norms of heads stacked."""
    if ".norms." not in name:
        yield name, value


def lfm2(name: str, value: torch.Tensor, config: Any) -> Tensors:
    yield name, value.squeeze(1) if "conv.conv" in name else value


def qwen35(name: str, value: torch.Tensor, config: Any) -> Tensors:
    """Value heads of linear attention tiled over its key heads, and the changes of gemma and mamba."""
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    own = 2 * config.linear_key_head_dim * keys

    def tiled(rows: torch.Tensor, width: int) -> torch.Tensor:
        return rows.reshape(keys, -1, width, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    stem, _, last = name.removesuffix(".weight").rpartition(".")
    if last in ("in_proj_qkv", "conv1d"):
        value = value.squeeze(1) if last == "conv1d" else value
        value = torch.cat([value[:own], tiled(value[own:], width)])
    elif last == "in_proj_z":
        value = tiled(value, width)
    elif last in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        value = tiled(value, 1)
    elif last == "out_proj":
        value = tiled(value.T, width).T
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        value = value + 1
    if last == "A_log":
        value = -value.exp()
    yield from experts(f"{stem}.dt_proj.bias" if last == "dt_bias" else name, value, config)


def gemma4(name: str, value: torch.Tensor, config: Any) -> Tensors:
    yield (f"{name}.weight" if name.endswith("layer_scalar") else name), value


@dataclass(frozen=True)
class Type:
    """A type of model, and how it is stored.

    model: its name in transformers. settings: of the configuration, none of them its default. keys: of the file, besides
    those that `_keys` makes of the configuration. without: keys that the converter leaves out. store: makes the tensors
    of the file of one of the model.
    """

    architecture: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    store: Callable[[str, torch.Tensor, Any], Tensors] = plain
    name: str = "tiny"


SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 56, "vocab_size": _TOKENS, "max_position_embeddings": 128},
}
ROTARY = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.02}
PARTLY = {"rope_parameters": {**ROTARY["rope_parameters"], "partial_rotary_factor": 0.5}}
WIDE = {**ROTARY, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
HEADS = ("attention.key_length", "attention.value_length")


def model(kind: Type) -> Any:
    """A random model in float32, with weights so large that every setting shows in its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(kind.model, **special, **kind.settings)
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for value in made.state_dict().values():
            value.add_(torch.randn_like(value) * 0.25)
    return made


def write(path: Path, dense: Any, kind: Type) -> Path:
    """Write a model in float32."""
    config = dense.config
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.architecture),
        config.num_hidden_layers,
    )
    writer = gguf.GGUFWriter(path, kind.architecture)
    writer.add_name(kind.name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    for key, value in {**_keys(config), **kind.keys}.items():
        if value is not None and key not in kind.without:
            _add(writer, f"{kind.architecture}.{key}", value)
    tied = set(dense.all_tied_weights_keys or {})
    for name, value in dense.state_dict().items():
        for part, stored in kind.store(name, value, config) if name not in tied else ():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            array = np.ascontiguousarray(stored.numpy())
            writer.add_tensor(found, array, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, adders[type(value)])(key, value)


def _keys(config: Any) -> dict[str, Any]:
    """Keys that the converter writes for most types, of those settings that there are."""
    rope = getattr(config, "rope_parameters", None) or {}
    own = rope.get("full_attention", rope)
    head, share = _first(config, "head_dim"), own.get("partial_rotary_factor")
    width = head or config.hidden_size // (_first(config, "num_attention_heads", "n_head") or 1)
    kinds = _first(config, "rms_norm_eps", "norm_eps"), _first(config, "layer_norm_eps", "layer_norm_epsilon")
    return {
        "block_count": config.num_hidden_layers,
        "context_length": _first(config, "max_position_embeddings", "n_positions"),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _first(config, "intermediate_size", "n_inner"),
        "attention.head_count": _first(config, "num_attention_heads", "n_head"),
        "attention.head_count_kv": _first(config, "num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": kinds[0],
        "attention.layer_norm_epsilon": kinds[1] or _first(config, "norm_epsilon"),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": own.get("rope_theta"),
        "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        "rope.dimension_count": None if share is None else int(width * share),
        "expert_count": _first(config, "num_experts", "num_local_experts"),
        "expert_used_count": _first(config, "num_experts_per_tok"),
        "expert_feed_forward_length": _first(config, "moe_intermediate_size"),
        "vocab_size": config.vocab_size,
    }


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


TYPES = {
    "llama": Type("llama", "llama", WIDE, {"rope.dimension_count": 16}, store=llama),
    "mistral": Type(
        "llama",
        "mistral",
        {**WIDE, "sliding_window": None},
        {"rope.dimension_count": 16},
        store=llama,
        name="mistral",
    ),
    "qwen2": Type("qwen2", "qwen2", ROTARY),
    "qwen2_moe": Type(
        "qwen2moe",
        "qwen2_moe",
        {**ROTARY, **EXPERTS, "shared_expert_intermediate_size": 28, "tie_word_embeddings": True},
        {"expert_shared_feed_forward_length": 28},
        store=qwen2_moe,
    ),
    "qwen3": Type("qwen3", "qwen3", {**WIDE, "tie_word_embeddings": True}),
    "qwen3_moe": Type("qwen3moe", "qwen3_moe", {**WIDE, **EXPERTS, "norm_topk_prob": True}, store=experts),
    "phi3": Type(
        "phi3",
        "phi3",
        {**ROTARY, **PARTLY, "sliding_window": 8, "original_max_position_embeddings": 128},
        {"attention.sliding_window": 8, "rope.scaling.original_context_length": 128},
    ),
    "falcon": Type(
        "falcon",
        "falcon",
        {**SIZES, "layer_norm_epsilon": 0.02, "max_position_embeddings": 2048},
        {"attention.head_count_kv": 1, "feed_forward_length": 192},
        without=("rope.freq_base", "vocab_size"),
        store=falcon,
    ),
    "falcon, new": Type(
        "falcon",
        "falcon",
        {
            **{**SIZES, "layer_norm_epsilon": 0.02, "max_position_embeddings": 2048},
            **{"new_decoder_architecture": True, "num_kv_heads": 2},
        },
        {"attention.head_count_kv": 2, "feed_forward_length": 192},
        without=("rope.freq_base", "vocab_size"),
        store=falcon,
    ),
    "bloom": Type(
        "bloom",
        "bloom",
        {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": _TOKENS, "layer_norm_epsilon": 0.02},
        {"attention.head_count_kv": 4, "feed_forward_length": 192, "context_length": 48},
        without=("vocab_size",),
        store=bloom,
    ),
    "gpt2": Type(
        "gpt2",
        "gpt2",
        {
            **{"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": _TOKENS, "n_positions": 64},
            "layer_norm_epsilon": 0.02,
        },
        {"feed_forward_length": 192},
        without=("vocab_size",),
        store=gpt2,
    ),
    "stablelm": Type(
        "stablelm",
        "stablelm",
        {
            **{**SIZES, "layer_norm_eps": 0.02, "use_qkv_bias": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"use_parallel_residual": False},
        without=("rope.freq_base", "vocab_size"),
    ),
    "starcoder2": Type(
        "starcoder2",
        "starcoder2",
        {**ROTARY, "norm_epsilon": 0.02, "sliding_window": 8},
        {"attention.sliding_window": 8},
        without=("vocab_size",),
    ),
    "mamba": Type(
        "mamba",
        "mamba",
        {
            **{"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": _TOKENS, "state_size": 6},
            **{"conv_kernel": 3, "time_step_rank": 5, "layer_norm_epsilon": 0.02},
        },
        {
            **{"context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0},
            **{"ssm.conv_kernel": 3, "ssm.inner_size": 96, "ssm.state_size": 6, "ssm.time_step_rank": 5},
            **{"attention.layer_norm_rms_epsilon": 0.02, "ssm.dt_b_c_rms": False},
        },
        without=("attention.layer_norm_epsilon", "vocab_size"),
        store=mamba,
    ),
    "nemotron": Type(
        "nemotron",
        "nemotron",
        {**ROTARY, **PARTLY, "norm_eps": 0.02},
        {"attention.layer_norm_epsilon": 0.02, "rope.scaling.type": "none"},
        without=("attention.layer_norm_rms_epsilon",),
        store=shifted_norms,
    ),
    "gemma2": Type(
        "gemma2",
        "gemma2",
        {
            **{**WIDE, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
            **{"query_pre_attn_scalar": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        },
        {
            **{"attention.sliding_window": 8, "attn_logit_softcapping": 5.0},
            "final_logit_softcapping": 3.0,
        },
        without=("rope.freq_base", "vocab_size"),
        store=shifted_norms,
    ),
    "gemma3": Type(
        "gemma3",
        "gemma3_text",
        {
            **{**WIDE, "num_hidden_layers": 6, "layer_types": None, "sliding_window": 8},
            **{"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {"attention.sliding_window": 8, "final_logit_softcapping": 3.0},
        without=("vocab_size",),
        store=shifted_norms,
    ),
    "gpt_oss": Type(
        "gpt-oss",
        "gpt_oss",
        {
            **{**WIDE, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 8},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"attention.sliding_window": 8, "expert_feed_forward_length": 56},
        store=gpt_oss,
    ),
    "gemma4": Type(
        "gemma4",
        "gemma4_text",
        {
            **{**WIDE, "num_hidden_layers": 6, "sliding_window": 8, "global_head_dim": 24},
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            **{"hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": _TOKENS},
        },
        {"attention.sliding_window": 8, "attention.key_length": 24, "attention.value_length": 24,
         "attention.key_length_swa": 16, "attention.value_length_swa": 16,
         "embedding_length_per_layer_input": 10, "attention.shared_kv_layers": 0,
         "attention.sliding_window_pattern": [True] * 5 + [False], "rope.dimension_count": 24,
         "rope.dimension_count_swa": 16},
        store=gemma4,
    ),
    "qwen35": Type(
        "qwen35",
        "qwen3_5_text",
        {
            **{**WIDE, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6},
            **{"linear_value_head_dim": 10, "linear_conv_kernel_dim": 3},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
                **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
            },
        },
        {
            **{"full_attention_interval": 2, "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2},
            **{"ssm.time_step_rank": 4, "ssm.inner_size": 40, "rope.dimension_sections": [2, 1, 1, 0]},
        },
        store=qwen35,
    ),
    "qwen35moe": Type(
        "qwen35moe",
        "qwen3_5_moe_text",
        {
            **{**WIDE, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6},
            **{"linear_value_head_dim": 10, "linear_conv_kernel_dim": 3},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
                **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
            },
            **{**EXPERTS, "shared_expert_intermediate_size": 28},
        },
        {
            **{"full_attention_interval": 2, "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2},
            **{"ssm.time_step_rank": 4, "ssm.inner_size": 40, "rope.dimension_sections": [2, 1, 1, 0]},
            "expert_shared_feed_forward_length": 28,
        },
        store=qwen35,
    ),
    "lfm2": Type(
        "lfm2",
        "lfm2",
        {
            **{**ROTARY, "layer_types": ["conv", "full_attention"], "conv_L_cache": 4, "norm_eps": 0.02},
            **{"block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
        },
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 4},
        store=lfm2,
    ),
    "minimax_m2": Type(
        "minimax-m2",
        "minimax_m2",
        {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 3, "rotary_dim": 8},
        {"rope.dimension_count": 8, "expert_gating_func": 2, "expert_feed_forward_length": 56},
        store=minimax,
    ),
}
