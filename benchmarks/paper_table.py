"""The table of the paper's pipeline beside the default method, next to the paper's own figures."""

from __future__ import annotations

from typing import Any

from pages import load_results, markdown_table
from peers.table import number

DENSE = 64.29
PAPER = {"paper-8x": 64.95, "paper-10x": 64.07, "paper-16x": 60.61}
"""The paper's mean accuracy of five zero-shot tasks on Llama-2-7B after fine-tuning, dense and at each ratio."""
VARIANTS = {
    "published": "as published",
    "every-block": "as published, no block dense",
    "calibrated": "calibrated, as many bytes",
    "calibrated-large": "calibrated, the adapter's bytes as well",
}
METHODS = {"none": "none", "lora": "LoRA", "distill": "distillation"}
HEAD = [
    "model",
    "preset",
    "compressed",
    "recovery",
    "bpw of blocks",
    "MB on disk",
    "perplexity",
    "KL, nats",
    "mean accuracy",
    "of dense",
    "training",
]


def paper() -> str:
    """Every measured row; rows that were evaluated in another way than the dense model are left out."""
    found = load_results("paper")
    lines = []
    for name, entry in found["models"].items():
        dense, title = entry["dense"], name.rpartition(":")[2]
        lines.append([title, "dense (bf16)", "", "", "16", *_figures(dense, dense), ""])
        for key, row in entry["rows"].items():
            if _evaluated(row) != dense["settings"]:
                continue
            preset, variant, method = key.split("/")
            bits = f"{row['bpw_blocks']:.2f}"
            what = [title, f"`{preset}`", VARIANTS[variant], METHODS[method], bits]
            lines.append([*what, *_figures(row, dense), _training(row.get("training"))])
    notes = [_theirs(), _ours(found), _conditions(found)]
    return "\n\n".join([markdown_table(HEAD, lines), *filter(None, notes)])


def _evaluated(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row["settings"].get(key) for key in ("windows", "tasks_limit")}


def _figures(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """MB, perplexity, divergence, mean accuracy over the paper's tasks, and its share of the dense model's."""
    sizes = [f"{row['bytes_on_disk'] / 1e6:.1f}", number(row["perplexity"])]
    sizes.append("" if row["kl"] is None else f"{row['kl']:.3f}")
    mean = (row["average"] or {}).get("paper")
    if mean is None:
        return [*sizes, "", ""]
    gap = (row["difference"] or {}).get("paper")
    accuracy = f"{mean['acc']:.1%}" + (
        f" ± {mean['stderr']:.1%}"
        if gap is None
        else f" ({gap['difference'] * 100:+.1f} ± {gap['stderr'] * 100:.1f})"
    )
    return [*sizes, accuracy, f"{mean['acc'] / dense['average']['paper']['acc']:.1%}"]


def _training(facts: dict[str, Any] | None) -> str:
    """Steps and the size of their batches."""
    if facts is None:
        return ""
    config = facts["config"]
    batch = config["loop"]["batch_size"]
    return f"{facts['steps']} steps of {batch}" + (
        f" x {config['context']} tokens" if facts["method"] == "distill" else " instructions"
    )


def _theirs() -> str:
    """The paper's figures."""
    kept = "; ".join(f"{value} at {name[6:]} ({value / DENSE:.1%} of dense)" for name, value in PAPER.items())
    return (
        f"The paper's figures (Llama-2-7B, mean accuracy in percent of WinoGrande, PIQA, HellaSwag, ARC-E and ARC-C, "
        f"after fine-tuning): {DENSE} dense; {kept}."
    )


def _ours(found: dict[str, Any]) -> str:
    """The same presets with the same recipe here; empty if none was measured."""
    parts = []
    for name, entry in found["models"].items():
        dense = (entry["dense"]["average"] or {}).get("paper")
        shares = []
        for preset, theirs in PAPER.items():
            row = entry["rows"].get(f"{preset}/published/lora")
            if row is not None and dense is not None and _evaluated(row) == entry["dense"]["settings"]:
                ours = row["average"]["paper"]["acc"] / dense["acc"]
                shares.append(f"{ours:.1%} at {preset[6:]} (the paper: {theirs / DENSE:.1%})")
        if shares:
            parts.append(f"{name.rpartition(':')[2]}: {', '.join(shares)}")
    return f"Share of the dense accuracy after LoRA, here: {'; '.join(parts)}." if parts else ""


def _conditions(found: dict[str, Any]) -> str:
    """How it was measured."""
    entry = next(iter(found["models"].values()))["dense"]
    limit, tasks = entry["settings"]["tasks_limit"], (entry["average"] or {}).get("paper")
    which = "" if tasks is None else ", ".join(tasks["tasks"])
    documents = "all documents" if not limit else f"the first {limit} documents of each"
    said = (
        f"Mean accuracy over those of the paper's tasks that are at hand ({which}), {documents}; in brackets the "
        "difference from dense with its standard error, paired by document. "
        if which
        else "The tasks were not measured. "
    )
    return (
        f"{said}Perplexity and KL: {found['text']}, context {found['context']}, first "
        f"{entry['settings']['windows']} windows, evaluated in {found['dtype']}. bpw of blocks counts those that stay "
        f"dense; MB are 10^6 bytes of all files, adapter included. `{found['command']}`"
    )
