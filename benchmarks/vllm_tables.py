"""The tables of docs/vllm.md: throughput, and what each rank holds."""

from __future__ import annotations

from pages import load_results, markdown_table
from speed_tables import serving


def serving_vllm() -> str:
    """Throughput of vLLM by number of requests."""
    return serving("serving_vllm")


def rank_sizes() -> str:
    """What each rank of a large model holds."""
    found = load_results("rank_sizes")
    rows = [
        [
            f"{name} ({model['dense_bytes'] / 1e9:.0f} GB, compressed {model['compressed_bytes'] / 1e9:.0f} GB)",
            f"{rank['tensor_parallel']} x {rank['pipeline_parallel']}",
            f"{rank['weights_bytes'] / 1e9:.1f}",
            f"{rank['cache_bytes'] / 1e9:.1f}",
            f"{model['largest_matrix_float32_bytes'] / 1e9:.1f}",
        ]
        for name, model in found["models"].items()
        for rank in model["ranks"]
    ]
    head = [
        "model, bf16",
        "tensor x pipeline",
        "weights of a rank, GB",
        f"key-value cache of {found['cache_tokens']} tokens, GB",
        "largest matrix while loading, GB",
    ]
    note = (
        f"Computed from the shapes: {found['bpw_blocks']:g} bits per weight of blocks, {found['bpw_ends']:g} of "
        "embedding and head, in the files; decoded to bf16 in memory. GB are 10^9 bytes; for the stage that needs "
        f"most. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"
