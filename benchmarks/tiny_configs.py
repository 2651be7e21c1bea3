"""Tiny configurations of every causal language model type of transformers.

The default configuration of a type is shrunk by the names of its settings, sub-configurations included, so that new
types need nothing here. `_OWN` has what the names of a type do not say.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 96
_HIDDEN, _HEADS, _LAYERS = 64, 4, 2
_SIZES: tuple[tuple[str, int], ...] = (  # the first pattern that a setting's name matches in full counts
    (r".*num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups|swa_num_key_value_heads", 2),
    (r".*(num_.*layers|n_layers?|num_blocks|decoder_layers|encoder_layers|n_layer)|depth", _LAYERS),
    (r"hidden_size_per_layer_input", 16),
    (r".*kv_lora_rank|.*q_lora_rank|.*lora_rank.*|.*_low_rank_dim|.*lora_dim", 16),
    (r"qk_rope_head_dim|.*rope_head_dim|rotary_dim", 8),
    (r".*head_dim|.*head_size|attention_head_dim|.*d_head|kv_channels|.*headdim", 16),
    (r".*qk_head_dim", 24),
    (r".*(mamba|ssm|conv)_?n_?heads?|mamba_num_heads|num_heads_mamba", 8),
    (r".*(num_.*heads|n_heads?|.*attention_heads|num_heads)", _HEADS),
    (r".*num_experts_per_tok|.*top_?k|moe_topk|num_experts_per_token|num_selected_experts|moe_k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*(num_.*experts|n_routed_experts|moe_num_experts|.*num_expert)", 4),
    (r"n_group|topk_group|num_expert_group|.*n_groups?", 1),
    (
        r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|n_inner|feed_forward.*size|inner_dim|d_ff|dim_ff|dff|shared_expert.*size)",
        64,
    ),
    (r".*(vocab_size|num_embeddings)(_per_layer_input)?", VOCABULARY),
    (
        r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|seq_len|model_max_length)",
        128,
    ),
    (r".*sliding_window|.*window_size|attention_window|.*chunk_size", 8),
    (r".*(ssm_state_size|d_state|state_size|mamba_d_state)", 8),
    (
        r".*(hidden_size|hidden_size_global|adapter_in_dim|adapter_out_dim|adapter_input_size|d_model|n_embd|d_embedder|embedding_size|dim|lru_width|embed_dim|emb_dim|n_embed|embedding_dim)",
        _HIDDEN,
    ),
)
_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": _LAYERS,
    "num_hidden_layers": _LAYERS,
}
_REFUSED_DEFAULTS = ("gemma4_assistant",)
_INDEXER = {f"indexer_{k}": v for k, v in (("n_heads", 2), ("kv_heads", 1), ("head_dim", 16))}
_INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
_LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
_LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 24}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 64, "vocab_size": 260},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": {"per_layer_config": {"01": _LATENT}}},
    "dots3_note_text": {"per_layer_config": {"01": _LATENT}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTANT}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minimax": {"block_size": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_HYBRID, "mamba_dt_rank": 4, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        **_HYBRID,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
    },
}


def config_of(kind: str) -> Any:
    """The tiny configuration of a type.

    Some multimodal types name a class for their language model that takes a configuration which no Auto class knows;
    it is theirs then, and names its class.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as AUTO

    own_type = getattr(transformers, AUTO[kind]).config_class.model_type
    if own_type not in AUTO:
        config = _tiny(CONFIG_MAPPING[own_type], own_type)
        config.architectures = [AUTO[kind]]
        return config
    return _tiny(CONFIG_MAPPING[kind], kind)


def _tiny(cls: Any, kind: str) -> Any:
    """A configuration of a class and type at a tiny size."""
    own = _OWN.get(kind, {})
    # A default that the class itself refuses cannot be asked for its settings; `own` says what is missing.
    default = cls(**own) if kind in _REFUSED_DEFAULTS else cls()
    return cls(**_shrunk(cls, default.to_dict(), own))


def _shrunk(cls: Any, values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration class at a tiny size."""
    found: dict[str, Any] = {}
    subs = getattr(cls, "sub_configs", {}) or {}
    for name, value in values.items():
        if name in subs and (isinstance(value, dict) or name in own):
            sub = _sub_config(subs[name], value)
            value = value if isinstance(value, dict) else sub().to_dict()
            found[name] = _shrunk(sub, value, own.get(name, {}))
        elif (size := _size(name, value)) is not None:
            found[name] = size
    if values.get("kv_lora_rank") and values.get(
        "qk_rope_head_dim"
    ):  # latent attention: every head has its keys
        found["num_key_value_heads"] = _HEADS
        found["head_dim"] = 8 if values.get("head_dim") == values["qk_rope_head_dim"] else 24
        found["qk_head_dim"] = 24
    if "is_decoder" in values:
        found["is_decoder"] = True
    return {**found, **{name: value for name, value in own.items() if name not in subs}}


def _sub_config(cls: Any, values: Any) -> Any:
    """The class of a sub-configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    return CONFIG_MAPPING[values["model_type"]] if cls is AutoConfig else cls


def _size(name: str, value: Any) -> Any:
    if name in _TOKENS:
        return _TOKENS[name]
    if name.endswith("token_id") or name.endswith("token_index"):
        return 2 if isinstance(value, int) and not isinstance(value, bool) else None
    if (
        isinstance(value, list)
        and len(value) > _LAYERS
        and re.search(r"layer|block|types|pattern|window", name)
    ):
        return _one_of_each(value)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
        return None
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _one_of_each(values: list[Any]) -> list[Any]:
    """Two entries of a list with one per layer, different ones if there are any."""
    kinds = list(dict.fromkeys(map(repr, values)))
    first = {repr(v): v for v in values}
    return [first[kinds[0]], first[kinds[-1]]]
