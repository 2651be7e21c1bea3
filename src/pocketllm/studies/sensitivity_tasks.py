"""What the study `sensitivity` says of zero-shot tasks: with a part, a kind or a block compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.studies.noise import CONFIDENCE, Difference
from pocketllm.studies.scored import (
    Tasks,
    able,
    about_probability,
    accuracy,
    cost_gap,
    points_lost,
    probability_lost,
)
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import number, with_error

ALL, FFN, ATTENTION, ENDS = "everything", "FFN", "attention", "embedding and head"
DENSE, BLOCKS = "dense-tasks", "plain-block-tasks"
_TITLES = {
    "plain-tasks": "Zero-shot tasks (plain)",
    "calibrated-tasks": "Zero-shot tasks (calibrated)",
    BLOCKS: "Zero-shot tasks by block (plain)",
}


def tables(results: Results) -> list[Table]:
    return [_tasks_table(results, key, title) for key, title in _TITLES.items() if key in results]


def _tasks_table(results: Results, key: str, title: str) -> Table:
    """What zero-shot tasks lose with each of the groups of a step compressed."""
    values, dense = results[key], results[DENSE]["tasks"]
    rows = [["nothing (dense)", "0", number(100 * accuracy(dense)), "", "", ""]]
    for name, group in values["groups"].items():
        saved, points = group["saved_bytes"] / 1e6, points_lost(dense, group["tasks"])
        shown = [
            number(saved),
            number(100 * accuracy(group["tasks"])),
            with_error(points.value, points.error, 2),
        ]
        rows.append([name, *shown, *_probability_cells(probability_lost(dense, group["tasks"]), saved)])
    header = ["compressed", "MB saved", "accuracy, %", "points lost"]
    note = (
        f"Accuracy: mean over {', '.join(dense)}, the first {values['limit']} documents of each; guessing gets "
        f"{number(100 * accuracy(dense, 'chance'))}. {about_probability(dense)} ± standard errors of the differences, "
        "paired by document."
    )
    return Table(title, [*header, "probability lost", "of it per MB, 10^-3"], rows, note)


def _probability_cells(lost: Difference | None, saved: float) -> list[str]:
    if lost is None:
        return ["", ""]
    return [with_error(each.value, each.error, 2) for each in (lost, lost.times(1000 / saved))]


def findings(results: Results) -> list[str]:
    """What the right answers lose in probability: by path and part, and by block."""
    if DENSE not in results:
        return []
    dense = results[DENSE]["tasks"]
    count = sum(len(dense[name]["right"]) for name in able(dense))
    if not count:
        return [
            "Zero-shot tasks say nothing here: the dense model does no better than guessing at any of them."
        ]
    told = [
        _part_losses(results[key]["groups"], dense, key.removesuffix("-tasks"))
        for key in _TITLES
        if key in results and key != BLOCKS
    ]
    words = (
        f"Zero-shot, in points of the right answers' probability ({count} documents of {', '.join(able(dense))}): "
        f"{'; '.join(told)}."
    )
    return [words, *([_block_losses(results[BLOCKS]["groups"], dense)] if BLOCKS in results else [])]


def _lost(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Difference]:
    """Group -> points of probability lost."""
    found = {name: probability_lost(dense, group["tasks"]) for name, group in groups.items()}
    return {name: lost for name, lost in found.items() if lost is not None}


def _part_losses(groups: Mapping[str, Any], dense: Tasks, path: str) -> str:
    """Everything, FFN and attention; the kinds that lose more than noise."""
    lost = _lost(groups, dense)
    per = {name: found.times(1e9 / groups[name]["saved_bytes"]) for name, found in lost.items()}
    shown = ", ".join(
        f"{name} {with_error(lost[name].value, lost[name].error, 2)} "
        f"({with_error(per[name].value, per[name].error, 2)} thousandths per MB)"
        for name in (ALL, FFN, ATTENTION)
        if name in lost
    )
    kinds = [name for name in lost if name not in (ALL, FFN, ATTENTION, ENDS)]
    clear = sorted((n for n in kinds if lost[n].clear), key=lambda n: -per[n].value)
    attention, ffn = ((groups[n]["tasks"], groups[n]["saved_bytes"] / 1e9) for n in (ATTENTION, FFN))
    gap = cost_gap(dense, attention, ffn)
    listed = ", ".join(f"{n} ({with_error(per[n].value, per[n].error, 2)})" for n in clear)
    return (
        f"{path} {shown}; for a megabyte attention loses "
        f"{gap.told('thousandths more than the FFN', 'thousandths less than the FFN')}; of {len(kinds)} kinds alone "
        f"{len(clear)} differ from the dense model beyond noise, where chance would give "
        f"{number((1 - CONFIDENCE) * len(kinds), 2)}{': ' + listed if listed else ''}"
    )


def _block_losses(groups: Mapping[str, Any], dense: Tasks) -> str:
    """The blocks that lose more than noise, and how many would by chance."""
    lost = _lost(groups, dense)
    clear = sorted((n for n in lost if lost[n].clear), key=lambda n: -lost[n].value)
    shown = ", ".join(f"{n} ({with_error(lost[n].value, lost[n].error, 2)})" for n in clear)
    return (
        f"Zero-shot by block, plain: {len(clear)} of {len(lost)} single blocks change the right answers' probability "
        f"beyond noise, where chance alone would give {number((1 - CONFIDENCE) * len(lost), 2)}"
        f"{': ' + shown if shown else ''} (points lost)."
    )
