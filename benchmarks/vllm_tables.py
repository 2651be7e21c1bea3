"""Tables of docs/vllm.md: what each rank holds, and throughput."""

from __future__ import annotations

from typing import Any

from pages import load_results, markdown_table
from speed_tables import median_and_best


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
        "embedding and head, in the files; decoded to bf16 in memory. GB are 10^9 bytes; of the stage that holds most. "
        f"`{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def vllm_serving() -> str:
    """Throughput of vLLM by number of requests."""
    found = load_results("vllm_serving")
    names = {"packed": "packed", "auto": "decoded at load", "checkpoint": "not compressed"}
    numbers = list(found["runs"][0]["tokens_per_second"])

    def row(run: dict[str, Any]) -> list[str]:
        speeds = [median_and_best(run["tokens_per_second"][n]) for n in numbers]
        return [names[run["mode"]], *speeds, f"{run['peak_memory_bytes'] / 1e6:.0f}"]

    head = ["", *(f"{n} request{'s' * (n != '1')}, tokens/s" for n in numbers), "peak memory, MB"]
    note = (
        f"SmolLM2-135M at {found['compressed']['bpw_blocks']:.2f} bits per weight of blocks, bfloat16, vLLM "
        f"{found['vllm']} without torch.compile, {found['threads']} threads; {found['new_tokens']} new tokens for each "
        "request, all sent at once; new tokens of all requests per second, median and (best) of "
        f"{found['rounds']} rounds, each model in a process of its own, on a busy machine (load {found['load']:.0f}). "
        "Memory: most that the process held, libraries and a key-value cache of 1 GiB included. "
        f"`{found['command']}`"
    )
    return f"{markdown_table(head, [row(run) for run in found['runs']])}\n\n{note}"
