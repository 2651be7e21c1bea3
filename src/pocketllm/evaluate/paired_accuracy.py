"""Mean accuracy over tasks, and the paired difference of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocketllm.evaluate.kl import standard_error
from pocketllm.evaluate.tasks import METRICS, PAPER_TASKS, TaskResult


def average(found: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Mean accuracies: `paper` over the paper's tasks that were measured, `all` over every task.

    Returns:
        For `paper` and `all`, or None if no task has an accuracy: acc; stderr (tasks are independent); chance;
        tasks; open, the tasks whose answers are not chosen from a list (guessing among all words is right about
        never, so their chance counts as 0). `paper` also lists the tasks that are missing.
    """
    scored = {name: result for name, result in found.items() if result.acc is not None}
    paper = _mean([scored[name] for name in PAPER_TASKS if name in scored])
    if paper is not None:
        paper["missing"] = [name for name in PAPER_TASKS if name not in scored]
    return {"paper": paper, "all": _mean(list(scored.values()))}


def _mean(found: Sequence[TaskResult]) -> dict[str, Any] | None:
    if not found:
        return None
    errors = [result.acc_stderr for result in found if result.acc_stderr is not None]
    known = len(errors) == len(found)
    return {
        "acc": sum(result.acc or 0.0 for result in found) / len(found),
        "stderr": math.hypot(*errors) / len(found) if known else None,
        "chance": sum(result.chance or 0.0 for result in found) / len(found),
        "tasks": [result.task for result in found],
        "open": [result.task for result in found if result.chance is None],
    }


def compare(found: Mapping[str, TaskResult], reference: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Differences of a model from a reference, paired by document.

    Returns:
        tasks: {task: {metric: {difference, stderr, combined_stderr, margin_kept}}}; average: {paper, all:
        {difference, stderr, margin_kept} or None}. difference: model minus reference. stderr: standard error of
        the paired difference. combined_stderr: standard error as if the two had been measured on different
        documents. margin_kept: share of the reference's margin over chance that the model keeps.
    """
    tasks = {
        name: {
            metric: _difference(found[name], reference[name], metric)
            for metric in METRICS
            if getattr(found[name], metric) is not None and getattr(reference[name], metric) is not None
        }
        for name in found
        if name in reference
    }
    own, other = average(found), average(reference)
    means = {key: _mean_difference(own[key], other[key], tasks) for key in own}
    return {"tasks": tasks, "average": means}


def _difference(own: TaskResult, other: TaskResult, metric: str) -> dict[str, float | None]:
    value, base = getattr(own, metric), getattr(other, metric)
    pairs = zip(own.scores.get(metric, []), other.scores.get(metric, []), strict=True)
    errors = (getattr(own, f"{metric}_stderr"), getattr(other, f"{metric}_stderr"))
    return {
        "difference": value - base,
        "stderr": standard_error([a - b for a, b in pairs]),
        "combined_stderr": None if None in errors else math.hypot(*errors),
        "margin_kept": _margin_kept(value, base, other.chance),
    }


def _mean_difference(
    own: Mapping[str, Any] | None, other: Mapping[str, Any] | None, tasks: Mapping[str, Any]
) -> dict[str, float | None] | None:
    if own is None or other is None:
        return None
    errors = [tasks[name]["acc"]["stderr"] for name in own["tasks"]]
    return {
        "difference": own["acc"] - other["acc"],
        "stderr": None if None in errors else math.hypot(*errors) / len(errors),
        "margin_kept": _margin_kept(own["acc"], other["acc"], other["chance"]),
    }


def _margin_kept(value: float, base: float, chance: float | None) -> float | None:
    margin = base - (chance or 0.0)
    return (value - (chance or 0.0)) / margin if margin > 0 else None
