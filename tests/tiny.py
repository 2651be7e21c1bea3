"""Tiny random models, their tokenizer, and settings that compress them in about a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm import CompressConfig

# 36 and 52 are not multiples of vector_len 5: rows are padded.
_SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
_ROTARY = {**_SIZES, "intermediate_size": 52, "num_key_value_heads": 1, "head_dim": 18}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_EXPERTS = {**_ROTARY, "num_local_experts": 3, "num_experts_per_tok": 2}


def config(architecture: str, **changes: Any) -> Any:
    """The transformers configuration of a tiny model."""
    import transformers as t

    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, {**_ROTARY, "tie_word_embeddings": True}),
        "qwen3": (t.Qwen3Config, _ROTARY),
        "gemma": (t.GemmaConfig, _ROTARY),
        "phi": (t.PhiConfig, {**_SIZES, "num_attention_heads": 3, "intermediate_size": 52}),
        "gpt2": (
            t.GPT2Config,
            {"n_embd": 36, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 64},
        ),
        "gpt_neox": (t.GPTNeoXConfig, {**_SIZES, "intermediate_size": 52}),
        "gemma3": (t.Gemma3TextConfig, {**_ROTARY, **_SLIDING, "query_pre_attn_scalar": 18}),
        "gemma2": (t.Gemma2Config, {**_ROTARY, **_SLIDING, "query_pre_attn_scalar": 18}),
        "qwen3_sliding": (t.Qwen3Config, {**_ROTARY, **_SLIDING, "use_sliding_window": True}),
        "mixtral": (t.MixtralConfig, _EXPERTS),
        "gpt_oss": (t.GptOssConfig, {**_EXPERTS, **_SLIDING}),
        "qwen3_moe": (
            t.Qwen3MoeConfig,
            {**_ROTARY, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        ),
    }
    cls, settings = makers[architecture]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return cls(**{**settings, **special, **changes})


MIXED = ("gemma3", "gemma2", "qwen3_sliding")  # every block of another kind than the one before it
ARCHITECTURES = ("llama", "qwen3", "gemma", "phi", "gpt2", "gpt_neox", "mixtral", "qwen3_moe")


def model(architecture: str = "llama", **changes: Any) -> Any:
    """A tiny random causal language model, float32, its biases and norms random, too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(architecture, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


def tokenizer() -> Any:
    """A tokenizer of 96 byte-like tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 125)]
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", "<unk>", *characters])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # short pieces are faster
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def save(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A tiny model's folder, with tokenizer."""
    model(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def settings(**changes: Any) -> CompressConfig:
    """d = 5, K = 32, one quick epoch."""
    codec = dataclasses.replace(
        pocketllm.CodecConfig(), epochs=1, kmeans_iterations=3, **changes.pop("codec", {})
    )
    values = {"vector_len": 5, "codebook_size": 32, "codebook_scope": "kind", **changes}
    return CompressConfig(codec=codec, **values)


def target(bpw: float, **changes: Any) -> CompressConfig:
    """A bit budget instead of fixed sizes."""
    return settings(vector_len=None, codebook_size=None, codebook_scope="auto", target_bpw=bpw, **changes)


def calibrated(config: CompressConfig) -> CompressConfig:
    """The same with rotation and error feedback, on a little of Python's own text."""
    return dataclasses.replace(config, calibration=pocketllm.config.CalibrationConfig(tokens=256, context=32))


def on_trellis(bpw: float | None = 6.0, **changes: Any) -> CompressConfig:
    """The calibrated presets at a tiny scale; `calibration` and `codec` change some of their settings."""
    codec = {"trellis_width": 6, "kmeans_iterations": 3, "depth": 1, "hidden": 8, **changes.pop("codec", {})}
    calibration = {"tokens": 512, "context": 32, "sensitivity_tokens": 128, **changes.pop("calibration", {})}
    return CompressConfig(
        codec=pocketllm.CodecConfig(**codec),
        calibration=pocketllm.config.CalibrationConfig(**calibration),
        target_bpw=bpw,
        **{"decoder_scope": "matrix", **changes},
    )


HASHED = {"trellis_width": 9, "codebook_source": "hashed", "max_sample": 1 << 12}
"""Settings of the codec for a hashed trellis."""
