"""Zero-shot results of studies: kept document by document, so that models are compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketllm.evaluate.kl import standard_error

Tasks = Mapping[str, Mapping[str, Any]]
"""Task -> what `scores` keeps of it."""


def scores(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> accuracy, that of guessing, and `right`: a digit for each document, 1 where it was."""
    return {
        name: {
            "acc": result.acc,
            "chance": result.chance,
            "right": "".join(str(int(value)) for value in result.scores["acc"]),
        }
        for name, result in found.items()
    }


def accuracy(tasks: Tasks, key: str = "acc") -> float:
    """Mean over the tasks of their accuracy, or of what guessing gets (`chance`)."""
    return sum(float(task[key]) for task in tasks.values()) / len(tasks)


def points_lost(dense: Tasks, own: Tasks) -> tuple[float, float]:
    """(points of mean accuracy lost, standard error of that, paired by document).

    Args:
        dense, own: of the same tasks and documents, as `scores` gives them.
    """
    losses, errors = [], []
    for name, task in own.items():
        pairs = [int(a) - int(b) for a, b in zip(dense[name]["right"], task["right"], strict=True)]
        losses.append(sum(pairs) / len(pairs))
        errors.append(standard_error(pairs) or 0.0)
    return 100 * sum(losses) / len(losses), 100 * math.hypot(*errors) / len(errors)
