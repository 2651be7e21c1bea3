"""Zero-shot results of studies, stored per document so that models can be compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocketllm.studies.measure.significance import Difference, paired

Tasks = Mapping[str, Mapping[str, Any]]
"""Task -> its values, as stored by `scores`."""


def scores(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> accuracy, that of guessing (0 where answers are not chosen from a list), and document by document:

    right: a digit, 1 where it was. probability: of the right answer, as `harness.choice_probability`, in words,
    so that a result stays readable; none where there are no choices.
    """
    return {
        name: {
            "acc": result.acc,
            "chance": result.chance or 0.0,
            "right": "".join(str(int(value)) for value in result.scores["acc"]),
            "probability": " ".join(f"{value:.4f}" for value in result.scores.get("choice_probability", [])),
        }
        for name, result in found.items()
    }


def accuracy(tasks: Tasks, key: str = "acc", names: Sequence[str] | None = None) -> float:
    """Mean over the tasks, or some of them, of their accuracy, or of what guessing gets (`chance`)."""
    chosen = list(tasks) if names is None else names
    return sum(float(tasks[name][key]) for name in chosen) / len(chosen)


def counted_tasks(dense: Tasks) -> list[str]:
    """Those that can show a loss: at which the dense model does better than guessing; all where there are none.

    At others a broken model may gain.
    """
    return able(dense) or list(dense)


def points_lost(dense: Tasks, own: Tasks) -> Difference:
    """Points of mean accuracy lost over `counted_tasks`, paired by document.

    Args:
        dense, own: of the same tasks and documents, as `scores` gives them.
    """
    names = counted_tasks(dense)
    return _mean([paired(_digits(dense[name]), _digits(own[name])) for name in names]).times(100)


def probability_lost(dense: Tasks, own: Tasks) -> Difference | None:
    """Points of the right answers' mean probability lost, paired by document: less noise than accuracy has.

    Over the tasks with choices at which the dense model does better than guessing; None where there are none.
    """
    names = able(dense)
    if not names:
        return None
    return _mean([paired(_likely(dense[name]), _likely(own[name])) for name in names]).times(100)


def cost_gap(dense: Tasks, one: tuple[Tasks, float], other: tuple[Tasks, float]) -> Difference:
    """How much more one loses than another for each unit saved, in points, paired by document.

    Args:
        one, other: (its tasks, what it saves). There must be tasks as `able` gives them.
    """

    def costs(name: str, own: Tasks, saved: float) -> list[float]:
        return [(a - b) / saved for a, b in zip(_likely(dense[name]), _likely(own[name]), strict=True)]

    return _mean([paired(costs(name, *one), costs(name, *other)) for name in able(dense)]).times(100)


def able(dense: Tasks) -> list[str]:
    """Tasks with choices at which the dense model does better than guessing, beyond noise."""
    found = []
    for name, task in dense.items():
        above = paired(_digits(task), [task["chance"]] * len(task["right"]))
        if task["probability"] and above.value > 0 and above.clear:
            found.append(name)
    return found


def _digits(task: Mapping[str, Any]) -> list[float]:
    return [float(digit) for digit in task["right"]]


def _likely(task: Mapping[str, Any]) -> list[float]:
    return [float(value) for value in task["probability"].split()]


def _mean(found: Sequence[Difference]) -> Difference:
    """The mean over tasks that are independent of each other."""
    error = math.hypot(*(each.error for each in found)) / len(found)
    freedom = min(each.freedom for each in found)  # at least: errs towards noise
    return Difference(sum(each.value for each in found) / len(found), error, freedom)
