"""Numbers of the tables and picture of the study `sensitivity`."""

from __future__ import annotations

from typing import Any

from pocketllm.studies.claims import sensitivity_claim as claim
from pocketllm.studies.claims.sensitivity_claim import Values, cost, divergence, megabytes
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.sensitivity_steps import ALL, ATTENTION, ENDS, FFN
from pocketllm.studies.measure.significance import CONFIDENCE
from pocketllm.studies.measure.task_scores import able, accuracy, points_lost, probability_lost
from pocketllm.studies.show.plot import COLOURS, INK, Axis, Bars, Legend, Mark, Panel, Part, Picture, Rule

_COST = "KL per saved MB, 10⁻³ nats"


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the paths and the steps of tasks that there are, and what is computed of a group."""
    return {
        "paths": {path: claim.PATHS[path] for path in claim.paths(results)},
        "tasks": {key: title for key, title in claim.TASK_STEPS.items() if key in results},
        "cost": cost,
        "divergence": divergence,
        "megabytes": megabytes,
        "rise": _rise,
        "able": able,
        "accuracy": accuracy,
        "points_lost": points_lost,
        "probability_lost": probability_lost,
    }


def _rise(values: Values, name: str) -> float | None:
    """Rise of the perplexity over the dense one per saved megabyte, in thousandths; None if not finite."""
    own, dense = values["groups"][name]["perplexity"], values["dense"]
    return None if None in (own, dense) else 1000 * (own - dense) / megabytes(values, name)


def picture(results: Results) -> Picture:
    """KL per saved megabyte: by part and kind; by block."""
    parts = [_parts(results[f"{path}-parts"], path) for path in claim.paths(results)]
    colours = {ATTENTION: "attention", FFN: "FFN", ENDS: ENDS, ALL: "everything (dotted: its cost)"}
    by_part = Legend({"fontsize": 8, "ncols": 4}, [(_colour(name), words) for name, words in colours.items()])
    words = zip((3, 5), ("left dense by the authors", "encoded by them"), strict=True)
    by_block = Legend({"fontsize": 8, "ncols": 2}, [(COLOURS[n], each) for n, each in words])
    top, bottom = Part([parts], legend=by_part), Part([[_blocks(results["plain-blocks"])]], legend=by_block)
    return Picture(9, 7, [top, bottom], (1.35, 1))


def _parts(values: Values, path: str) -> Panel:
    """From the top down in the order of the table."""
    names = list(values["groups"])[::-1]
    marks: list[Mark] = [
        _bars(values, names, {"color": [_colour(name) for name in names]}),
        Rule(1000 * cost(values, ALL).value, {"color": INK, "linestyle": ":", "linewidth": 1}, upright=True),
    ]
    return Panel(path, marks, x=Axis(_COST), small=True)


def _blocks(values: Values) -> Panel:
    blocks = [int(name) for name in values["groups"]]
    left = claim.spared(blocks)
    colours = [COLOURS[3] if block in left else COLOURS[5] for block in blocks]
    return Panel(
        f"plain, each block alone; lines everywhere: {CONFIDENCE:.0%} intervals",
        [_bars(values, blocks, {"color": colours}, upright=True)],
        x=Axis("block"),
        y=Axis(_COST),
        small=True,
    )


def _bars(values: Values, places: list[Any], style: dict[str, Any], upright: bool = False) -> Bars:
    """Costs of the groups of those names; no whisker where there was but one window."""
    costs = [cost(values, str(place)).times(1000) for place in places]
    whiskers = [each.margin if each.known else 0.0 for each in costs]
    return Bars(places, [each.value for each in costs], {**style, "whiskers": 0.9}, whiskers, upright)


def _colour(name: str) -> str:
    if name in (ALL, ENDS):
        return COLOURS[2] if name == ENDS else INK
    return COLOURS[1] if name == ATTENTION or "attn" in name or "attention" in name else COLOURS[0]
