"""Is more accuracy lost than in the paper, where does quality break down, and which text suffers most?"""

from __future__ import annotations

import math
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import Difference, mean
from pocketllm.studies.measure.task_scores import able, counted_tasks, points_lost, probability_lost

BRITTLE = 2.0
"""Times the dense perplexity."""
PATHS = ("plain", "calibrated")
_PAPER_LOST = {"plain-8x": -0.66, "plain-10x": 0.22, "plain-16x": 3.68}
"""Points: 64.29 of the dense model less the means that the study's claim names."""


def keys_of(results: Results, path: str | None = None, files: bool | None = None) -> list[str]:
    """Keys of the compressions: of a path by falling bits per weight; of whole files, or not."""
    found = [key for key in results if key != "dense" and files in (None, "-files-" in key)]
    if path is None:
        return found
    own = [key for key in found if key.split("-")[0] == path]
    return sorted(own, key=lambda key: -results[key]["bpw_matrices"])


def dense_perplexities(results: Results) -> dict[str, float]:
    """By text, if the dense model's perplexity is finite; otherwise nothing can be compared."""
    return {text: value for text, value in results["dense"]["perplexity"].items() if value is not None}


def factor(results: Results, key: str) -> float | None:
    """Geometric mean over the texts of perplexity over that of the dense model."""
    own, dense = results[key]["perplexity"], dense_perplexities(results).items()
    middle = mean([None if own[text] is None else math.log(own[text] / value) for text, value in dense])
    return None if middle is None else math.exp(middle)


def lost(results: Results, key: str) -> Difference:
    """Points of mean accuracy."""
    return points_lost(results["dense"]["tasks"], results[key]["tasks"])


def likely_lost(results: Results, key: str) -> Difference | None:
    """Points of the right answers' probability; None where no task can tell."""
    return probability_lost(results["dense"]["tasks"], results[key]["tasks"])


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: losses on tasks against the paper's, perplexities against the dense model's."""
    tasks = results["dense"]["tasks"]
    plain = {key: factor(results, key) for key in keys_of(results, "plain", False)}
    known = {key: value for key, value in plain.items() if value is not None}
    return {
        "tasks": _claim(results) if tasks else None,
        "likely": _likely(results) if tasks else None,
        "best": min(known.items(), key=lambda item: item[1]) if known else None,
        "paths": {path: _brittle(results, path) for path in PATHS if keys_of(results, path)},
        "comparable": bool(dense_perplexities(results)),
        "texts": list(results["dense"]["perplexity"]),
        "by_text": _by_text(results),
    }


def _claim(results: Results) -> dict[str, Any]:
    """Points that the published method loses here, against those that the paper's figures lose."""
    losses = {key: lost(results, key) for key in keys_of(results, files=False)}
    tested = {key: paper for key, paper in _PAPER_LOST.items() if key in losses}
    over = {
        key: Difference(losses[key].value - paper, losses[key].error, losses[key].freedom)
        for key, paper in tested.items()
    }
    more = [key for key in losses if key in over and over[key].clear and over[key].value > 0]
    rest = [key for key in losses if key in over and key not in more]
    return {
        "verdict": "Not contradicted" if not more else "Held in part" if rest else "Did not hold",
        "more": more,
        "rest": rest,
        "counted": counted_tasks(results["dense"]["tasks"]),
        "losses": losses,
        "paper": tested,
    }


def _likely(results: Results) -> dict[str, Any]:
    """The probability that right answers lose, which reveals losses within the noise of accuracy."""
    found = {key: likely_lost(results, key) for key in keys_of(results)}
    known = {key: each for key, each in found.items() if each is not None}
    beyond = [key for key, each in known.items() if each.clear and each.value > 0]
    return {"able": able(results["dense"]["tasks"]), "losses": known, "beyond": beyond}


def _brittle(results: Results, path: str) -> dict[str, Any]:
    """The first setting of a path at which perplexity more than doubles; None if there is none."""
    keys = keys_of(results, path)
    factors = {key: factor(results, key) for key in keys}
    broken = next((k for k, value in factors.items() if value is None or value > BRITTLE), None)
    bits = results[keys[-1] if broken is None else broken]["bpw_matrices"]
    return {"factors": factors, "broken": broken, "at_once": broken == keys[0], "bits": bits}


def _by_text(results: Results) -> dict[str, list[tuple[str, float]]]:
    """The texts that suffer least and most at each setting whose perplexities are all finite."""
    texts, dense = results["dense"]["perplexity"], dense_perplexities(results)
    found = {}
    for key in keys_of(results):
        own = results[key]["perplexity"]
        if dense and all(own[text] is not None for text in dense):
            factors = {text: own[text] / value for text, value in dense.items()}
            ends = min(factors, key=factors.__getitem__), max(factors, key=factors.__getitem__)
            found[key] = [(text, factors[text]) for text in ends]
    return found if len(texts) > 1 else {}
