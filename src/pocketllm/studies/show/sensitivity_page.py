"""Tables and picture of the study `sensitivity`."""

from __future__ import annotations

from typing import Any

from pocketllm.studies.claims import sensitivity_claim as claim
from pocketllm.studies.claims.sensitivity_claim import Values, cost, divergence, megabytes
from pocketllm.studies.definition import Note, Results, Table
from pocketllm.studies.measure.sensitivity_steps import ALL, ATTENTION, DENSE, ENDS, FFN
from pocketllm.studies.measure.significance import CONFIDENCE
from pocketllm.studies.measure.task_scores import able, accuracy, points_lost, probability_lost
from pocketllm.studies.show.columns import text
from pocketllm.studies.show.numbers import number, with_error
from pocketllm.studies.show.plot import COLOURS, INK, Axis, Bars, Legend, Mark, Panel, Part, Picture, Rule

_COST = "KL per saved MB, 10⁻³ nats"


def tables(results: Results, note: Note) -> list[Table]:
    """Parts by path; zero-shot tasks, where there are any; blocks."""
    parts = [
        _losses(
            results[f"{path}-parts"], f"Parts, coded for the {claim.PATHS[path]} ({path})", note, parts=True
        )
        for path in claim.paths(results)
    ]
    tasks = [_tasks(results, key, note) for key in claim.TASK_STEPS if key in results]
    return [*parts, *tasks, _losses(results["plain-blocks"], "Blocks (plain)", note, parts=False)]


def _losses(values: Values, title: str, note: Note, parts: bool) -> Table:
    """A row for each group of a step, of parts or of blocks."""
    groups, dense = values["groups"], values["dense"]

    def rise(name: str) -> str:
        """Of the perplexity, in thousandths for a saved megabyte."""
        own = groups[name]["perplexity"]
        return number(None if None in (own, dense) else 1000 * (own - dense) / megabytes(values, name))

    sizes = {
        "weights, 10^6": lambda name: number(groups[name]["weights"] / 1e6),
        "bpw": lambda name: number(groups[name]["bpw"]),
    }
    share = {"of everything's": lambda name: f"{number(cost(values, name).value / cost(values, ALL).value)}x"}
    columns = {
        "compressed alone" if parts else "block": lambda name: name,
        **(sizes if parts else {}),
        "MB saved": lambda name: number(megabytes(values, name)),
        "perplexity": lambda name: number(groups[name]["perplexity"], 4),
        "rise per MB, 10^-3": rise,
        "KL to dense": lambda name: with_error(divergence(values, name)),
        "KL per MB, 10^-3": lambda name: with_error(cost(values, name).times(1000)),
        **(share if parts else {}),
    }
    return Table.of(title, groups, columns, note("Parts" if parts else "Blocks", values=values))


def _tasks(results: Results, key: str, note: Note) -> Table:
    """What zero-shot tasks lose with each of the groups of a step compressed."""
    dense, limit = results[DENSE]["tasks"], results[key]["limit"]
    entries = [
        (
            name,
            group["saved_bytes"] / 1e6,
            group["tasks"],
            probability_lost(dense, group["tasks"]),
        )
        for name, group in results[key]["groups"].items()
    ]
    columns = {
        "compressed": text(0),
        "MB saved": lambda e: number(e[1]),
        "accuracy, %": lambda e: number(100 * accuracy(e[2])),
        "points lost": lambda e: with_error(points_lost(dense, e[2]), 2),
        "probability lost": lambda e: "" if e[3] is None else with_error(e[3], 2),
        "of it per MB, 10^-3": lambda e: "" if e[3] is None else with_error(e[3].times(1000 / e[1]), 2),
    }
    guessing = 100 * accuracy(dense, "chance")
    about = note("Tasks", names=list(dense), limit=limit, guessing=guessing, able=able(dense))
    table = Table.of(claim.TASK_STEPS[key], entries, columns, about)
    return table.below(["nothing (dense)", "0", number(100 * accuracy(dense)), "", "", ""])


def picture(results: Results) -> Picture:
    """KL per saved megabyte: by part and kind; by block."""
    parts = [_parts(results[f"{path}-parts"], path) for path in claim.paths(results)]
    colours = {ATTENTION: "attention", FFN: "FFN", ENDS: ENDS, ALL: "everything (dotted: its cost)"}
    by_part = Legend({"fontsize": 8, "ncols": 4}, [(_colour(name), words) for name, words in colours.items()])
    words = zip((3, 5), ("left dense by the authors", "coded by them"), strict=True)
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
