"""A tiny model of every type of GGUF file that is read, with settings that are not the defaults of transformers."""

from __future__ import annotations

from typing import Any

from tests.gguf_store import Type, bloom, convolutions, experts, gpt2, llama, qwen35, shifted_norms

_VOCABULARY = {"vocab_size": 96, "max_position_embeddings": 128}
_SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 56, **_VOCABULARY},
}
_WIDTH = _SIZES["hidden_size"] * 4  # of layers whose width GGUF always gives as this


def _rotary(base: float = 500.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base, **more}


_LLAMA = {**_SIZES, "rms_norm_eps": 0.02, "rope_parameters": _rotary()}
_WIDE = {**_LLAMA, "head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_WINDOW = {"attention.sliding_window": 8}
_LINEAR_ATTENTION = {
    **{**_WIDE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10},
    "linear_conv_kernel_dim": 3,
    "rope_parameters": _rotary(partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
}
_LINEAR_ATTENTION_KEYS = {
    **{"full_attention_interval": 2, "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2},
    **{"ssm.time_step_rank": 4, "ssm.inner_size": 40, "rope.dimension_sections": [2, 1, 1, 0]},
    "rope.dimension_count": 8,
}
_FALCON = {**_SIZES, "layer_norm_epsilon": 0.02}
_FALCON_KEYS = {"attention.head_count_kv": 1, "feed_forward_length": _WIDTH, "rope.freq_base": None}
_BLOOM = {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "layer_norm_epsilon": 0.02}
_BLOOM_KEYS = {"attention.head_count_kv": 4, "feed_forward_length": _WIDTH, "context_length": 48}
_STABLELM = {**_SIZES, "layer_norm_eps": 0.02, "rope_parameters": _rotary(1e4, partial_rotary_factor=0.5)}
_STABLELM_KEYS = {"rope.freq_base": None, "rope.dimension_count": 6}

TYPES = {
    "llama": Type("llama", "llama", _WIDE, {"rope.dimension_count": 16, "vocab_size": 96}, llama),
    "mistral": Type("llama", "mistral", {**_WIDE, "sliding_window": None}, {}, llama, "Mistral 7B"),
    "mistral, by name": Type("llama", "mistral", {**_WIDE, "sliding_window": None}, {}, llama, "mistral"),
    "qwen2": Type("qwen2", "qwen2", _LLAMA),
    "qwen2_moe": Type(
        "qwen2moe",
        "qwen2_moe",
        {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 28, "tie_word_embeddings": True},
        {"expert_shared_feed_forward_length": 28},
        experts,
    ),
    "qwen3": Type("qwen3", "qwen3", {**_WIDE, "tie_word_embeddings": True}),
    "qwen3_moe": Type("qwen3moe", "qwen3_moe", {**_WIDE, **_EXPERTS, "norm_topk_prob": True}, {}, experts),
    "qwen3.5": Type("qwen35", "qwen3_5_text", _LINEAR_ATTENTION, _LINEAR_ATTENTION_KEYS, qwen35),
    "qwen3.5_moe": Type(
        "qwen35moe",
        "qwen3_5_moe_text",
        {**_LINEAR_ATTENTION, **_EXPERTS, "shared_expert_intermediate_size": 28},
        {
            **{**_LINEAR_ATTENTION_KEYS, "expert_shared_feed_forward_length": 28},
            "attention.recurrent_layers": [True, False],
        },
        qwen35,
    ),
    "phi3": Type(
        "phi3",
        "phi3",
        {**_LLAMA, "rope_parameters": _rotary(partial_rotary_factor=0.5), "sliding_window": 8},
        {**_WINDOW, "rope.dimension_count": 6, "rope.scaling.original_context_length": 128},
    ),
    "falcon": Type("falcon", "falcon", _FALCON, _FALCON_KEYS),
    "falcon, own head": Type("falcon", "falcon", {**_FALCON, "tie_word_embeddings": False}, _FALCON_KEYS),
    "bloom": Type("bloom", "bloom", _BLOOM, _BLOOM_KEYS, bloom),
    "bloom, own head": Type("bloom", "bloom", {**_BLOOM, "tie_word_embeddings": False}, _BLOOM_KEYS, bloom),
    "gpt2": Type(
        "gpt2",
        "gpt2",
        {
            **{"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
            "layer_norm_epsilon": 0.02,
        },
        {"feed_forward_length": _WIDTH},
        gpt2,
    ),
    "stablelm": Type("stablelm", "stablelm", {**_STABLELM, "use_qkv_bias": True}, _STABLELM_KEYS),
    "stablelm, parallel": Type(
        "stablelm",
        "stablelm",
        {**_STABLELM, "use_parallel_residual": True},
        {**_STABLELM_KEYS, "use_parallel_residual": True},
    ),
    "starcoder2": Type(
        "starcoder2",
        "starcoder2",
        {**_SIZES, "norm_epsilon": 0.02, "rope_parameters": _rotary(), "sliding_window": 8},
        _WINDOW,
    ),
    "mamba": Type(
        "mamba",
        "mamba",
        {
            **{
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "vocab_size": 96,
                "state_size": 6,
                "conv_kernel": 3,
            },
            **{"time_step_rank": 5, "layer_norm_epsilon": 0.02},
        },
        {
            **{
                "feed_forward_length": 0,
                "attention.head_count": 0,
                "ssm.conv_kernel": 3,
                "ssm.inner_size": 96,
            },
            **{
                "ssm.state_size": 6,
                "ssm.time_step_rank": 5,
                "ssm.dt_b_c_rms": False,
                "context_length": 2**20,
            },
            **{"attention.layer_norm_rms_epsilon": 0.02, "attention.layer_norm_epsilon": None},
        },
        convolutions,
    ),
    "nemotron": Type(
        "nemotron",
        "nemotron",
        {**_SIZES, "norm_eps": 0.02, "rope_parameters": _rotary(partial_rotary_factor=0.5)},
        {"attention.layer_norm_epsilon": 0.02, "rope.scaling.type": "none", "rope.dimension_count": 6},
        shifted_norms,
    ),
    "gemma2": Type(
        "gemma2",
        "gemma2",
        {
            **{**_WIDE, "rope_parameters": _rotary(1e4), "sliding_window": 8, "query_pre_attn_scalar": 16},
            **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        },
        {
            **{**_WINDOW, "rope.freq_base": None},
            **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        },
        shifted_norms,
    ),
    "gemma3": Type(
        "gemma3",
        "gemma3_text",
        {
            **{**_WIDE, "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 16},
            **{"final_logit_softcapping": 3.0, "layer_types": None},
            "rope_parameters": {"full_attention": _rotary(), "sliding_attention": _rotary(100.0)},
        },
        {**_WINDOW, "final_logit_softcapping": 3.0},
        shifted_norms,
    ),
    "lfm2": Type(
        "lfm2",
        "lfm2",
        {
            **{**_SIZES, "rope_parameters": _rotary(), "layer_types": ["conv", "full_attention"]},
            **{"conv_L_cache": 4, "norm_eps": 0.02, "block_auto_adjust_ff_dim": False},
        },
        {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 4},
        convolutions,
    ),
    "minimax_m2": Type(
        "minimax-m2",
        "minimax_m2",
        {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 3, "rotary_dim": 8},
        {"rope.dimension_count": 8, "expert_gating_func": 2, "expert_feed_forward_length": 56},
        experts,
    ),
}
