"""Do the outer blocks, or attention, lose more than others per megabyte saved?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import select
from pocketllm.studies.measure.sensitivity_steps import ALL, ATTENTION, BLOCKS, DENSE, ENDS, FFN
from pocketllm.studies.measure.significance import CONFIDENCE, Difference, measured, paired
from pocketllm.studies.measure.task_scores import Tasks, able, cost_gap, probability_lost
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import above_zero

_PARTS = (ALL, FFN, ATTENTION, ENDS)
_AUTHORS = (3, 2)  # blocks that the paper leaves dense, at the beginning and at the end
_COST = "KL per saved MB, 10⁻³ nats"


def megabytes(values: Values, name: str) -> float:
    """What compressing a group saves."""
    return float(values["groups"][name]["saved_bytes"]) / 1e6


def divergence(values: Values, name: str) -> Difference:
    """KL with a group compressed, in nats per token."""
    group = values["groups"][name]
    return measured(group["kl"], group["kl_stderr"], values["windows"] - 1)


def cost(values: Values, name: str) -> Difference:
    """KL for a saved megabyte, in thousandths; not a number where the divergence is not finite."""
    return divergence(values, name).times(1000 / megabytes(values, name))


def rise(values: Values, name: str) -> float | None:
    """Rise of the perplexity over the dense one per saved megabyte, in thousandths; None if not finite."""
    own, dense = values["groups"][name]["perplexity"], values["dense"]
    return None if None in (own, dense) else 1000 * (own - dense) / megabytes(values, name)


def _spared(values: Values) -> list[int]:
    """The first and last blocks, which the authors leave dense."""
    numbers, (first, last) = sorted(map(int, values["groups"])), _AUTHORS
    return sorted({*numbers[:first], *numbers[max(0, len(numbers) - last) :]})


def _broken(values: Values) -> list[str]:
    """The groups whose divergence is not finite; if there are any, nothing is compared."""
    return [name for name, group in values["groups"].items() if group["kl"] is None]


def _by_window(values: Values, names: Sequence[object]) -> list[float]:
    """Mean over the groups of their KL for a saved megabyte, in each window, in thousandths."""
    costs = [
        [1000 * kl / megabytes(values, str(name)) for kl in values["groups"][str(name)]["window_kl"]]
        for name in names
    ]
    return [sum(window) / len(costs) for window in zip(*costs, strict=True)]


def _blocks(results: Results) -> Iterator[Values]:
    """The outer blocks against the inner ones, and the blocks of the highest cost."""
    values = results["plain-blocks"]
    costs, left, broken = (
        {int(n): cost(values, n) for n in values["groups"]},
        _spared(values),
        _broken(values),
    )
    others = [n for n in sorted(costs) if n not in left]
    if broken or not others:
        yield {"broken": broken, "count": len(costs), "gap": None}
        return
    outer, inner = (_by_window(values, each) for each in (left, others))
    worst = sorted(costs, key=lambda n: -costs[n].value)[: len(left)]
    means = {"outer": sum(outer) / len(outer), "inner": sum(inner) / len(inner)}
    yield {
        "broken": broken,
        "authors": _AUTHORS,
        "gap": paired(outer, inner),
        **means,
        "worst": {n: costs[n] for n in worst},
        "coded": sorted({*worst} - {*left}),
        "spared": sorted({*left} - {*worst}),
    }


def _parts(results: Results) -> Iterator[Values]:
    """Attention against FFN, by path."""
    for values in select(results, "{path}-parts"):
        groups, found = values["groups"], {"path": values["path"], "broken": _broken(values), "gap": None}
        if not found["broken"] and {ATTENTION, FFN} <= set(groups):
            attention, ffn = (_by_window(values, [name]) for name in (ATTENTION, FFN))
            below = cost(values, FFN).value
            ratio = cost(values, ATTENTION).value / below
            off = paired(attention, [ratio * each for each in ffn])  # 0, with the error of its numerator
            share, part = (
                100 * groups[ATTENTION][key] / (groups[ATTENTION][key] + groups[FFN][key])
                for key in ("weights", "kl")
            )
            kinds = {n: cost(values, n) for n in groups if n not in _PARTS}
            found |= {"gap": paired(attention, ffn), "ratio": Difference(ratio, off.error / below)}
            found |= {"bpw": groups[ALL]["bpw"], "share": share, "part": part}
            found |= {"kinds": dict(sorted(kinds.items(), key=lambda kind: -kind[1].value))}
        yield found


def _sums(results: Results) -> Iterator[Values]:
    """The losses of the parts, added, against that of everything together."""
    for values in select(results, "{path}-parts"):
        if not _broken(values):
            groups = values["groups"]
            parts = [groups[name] for name in (FFN, ATTENTION, ENDS) if name in groups]
            added = [sum(window) for window in zip(*(part["window_kl"] for part in parts), strict=True)]
            found = {"added": sum(part["kl"] for part in parts), "all": groups[ALL]["kl"]}
            yield {"path": values["path"], **found, "gap": paired(groups[ALL]["window_kl"], added)}


def _tasks(results: Results) -> Iterator[Values]:
    """What the right answers lose in probability, by path and part."""
    if DENSE in results:
        dense = results[DENSE]["tasks"]
        names, steps = able(dense), select(results, "{path}-tasks")
        paths = {
            e["path"]: _part_losses(e["groups"], dense) for e in steps if names and FFN in e.get("groups", ())
        }
        yield {"names": names, "count": sum(len(dense[name]["right"]) for name in names), "paths": paths}


def _part_losses(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Any]:
    """Everything, FFN and attention, and which kinds lose more than noise; in all and for a gigabyte saved."""
    saved, lost = {name: group["saved_bytes"] / 1e9 for name, group in groups.items()}, _lost(groups, dense)
    per = {name: found.times(1 / saved[name]) for name, found in lost.items()}
    found = _beyond_noise({name: group for name, group in groups.items() if name not in _PARTS}, dense)
    gap = cost_gap(dense, *((groups[name]["tasks"], saved[name]) for name in (ATTENTION, FFN)))
    shown = {name: (lost[name], per[name]) for name in (ALL, FFN, ATTENTION) if name in groups}
    beyond = {name: per[name] for name in sorted(found["beyond"], key=lambda name: -per[name].value)}
    return {**found, "shown": shown, "gap": gap, "beyond": beyond}


def _task_blocks(results: Results) -> Iterator[Values]:
    """The same by block."""
    if BLOCKS in results and able(results[DENSE]["tasks"]):
        yield _beyond_noise(results[BLOCKS]["groups"], results[DENSE]["tasks"])


def _beyond_noise(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Any]:
    """The groups that lose more than noise, most first, and how many would by chance."""
    lost = _lost(groups, dense)
    clear = sorted((n for n in lost if lost[n].clear), key=lambda n: -lost[n].value)
    return {"beyond": {n: lost[n] for n in clear}, "count": len(lost), "chance": (1 - CONFIDENCE) * len(lost)}


def _lost(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Difference]:
    """Group -> points of probability lost."""
    found = {name: probability_lost(dense, group["tasks"]) for name, group in groups.items()}
    return {name: lost for name, lost in found.items() if lost is not None}


FINDINGS = (
    Finding("the outer blocks are the ones to spare", _blocks, lambda v: above_zero(v["gap"])),
    Finding("attention is more sensitive than its size says", _parts, lambda v: above_zero(v["gap"])),
    Finding("zero-shot losses by part", _tasks),
    Finding("zero-shot losses by block", _task_blocks),
    Finding("the parts add up", _sums),
)


def picture(results: Results) -> plot.Picture:
    """KL per saved megabyte: by part and kind, from the top down in the order of the table; by block."""
    words = {ATTENTION: "attention", FFN: "FFN", ENDS: ENDS, ALL: "everything (dotted: its cost)"}
    dotted, panels = {"color": plot.INK, "linestyle": ":", "linewidth": 1}, []
    for values in select(results, "{path}-parts"):
        names = list(values["groups"])[::-1]
        everything = plot.mark("axvline", cost(values, ALL).value, **dotted)
        marks = [_bars(values, names, [_colour(name) for name in names]), everything]
        panels.append(plot.Panel(values["path"], marks, plot.Axis(_COST), small=True))
    by_part = plot.Legend({"fontsize": 8, "ncols": 4}, [(_colour(name), words[name]) for name in words])
    colours = [(plot.COLOURS[3], "left dense by the authors"), (plot.COLOURS[5], "encoded by them")]
    values = results["plain-blocks"]
    blocks, left = [int(name) for name in values["groups"]], _spared(values)
    bars = _bars(values, blocks, [colours[block not in left][0] for block in blocks], upright=True)
    title = f"plain, each block alone; lines everywhere: {CONFIDENCE:.0%} intervals"
    below = plot.Panel(title, [bars], plot.Axis("block"), plot.Axis(_COST), small=True)
    by_block = plot.Legend({"fontsize": 8, "ncols": 2}, colours)
    parts = [plot.Part([panels], legend=by_part), plot.Part([[below]], legend=by_block)]
    return plot.Picture(9, 7, parts, (1.35, 1))


def _bars(values: Values, places: Sequence[Any], colours: list[str], upright: bool = False) -> plot.Mark:
    """Costs of the groups of those names."""
    costs = [cost(values, str(place)) for place in places]
    return plot.interval_bars(places, costs, upright, color=colours, whiskers=0.9)


def _colour(name: str) -> str:
    if name in (ALL, ENDS):
        return plot.COLOURS[2] if name == ENDS else plot.INK
    attention = name == ATTENTION or "attn" in name or "attention" in name
    return plot.COLOURS[1 if attention else 0]
