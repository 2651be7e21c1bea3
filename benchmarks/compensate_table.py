"""The table of compensation."""

from __future__ import annotations

from statistics import mean

from pages import load_results, markdown_table

HEAD = [
    "model",
    "bpw of blocks",
    "steps",
    "runs",
    "perplexity",
    "KL, nats",
    "lowest to highest",
    "processor seconds",
]


def compensate() -> str:
    """Means over seeds by model, bits and steps."""
    found, rows = load_results("compensate"), list[list[str]]()
    for model, bpw, steps in dict.fromkeys((r["model"], r["bpw"], r["steps"]) for r in found["runs"]):
        runs = [r for r in found["runs"] if (r["model"], r["bpw"], r["steps"]) == (model, bpw, steps)]
        divergences = [run["kl"] for run in runs]
        rows.append(
            [
                model,
                f"{bpw:.2f}",
                str(steps),
                str(len(runs)),
                f"{mean(run['perplexity'] for run in runs):.2f}",
                f"{mean(divergences):.3f}",
                f"{min(divergences):.3f} to {max(divergences):.3f}",
                f"{mean(run['processor_seconds'] for run in runs):.0f}",
            ]
        )
    dense = {run["model"]: run["dense_perplexity"] for run in found["runs"]}
    perplexities = ", ".join(f"{model} {value:.2f}" for model, value in dense.items())
    return "\n\n".join(
        [
            markdown_table(HEAD, rows),
            f"Embedding dense; means over runs with other seeds. Perplexity of the dense model: {perplexities}. "
            f"Measured on text that was not used for calibration. `{found['command']}`",
        ]
    )
