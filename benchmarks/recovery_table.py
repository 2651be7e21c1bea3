"""The table of recovery, and what it says."""

from __future__ import annotations

import math
from typing import Any

from pages import load_results, markdown_table

HEAD = [
    "bpw of blocks",
    "method",
    "MB on disk",
    "added MB",
    "perplexity",
    "KL to dense, nats",
    "loss recovered",
    "training",
    "seconds",
]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The dense model, then every base with its runs."""
    dense = found["dense_perplexity"]
    lines = [["dense (bf16)", "", "", "", f"{dense:.2f}", "0", "", "", ""]]
    for base in found["bases"].values():
        title = f"{base['bpw_blocks']:.2f}"
        figures = f"{base['perplexity']:.2f}", f"{base['kl']:.3f}"
        lines.append([title, "none", _mb(base["bytes_on_disk"]), "", *figures, "", "", ""])
        for method, run in base["runs"].items():
            lines.append(
                [
                    title,
                    _method(method, run["config"]),
                    _mb(run["bytes_on_disk"]),
                    f"{max(0, run['added_bytes']) / 1e6:.2f}",
                    f"{run['perplexity']:.2f}",
                    f"{run['kl']:.3f}",
                    f"{regained(base['perplexity'], run['perplexity'], dense):.0%}",
                    _training(run),
                    f"{run['seconds']:.0f} on {_machine(run['machine'])}",
                ]
            )
    return lines


def regained(before: float, after: float, dense: float) -> float:
    """Share of the increase in log perplexity that recovery removes."""
    return math.log(before / after) / math.log(before / dense)


def verdict(found: dict[str, Any]) -> str:
    """Which is better per byte, over all bases that have both; empty if none has."""
    lower, shares, higher, closer = [], [], [], []
    for name, base in found["bases"].items():
        adapters = [run for method, run in base["runs"].items() if method.startswith("lora")]
        plain = base["runs"].get("distill")
        if plain is None or not adapters:
            continue
        best = min(adapters, key=lambda run: float(run["perplexity"]))
        tuned, share = float(plain["perplexity"]), best["added_bytes"] / base["bytes_on_disk"]
        kl = [min(float(run["kl"]) for run in runs) for runs in ([plain], adapters)]
        closer.append(f"{kl[0]:.3f} against {kl[1]:.3f} nats at {name}")
        if tuned <= best["perplexity"]:
            lower.append(name)
            shares.append(share)
        else:
            nats = math.log(tuned / best["perplexity"]) / (best["added_bytes"] / 1e6)
            higher.append(f"{name} ({share:.0%} more bytes, {nats:.3f} nats of log perplexity per MB)")
    parts = []
    if lower:
        parts.append(
            f"Distillation is better per byte at {', '.join(lower)}: perplexity is lower and no bytes are "
            f"added, whereas LoRA adds {' to '.join(dict.fromkeys(f'{s:.0%}' for s in (min(shares), max(shares))))} "
            "to the files."
        )
    if higher:
        parts.append(
            f"LoRA reaches a lower perplexity than distillation at the cost of bytes at {', '.join(higher)}."
        )
    below = [
        f"{name}, {_method(method, run['config'])} ({run['perplexity']:.2f})"
        for name, base in found["bases"].items()
        for method, run in base["runs"].items()
        if run["perplexity"] < found["dense_perplexity"]
    ]
    if below:
        parts.append(
            f"Below the dense model's perplexity: {'; '.join(below)}. Such a model has learned text of the kind "
            "used for evaluation (the text includes WikiText's training part); it is not better than the dense one, "
            "as its divergence shows."
        )
    if closer:
        parts.append(
            "KL divergence from the dense model with distillation and with LoRA: "
            f"{'; '.join(closer)}. LoRA learns the answers of its text, not the dense model's distribution."
        )
    return " ".join(parts)


def training_cost() -> str:
    """Memory and time of a training step, by method and form of the base."""
    found = load_results("training_cost")
    lines = [
        [
            name,
            f"{run['peak_memory_bytes'] / 1e6:.0f}",
            f"{run['step_seconds']:.2f}",
            "" if "adapter_bytes" not in run else f"{run['adapter_bytes'] / 1e6:.1f}",
            f"{run.get('loss_before', run.get('kl_before')):.4f}",
            f"{run.get('loss_stored', run.get('kl_stored')):.4f}",
        ]
        for name, run in found["runs"].items()
    ]
    head = ["training", "peak memory, MB", "seconds per step", "adapter, MB", "loss before", "loss after"]
    note = (
        f"{found['model'].rpartition(':')[2]} at {found['bpw_blocks']:.2f} bpw of blocks; {found['steps']} steps of "
        f"{found['batch']} x {found['context']} tokens, fastest step; peak memory of a process of its own; loss on 4 "
        "windows (LoRA: negative log likelihood; distillation: KL divergence, of cached tokens a lower bound); "
        f"{found['machine']['processor']}, {found['machine']['threads']} threads. `{found['command']}`"
    )
    return f"{markdown_table(head, lines)}\n\n{note}"


def _method(method: str, config: dict[str, Any]) -> str:
    if method.startswith("distill"):
        weight = config.get("label_weight", 0)
        return f"distillation, label_weight {weight:g}" if weight else "distillation"
    recipe = config["rank"], config["alpha"], config["loop"]["batch_size"], config["epochs"], config["steps"]
    name = (
        "LoRA by the paper's recipe" if recipe == (32, 64, 16, 3.0, None) else f"LoRA, rank {config['rank']}"
    )
    return f"{name}, {'instructions' if method == 'lora' else 'plain text'}"


def _machine(facts: dict[str, Any]) -> str:
    threads = facts["threads"]
    return facts.get("gpu") or f"{threads} thread{'s' * (threads > 1)} of {facts['processor']}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def _training(run: dict[str, Any]) -> str:
    config, batch = run["config"], run["config"]["loop"]["batch_size"]
    if run["method"] == "distill":
        return f"{run['steps']} steps of {batch} x {config['context']} tokens"
    return f"{run['steps']} steps of {batch} items"
