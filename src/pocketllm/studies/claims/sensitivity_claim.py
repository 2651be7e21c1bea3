"""Do the outer blocks, or attention, lose more than others per megabyte saved?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.sensitivity_steps import ALL, ATTENTION, BLOCKS, DENSE, ENDS, FFN
from pocketllm.studies.measure.significance import CONFIDENCE, Difference, measured, paired
from pocketllm.studies.measure.task_scores import Tasks, able, cost_gap, probability_lost

Values = Mapping[str, Any]
PATHS = {"plain": "error of the weights", "calibrated": "error of the layers' outputs"}
"""Path -> the objective by which its indices are chosen."""
TASK_STEPS = {
    "plain-tasks": "Zero-shot tasks (plain)",
    "calibrated-tasks": "Zero-shot tasks (calibrated)",
    BLOCKS: "Zero-shot tasks by block (plain)",
}
"""Step -> the title of its table."""
AUTHORS_FIRST, AUTHORS_LAST = 3, 2
"""Blocks that the paper leaves dense."""


def paths(results: Results) -> list[str]:
    """The paths that were measured."""
    return [path for path in PATHS if f"{path}-parts" in results]


def megabytes(values: Values, name: str) -> float:
    """What compressing a group saves."""
    return float(values["groups"][name]["saved_bytes"]) / 1e6


def divergence(values: Values, name: str) -> Difference:
    """KL with a group compressed, in nats per token."""
    group = values["groups"][name]
    return measured(group["kl"], group["kl_stderr"], values["windows"] - 1)


def cost(values: Values, name: str) -> Difference:
    """KL for a saved megabyte; not a number where the divergence is not finite."""
    found, saved = divergence(values, name), megabytes(values, name)
    return Difference(found.value / saved, found.error / saved, found.freedom)


def spared(blocks: Sequence[int]) -> list[int]:
    """The first and last blocks, which the authors leave dense."""
    numbers = sorted(blocks)
    return sorted({*numbers[:AUTHORS_FIRST], *numbers[max(0, len(numbers) - AUTHORS_LAST) :]})


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: blocks; attention against FFN by path; zero-shot tasks; the parts and their sum."""
    parts = {path: results[f"{path}-parts"] for path in paths(results)}
    blocks = results["plain-blocks"]
    return {
        "blocks": {"broken": _broken(blocks)} if _broken(blocks) else {"broken": [], **_blocks(blocks)},
        "parts": {path: _part(values) for path, values in parts.items()},
        "tasks": _tasks(results) if DENSE in results else None,
        "first": AUTHORS_FIRST,
        "last": AUTHORS_LAST,
    }


def _broken(values: Values) -> list[str]:
    """The groups whose divergence is not finite; if there are any, nothing is compared."""
    return [name for name, group in values["groups"].items() if group["kl"] is None]


def _by_window(values: Values, names: Sequence[str]) -> list[float]:
    """Mean over the groups of their KL for a saved megabyte, in each window."""
    groups = [(values["groups"][name]["window_kl"], megabytes(values, name)) for name in names]
    return [
        sum(kl[window] / saved for kl, saved in groups) / len(groups) for window in range(values["windows"])
    ]


def _blocks(values: Values) -> dict[str, Any]:
    """The outer blocks against the inner ones, and the blocks of the highest cost."""
    costs = {int(name): cost(values, name) for name in values["groups"]}
    left = spared(list(costs))
    others = [n for n in sorted(costs) if n not in left]
    if not others:
        return {"count": len(costs), "gap": None}
    outer, inner = (_by_window(values, [str(n) for n in each]) for each in (left, others))
    worst = sorted(costs, key=lambda n: -costs[n].value)[: len(left)]
    return {
        "gap": paired(outer, inner).times(1000),
        "outer": sum(outer) / len(outer),
        "inner": sum(inner) / len(inner),
        "worst": {n: costs[n].times(1000) for n in worst},
        "coded": sorted({*worst} - {*left}),
        "spared": sorted({*left} - {*worst}),
    }


