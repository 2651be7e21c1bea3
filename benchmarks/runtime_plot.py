"""Draw docs/runtime.png and docs/runtime.svg, tokens per second against bytes, from benchmarks/results/runtime.json.

python benchmarks/runtime_plot.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from pages import load_results

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {
    "packed": ("PocketLLM, packed", "#d62728", "D"),
    "dense": ("PocketLLM, decoded at load", "#9467bd", "v"),
    "checkpoint": ("transformers, bfloat16", "#1f77b4", "o"),
    "llama.cpp": ("llama.cpp, Q4_1", "#ff7f0e", "^"),
}
PANELS = (
    ("tokens_per_second", "new tokens per second"),
    ("prompt_tokens_per_second", "prompt tokens per second"),
)


def draw(found: dict[str, Any]) -> Figure:
    """Both speeds over the peak memory, filled on two threads, hollow on one."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for mode, (name, color, marker) in KINDS.items():
            for threads in sorted({run["threads"] for run in found["runs"]}):
                runs = [run for run in found["runs"] if (run["mode"], run["threads"]) == (mode, threads)]
                if not runs:
                    continue
                bytes_, speeds = zip(
                    *((run["peak_memory_bytes"] / 1e6, run[key]) for run in runs), strict=True
                )
                fill = color if threads > 1 else "none"
                shown = f"{name}, {threads} thread{'s' * (threads > 1)}"
                axis.plot(bytes_, speeds, marker, color=color, markerfacecolor=fill, label=shown)
        axis.set_xlabel("peak memory beyond the bare process, MB")
        axis.set_ylabel(label)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    figure.suptitle("SmolLM2-135M: speed against memory; to the upper left is better")
    return figure


def main() -> None:
    """Both files."""
    matplotlib.rcParams["svg.hashsalt"] = "runtime"  # the same figures give the same bytes
    figure = draw(load_results("runtime"))
    figure.savefig(DOCS / "runtime.png", dpi=110)
    figure.savefig(DOCS / "runtime.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
