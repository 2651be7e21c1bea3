"""Convert stories260K (weights/stories260K.bin, weights/tok512.bin) to a folder that transformers reads: a trained
model of 260,000 weights, for experiments that need many passes.

    POCKETLLM_DATA=... python benchmarks/stories.py OUTPUT
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from common import data_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = 256


def read_model(path: Path) -> LlamaForCausalLM:
    """The model: seven int32 of sizes, then float32 weights, layer by layer within each kind."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", raw[:28])
    numbers = torch.from_numpy(np.frombuffer(raw[28:], dtype=np.float32).copy())
    kv, size = kv_heads * dim // heads, dim // heads
    shapes = {
        "embed_tokens.weight": (vocabulary, dim),
        "input_layernorm.weight": (layers, dim),
        "self_attn.q_proj.weight": (layers, dim, dim),
        "self_attn.k_proj.weight": (layers, kv, dim),
        "self_attn.v_proj.weight": (layers, kv, dim),
        "self_attn.o_proj.weight": (layers, dim, dim),
        "post_attention_layernorm.weight": (layers, dim),
        "mlp.gate_proj.weight": (layers, hidden, dim),
        "mlp.down_proj.weight": (layers, dim, hidden),
        "mlp.up_proj.weight": (layers, hidden, dim),
        "norm.weight": (dim,),
    }
    tensors, first = dict[str, Tensor](), 0
    for name, shape in shapes.items():
        part = numbers[first : first + int(np.prod(shape))].view(shape)
        first += part.numel()
        if name.startswith(("embed", "norm")):
            tensors[f"model.{name}"] = part
            continue
        for layer, weight in enumerate(part):
            if "q_proj" in name or "k_proj" in name:  # pairs of the rotation: neighbours there, halves here
                weight = weight.view(-1, size // 2, 2, dim).transpose(1, 2).reshape(-1, dim)
            tensors[f"model.layers.{layer}.{name}"] = weight
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer: an int32, then of each token score (float32), length (int32), bytes. Scores order the merges."""
    raw, at, vocabulary, scores = path.read_bytes(), 4, dict[str, int](), dict[str, float]()
    while at < len(raw):
        score, length = struct.unpack("fi", raw[at : at + 8])
        text, number = raw[at + 8 : at + 8 + length], len(vocabulary)
        at += 8 + length
        if number < len(SPECIAL):
            name = SPECIAL[number]
        elif number < len(SPECIAL) + BYTES:
            name = f"<0x{number - len(SPECIAL):02X}>"
        else:
            name = text.decode("utf-8").replace(" ", "▁")
        vocabulary[name], scores[name] = number, score
    merges = list[tuple[str, str]]()
    for token in sorted(vocabulary, key=lambda name: -scores[name]):
        if vocabulary[token] >= len(SPECIAL) + BYTES:
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            merges += [pair for pair in halves if all(half in vocabulary for half in pair)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def main() -> None:
    """Write model and tokenizer to the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    read_model(data_file("weights", "stories260K.bin")).save_pretrained(sys.argv[1])
    read_tokenizer(data_file("weights", "tok512.bin")).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
