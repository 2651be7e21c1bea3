"""What a report warns of: weights that were left out or dense, and matrices that saw little calibration text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pocketllm.format.report import BY_OVERRIDE, IN_DENSE_BLOCK, IN_TOWER, KEPT_END, NO_USE

_LITTLE = 0.5
"""Share of the weights below which a model counts as little compressed."""
_SHOWN = 3
_BY_SETTINGS = (KEPT_END, BY_OVERRIDE, IN_DENSE_BLOCK)


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Warnings about weights that were left out, and about the calibration of a report's matrices."""
    matrices = [m for m in report["matrices"] if m.get("input_tokens") is not None]
    unseen = [m["name"] for m in matrices if m["input_tokens"] == 0]
    experts = [m for m in matrices if m.get("unseen_experts")]
    thin = [m for m in matrices if 0 < m["input_tokens"] < m["columns"]]
    found = []
    unused = [e["name"] for e in report["skipped"] if e["reason"] == NO_USE and e["name"].endswith(".weight")]
    if unused:
        found.append(
            f"left out {_some(unused, 'tensors')}, for which the model class has no use: check that "
            "config.json belongs to the weights"
        )
    if (little := _little_compressed(report)) is not None:
        found.append(little)
    if unseen:
        found.append(
            f"no input of {_some(unseen)} was seen (no calibration token reached the layer, or it is not a linear "
            "layer of a known kind): encoded for the mean inputs of the other experts of the block, or if there "
            "are none for inputs of equal strength in every direction"
        )
    if experts:
        count = sum(m["unseen_experts"] for m in experts)
        found.append(
            f"no calibration token reached {count} experts in {_some([m['name'] for m in experts])}"
            ": encoded for the mean inputs of the other experts of the block"
        )
    if thin:
        least = min(thin, key=lambda m: m["input_tokens"] / m["columns"])
        found.append(
            f"fewer tokens than inputs in {_some([m['name'] for m in thin])} (at worst {least['input_tokens']:,} "
            f"tokens for {least['columns']:,} inputs): their Hessians were regularized; give more text"
        )
    return found


def _little_compressed(report: Mapping[str, Any]) -> str | None:
    """The share of weights that are compressed, and why the others are dense, if it is small and no setting asked
    for it.
    """
    done = sum(math.prod(m["shape"]) for m in report["matrices"])
    dense: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for entry in report["skipped"]:
        if entry["shape"] and entry["reason"] not in _BY_SETTINGS:
            dense[entry["reason"]].append((math.prod(entry["shape"]), entry["name"]))
    totals = {reason: sum(weights for weights, _ in found) for reason, found in dense.items()}
    every = done + sum(totals.values())
    if done >= _LITTLE * every:
        return None
    reasons = [
        f"{totals[reason] / every:.0%} {reason} ({max(dense[reason])[1]})"
        for reason in sorted(totals, key=lambda reason: -totals[reason])[:_SHOWN]
        if totals[reason] >= 0.005 * every
    ]
    advice = "; --set towers=true compresses towers as well" if IN_TOWER in totals else ""
    return f"only {done / every:.0%} of the weights are compressed; dense: {', '.join(reasons)}{advice}"


def _some(names: list[str], kind: str = "matrices") -> str:
    return names[0] if len(names) == 1 else f"{len(names)} {kind} ({names[0]} and others)"