def _part(values: Values) -> dict[str, Any]:
    """Attention against FFN, and the sum of the parts against everything."""
    groups = values["groups"]
    if broken := _broken(values):
        return {"broken": broken}
    found = {"broken": [], "bpw": groups[ALL]["bpw"], "sum": _sum(groups), "ratio": None}
    if not {ATTENTION, FFN} <= set(groups):
        return found
    attention, ffn = (_by_window(values, [name]) for name in (ATTENTION, FFN))
    below = cost(values, FFN).value
    ratio = cost(values, ATTENTION).value / below
    off = paired(attention, [ratio * each for each in ffn])  # 0, with the error of the ratio's numerator
    kinds = [n for n in groups if n not in (ALL, FFN, ATTENTION, ENDS)]
    order = sorted(kinds, key=lambda n: -cost(values, n).value)
    share, part = (
        100 * groups[ATTENTION][key] / (groups[ATTENTION][key] + groups[FFN][key])
        for key in ("weights", "kl")
    )
    return {
        **found,
        "ratio": Difference(ratio, off.error / below),
        "gap": paired(attention, ffn),
        "share": share,
        "part": part,
        "kinds": {n: cost(values, n).times(1000) for n in order},
    }


def _sum(groups: Mapping[str, Any]) -> dict[str, Any]:
    """The losses of the parts, added, against that of everything together."""
    names = [name for name in (FFN, ATTENTION, ENDS) if name in groups]
    by_part = zip(*(groups[name]["window_kl"] for name in names), strict=True)
    gap = paired(groups[ALL]["window_kl"], [sum(window) for window in by_part])
    return {"added": sum(groups[name]["kl"] for name in names), "all": groups[ALL]["kl"], "gap": gap}


def _tasks(results: Results) -> dict[str, Any]:
    """What the right answers lose in probability: by path and part, and by block."""
    dense = results[DENSE]["tasks"]
    names = able(dense)
    return {
        "names": names,
        "count": sum(len(dense[name]["right"]) for name in names),
        "paths": {
            key.removesuffix("-tasks"): _part_losses(results[key]["groups"], dense)
            for key in TASK_STEPS
            if names and key in results and key != BLOCKS
        },
        "blocks": _beyond_noise(results[BLOCKS]["groups"], dense) if names and BLOCKS in results else None,
    }


def _part_losses(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Any]:
    """Everything, FFN and attention, and which kinds lose more than noise; in all and for a gigabyte saved."""
    shown = {name: groups[name] for name in (ALL, FFN, ATTENTION) if name in groups}
    kinds = {name: group for name, group in groups.items() if name not in (ALL, FFN, ATTENTION, ENDS)}
    saved = {name: group["saved_bytes"] / 1e9 for name, group in groups.items()}
    lost = _lost(groups, dense)
    per = {name: found.times(1 / saved[name]) for name, found in lost.items()}
    found = _beyond_noise(kinds, dense)
    clear = sorted(found["beyond"], key=lambda name: -per[name].value)
    attention, ffn = ((groups[n]["tasks"], saved[n]) for n in (ATTENTION, FFN))
    return {
        "shown": {name: (lost[name], per[name]) for name in shown},
        "gap": cost_gap(dense, attention, ffn),
        **found,
        "beyond": {name: per[name] for name in clear},
    }


def _beyond_noise(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Any]:
    """The groups that lose more than noise, most first, and how many would by chance."""
    lost = _lost(groups, dense)
    clear = sorted((n for n in lost if lost[n].clear), key=lambda n: -lost[n].value)
    return {"beyond": {n: lost[n] for n in clear}, "count": len(lost), "chance": (1 - CONFIDENCE) * len(lost)}


def _lost(groups: Mapping[str, Any], dense: Tasks) -> dict[str, Difference]:
    """Group -> points of probability lost."""
    found = {name: probability_lost(dense, group["tasks"]) for name, group in groups.items()}
    return {name: lost for name, lost in found.items() if lost is not None}
