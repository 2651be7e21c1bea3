"""Tiny models as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=99,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = ["<s>", "</s>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "ab"]
MERGES = ["a b"]
_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
_GEMMA3_NAMES = {
    **_NAMES,
    **{"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    **{"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"},
    "post_feedforward_layernorm": "post_ffw_norm",
}


def model() -> Any:
    """A tiny random Llama with a head of its own, float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def write(
    path: Path,
    dense: Any,
    kind: str = "Q8_0",
    *,
    architecture: str = "llama",
    without: str = "",
    added: Any = None,
    tokenizer: bool = True,
    pre: str | None = "gpt-2",
    shards: int = 1,
    factors: Any = None,
    scaling: tuple[str, float] | None = None,
    blocks: int = CONFIG.num_hidden_layers,
    width: int = CONFIG.hidden_size,
    file_type: int | None = None,
    window: int = 0,
) -> Path:
    """Write a model of the class above.

    Args:
        kind: quantization of the matrices. without: name of a tensor to leave out. added: more tensors by name.
        pre: name of the way in which the tokenizer splits text.
        factors: that the frequencies of rotary positions are divided by. scaling: method and factor instead.
        blocks, width, file_type, window: as the header says.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(blocks)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(file_type or gguf.LlamaFileType[f"MOSTLY_{kind}"])
    if window:
        writer.add_sliding_window(window)
    if scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling[0])
        writer.add_rope_scaling_factor(scaling[1])
    if shards > 1:
        writer.add_uint16("split.count", shards)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, value in {**_tensors(dense), **(added or {})}.items():
        if name == without:
            continue
        if value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(dense: Any) -> dict[str, Any]:
    """Under the names of GGUF, with the rows of queries and keys in its order (pairs of a rotation adjacent)."""
    found = {}
    for name, value in dense.state_dict().items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = CONFIG.num_attention_heads if "q_proj" in name else CONFIG.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found[_name(name)] = np.ascontiguousarray(array)
    return found


def _name(name: str, parts: dict[str, str] = _NAMES) -> str:
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{parts[rest]}.weight"


def write_header(path: Path, architecture: str, keys: dict[str, Any]) -> Path:
    """Write the metadata of a model without its tensors. keys: without the prefix of the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gemma3(path: Path, dense: Any, scaling: tuple[str, float] | None = None) -> Path:
    """Write a tiny Gemma 3 in float32, without a tokenizer. scaling: method and factor of rotary positions."""
    config, kind = dense.config, gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if scaling is not None:
        writer.add_string("gemma3.rope.scaling.type", scaling[0])
        writer.add_rope_scaling_factor(scaling[1])
    for name, value in dense.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = value.numpy() + (1 if "norm" in name else 0)
        writer.add_tensor(_name(name, _GEMMA3_NAMES), np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
