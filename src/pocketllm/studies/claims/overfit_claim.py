"""At how many bits does the error of one projection fall below 1e-4, and is that possible at the paper's bits?"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.overfit_steps import TARGET, TARGETS
from pocketllm.studies.measure.trials import TRAININGS

Point = Mapping[str, Any]
_PAPER_BITS = 2.0  # approximately: d = 8, K = 2^15
_QUANTIZED = 16  # number of levels in a run of 32 weights above which they were not quantized before


def points(results: Results, what: str) -> dict[str, Point]:
    """Key without its first word -> values."""
    return {key.split(".", 1)[1]: value for key, value in results.items() if key.startswith(f"{what}.")}


def sizes(results: Results) -> list[str]:
    """The sizes that were trained, `dxK`."""
    return list(dict.fromkeys(key.split(".")[1] for key in points(results, "curve")))


def first_below(results: Results, mse: float) -> Point | None:
    """The point of least bits that reaches an error."""
    reached = [p for p in points(results, "sweep").values() if p["mse"] < mse]
    return min(reached, key=lambda p: p["bpw"]) if reached else None


def over_bound(results: Results, point: Point) -> float:
    """The error over the bound at all the bits that the point stores."""
    return float(point["mse"] / _bound(results, point["bpw"]))


def _bound(results: Results, bits: float) -> float:
    """The bound's MSE at so many bits; its logarithm is interpolated, and extrapolated as at high rates."""
    kept, mse = results["bound"]["bits"], results["bound"]["mse"]
    place = min(max(bisect(kept, bits) - 1, 0), len(kept) - 2)
    if bits > kept[-1]:
        return float(mse[-1] * 4.0 ** (kept[-1] - bits))
    share = (bits - kept[place]) / (kept[place + 1] - kept[place])
    return float(mse[place] ** (1 - share) * mse[place + 1] ** share)


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: where each target is reached and where it is impossible, and what passes the bound."""
    bound = results["bound"]
    first = first_below(results, TARGETS["MSE"])
    rounding = bound["bfloat16_rounding_mse"] ** 0.5
    levels = bound["levels_of_32"]
    return {
        "held": "no" if first is None else "yes" if first["bpw"] <= _PAPER_BITS else "at more bits",
        "target": TARGET,
        "targets": [_target(results, name, mse) for name, mse in TARGETS.items()],
        "paper_bits": _PAPER_BITS,
        "least_mse": dict(zip(bound["bits"], bound["mse"], strict=True))[_PAPER_BITS],
        "rounding": rounding if rounding > TARGET else None,
        "trainings": TRAININGS,
        "curves": [{name: results[f"curve.{name}.{size}"] for name in TRAININGS} for size in sizes(results)],
        "twin_ratios": _twin_ratios(results),
        "bound": _passing(results),
        "levels": levels if levels <= _QUANTIZED else None,
        "levels_bits": math.log2(max(2, levels)) + 2 * 16 / 32,
    }


def _target(results: Results, name: str, mse: float) -> dict[str, Any]:
    return {
        "name": name,
        "first": first_below(results, mse),
        "zeros": mse >= results["bound"]["matrix"]["mean_square"],
        "impossible": results["bound"]["impossible_below_bits"][name],
    }


def _twin_ratios(results: Results) -> list[float]:
    """The error of k-means on the weights over that on a Gaussian matrix."""
    sweep = points(results, "sweep")
    twins = points(results, "twin").items()
    return [sweep[key]["kmeans_mse"] / twin["mse"] for key, twin in twins if key in sweep]


def _passing(results: Results) -> dict[str, Any]:
    """The codes that pass the bound: with all bits counted, and at the bits of the indices alone."""
    found = sorted(points(results, "sweep").values(), key=lambda p: p["bpw"])
    passing = [p for p in found if over_bound(results, p) < 1]
    levels = results["bound"]["distinct_values"]
    return {
        "count": len(found),
        "passing": passing,
        "by_indices": [p for p in found if p["mse"] < p["bound_mse"] and p not in passing],
        "levels": levels if passing and all(p["codebook_size"] >= levels for p in passing) else None,
    }
