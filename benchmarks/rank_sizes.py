"""What each rank of vLLM stores of a large compressed model: computed from the shapes, nothing is loaded.

    python benchmarks/rank_sizes.py

The models are built by transformers without weights. BPW are the bits per weight of blocks, END_BITS those of
embedding and head: an example, not a recommendation. Writes results/rank_sizes.json.
"""

from __future__ import annotations

import math
from typing import Any

from common import save

BPW, END_BITS, VECTOR_LEN, WIDTH = 2.0, 4.0, 2, 12
CACHE_TOKENS = 32768
LLAMA = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, int]] = {
    "Llama-3.1-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama-3.1-405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}
LAYOUTS = {
    "Llama-3.1-70B": ((1, 1), (2, 1), (4, 2), (8, 1)),
    "Llama-3.1-405B": ((8, 1), (8, 2), (8, 4), (16, 2)),
}
"""(tensor parallel, pipeline parallel)."""
CUT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}


def stored_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a parameter in the compressed folder: packed indices and row scales; vectors stay in 16 bits."""
    from pocketllm.codec.index_form import form_for

    if len(shape) == 1:
        return 2 * shape[0]
    bpw = BPW if ".layers." in name else END_BITS
    rows, columns = shape
    indices = form_for(1 << WIDTH, round(bpw * VECTOR_LEN)).nbytes(rows, math.ceil(columns / VECTOR_LEN))
    return indices + 2 * rows


def stage_of(name: str, layers: int, stages: int) -> int:
    """The pipeline stage that holds a parameter; vLLM gives the layers that are left over to the middle stages."""
    if ".layers." not in name:
        return 0 if "embed_tokens" in name else stages - 1
    number, each = int(name.split(".layers.")[1].split(".")[0]), [layers // stages] * stages
    for extra in range(2, layers % stages + 2):
        each[-extra] += 1
    stage = 0
    while number >= each[stage]:
        number, stage = number - each[stage], stage + 1
    return stage


def rank_bytes(config: Any, found: dict[str, tuple[int, ...]], tensor: int, stages: int) -> list[int]:
    """bf16 bytes that a rank of each stage holds after decoding: matrices are cut, vectors are not."""
    held = [0] * stages
    for name, shape in found.items():
        ways = tensor if name.split(".")[-2] in CUT else 1
        if name.split(".")[-2] in ("k_proj", "v_proj"):
            ways = min(tensor, config.num_key_value_heads)  # more ranks than heads: each head lies on several
        held[stage_of(name, config.num_hidden_layers, stages)] += 2 * math.prod(shape) // ways
    return held


def cache_bytes(config: Any, tensor: int, stages: int) -> int:
    """Keys and values of CACHE_TOKENS tokens on one rank, bf16."""
    heads = max(1, config.num_key_value_heads // tensor)
    return 4 * CACHE_TOKENS * heads * config.head_dim * math.ceil(config.num_hidden_layers / stages)


def main() -> None:
    """Compute and write."""
    from transformers import LlamaConfig

    models = {}
    for model, sizes in MODELS.items():
        config = LlamaConfig(**sizes, **LLAMA)
        found = shapes(config)
        stored = {name: stored_bytes(name, shape) for name, shape in found.items()}
        matrices = {name: shape for name, shape in found.items() if len(shape) == 2}
        largest = max(matrices.values(), key=math.prod)
        models[model] = {
            "weights": sum(map(math.prod, found.values())),
            "dense_bytes": 2 * sum(map(math.prod, found.values())),
            "compressed_bytes": sum(stored.values()),
            "largest_matrix_float32_bytes": 4 * math.prod(largest),
            "ranks": [
                {
                    "tensor_parallel": tensor,
                    "pipeline_parallel": stages,
                    "weights_bytes": max(rank_bytes(config, found, tensor, stages)),
                    "cache_bytes": cache_bytes(config, tensor, stages),
                }
                for tensor, stages in LAYOUTS[model]
            ],
        }
    form = {"bpw_blocks": BPW, "bpw_ends": END_BITS, "vector_len": VECTOR_LEN, "cache_tokens": CACHE_TOKENS}
    save("rank_sizes", "python benchmarks/rank_sizes.py", {**form, "models": models})


if __name__ == "__main__":
    main()
