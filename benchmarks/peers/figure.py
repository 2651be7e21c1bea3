"""Draw docs/peers.png and docs/peers.svg from benchmarks/results/peers.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PEERS = {
    "autoround": ("AutoRound", "#1f77b4", "o"),
    "gptqmodel": ("GPTQModel", "#9467bd", "v"),
    "hqq": ("HQQ", "#2ca02c", "s"),
    "llamacpp": ("llama.cpp, imatrix", "#ff7f0e", "^"),
    "pocketllm": ("PocketLLM", "#d62728", "D"),
}
PANELS = (
    ("perplexity", "perplexity (log)", True),
    ("kl_nats", "KL to the dense model, nats per token (log)", True),
    ("seconds", "seconds to quantize (log)", True),
    ("peak_mib", "peak memory, MiB", False),
)
WORST_PERPLEXITY = 1000  # above it a model says nothing, and the axis would show only that


def draw(found: dict[str, Any]) -> Figure:
    """Four panels over the stored bits per weight."""
    entries = [entry for entry in found["settings"].values() if "failure" not in entry]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (key, label, logarithmic) in zip(axes.flat, PANELS, strict=True):
        for peer, (name, color, marker) in PEERS.items():
            points = sorted((e["bpw"], e[key]) for e in entries if e["peer"] == peer)
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=color, label=name)
        if logarithmic:
            axis.set_yscale("log")
        if key == "perplexity":
            dense = found["dense"]["perplexity"]
            axis.axhline(dense, color="gray", linestyle="--", label="dense, bf16")
            axis.set_ylim(dense * 0.95, WORST_PERPLEXITY)
        axis.set_xlabel("bits per weight of the blocks, all stored bits counted")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend()
    figure.suptitle(
        f"SmolLM2-135M, {found['text']}, context {found['context']}, first {found['windows']} windows"
    )
    return figure


def main() -> None:
    """Both files."""
    found = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))
    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same figures give the same bytes
    figure = draw(found)
    figure.savefig(ROOT / "docs" / "peers.png", dpi=110)
    figure.savefig(ROOT / "docs" / "peers.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
