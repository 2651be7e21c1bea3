"""The tables of docs/models.md: which model types work how, and large dimensions without weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pages import load_results, markdown_table


def architectures() -> str:
    """Every causal language model type of transformers: works, refused with the reason, fails."""
    found = load_results("architectures")
    types: dict[str, Any] = found["types"]
    count = Counter(_state(entry, "without") + " / " + _state(entry, "with") for entry in types.values())
    both = [f"`{kind}`" for kind, entry in types.items() if _is(entry, "works", "works")]
    rows = [
        [f"`{kind}`", _state(entry, "without"), _state(entry, "with"), _reason(entry)]
        for kind, entry in types.items()
        if not _is(entry, "works", "works")
    ]
    summary = "; ".join(f"{state}: {number}" for state, number in count.most_common())
    head = ["type", "without calibration", "with calibration", "reason"]
    return (
        f"{len(types)} model types of transformers {found['transformers']}. Without / with calibration: {summary}.\n\n"
        f"Types that work with and without calibration, in both modes: {', '.join(both)}.\n\n"
        f"{markdown_table(head, rows)}\n\n`{found['command']}`"
    )


def large_models() -> str:
    """Exact sizes of large models, and one block of each."""
    found = load_results("large_models")
    rows = []
    for name, entry in found["models"].items():
        whole, block = entry["whole"], entry.get("block")
        shown = ""
        if block is not None:
            shown = f"{block['weights'] / 1e6:.0f} M, {'agrees' if block['agrees'] else 'differs'}"
        rows.append(
            [
                name,
                f"{whole['dense_bytes'] / 1e9:.1f}",
                f"{whole['bytes_on_disk'] / 1e9:.2f}",
                f"{whole['bpw_matrices']:.3f}",
                str(whole["matrices"]),
                f"{whole['plan_seconds']:.1f}",
                shown,
            ]
        )
    head = [
        "model",
        "bf16, GB",
        "at 3 bits, GB",
        "bpw",
        "matrices",
        "dry run, s",
        "one block, both modes",
    ]
    note = f"GB are 10^9 bytes; sizes are exact and exclude the tokenizer. `{found['command']}`"
    return f"{markdown_table(head, rows)}\n\n{note}"


def _is(entry: dict[str, Any], without: str, calibrated: str) -> bool:
    return (_state(entry, "without"), _state(entry, "with")) == (without, calibrated)


def _state(entry: dict[str, Any], name: str) -> str:
    """works, refused, fails or not built, for both modes; the worse if they differ."""
    if entry["not_built"]:
        return "not built"
    states = {value.partition(":")[0] for value in entry["results"][name].values()}
    return next(state for state in ("fails", "refused", "works") if state in states)


def _reason(entry: dict[str, Any]) -> str:
    if entry["not_built"]:
        return _cell(f"transformers cannot build it at this size: {entry['not_built']}")
    reasons = [value for modes in entry["results"].values() for value in modes.values() if value != "works"]
    return _cell("; ".join(dict.fromkeys(reason.partition(": ")[2] for reason in reasons)))


def _cell(text: str) -> str:
    shown = text.removesuffix("; use a preset without calibration (lookup-8x)").removeprefix("calibration: ")
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
