"""What is made of the results of the study `sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocketllm.studies.scored import accuracy, points_lost
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, INK, mean, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL, FFN, ATTENTION, ENDS = "everything", "FFN", "attention", "embedding and head"
_PATHS = {"plain": "error of the weights", "calibrated": "error of the layers' outputs"}
_AUTHORS_FIRST, _AUTHORS_LAST = 3, 2  # blocks that the paper leaves dense


def _loss(values: Mapping[str, Any], name: str) -> float:
    """Nats of divergence per token for a saved megabyte."""
    group = values["groups"][name]
    return float(group["kl"]) / (group["saved_bytes"] / 1e6)


def _paths(results: Results) -> list[str]:
    return [path for path in _PATHS if f"{path}-parts" in results]


def tables(results: Results) -> list[Table]:
    found = [_parts_table(results[f"{path}-parts"], path) for path in _paths(results)]
    found += [_tasks_table(results, p) for p in _paths(results) if f"{p}-tasks" in results]
    return [*found, _blocks_table(results["plain-blocks"])]


def _parts_table(values: Mapping[str, Any], path: str) -> Table:
    rows = []
    for name, group in values["groups"].items():
        lost = math.log(group["perplexity"]) - math.log(values["dense"]) if group["perplexity"] else None
        rows.append(
            [
                name.replace("_", "\\_"),
                number(group["weights"] / 1e6),
                number(group["bpw"]),
                number(group["saved_bytes"] / 1e6),
                number(group["perplexity"], 4),
                number(lost),
                number(group["kl"]),
                number(1000 * _loss(values, name)),
                f"{number(_loss(values, name) / _loss(values, ALL))}x",
            ]
        )
    header = [
        *("compressed alone", "weights, 10^6", "bpw", "MB saved", "perplexity", "ln(perplexity) lost"),
        *("KL to dense", "KL per MB, 10^-3", "of everything's"),
    ]
    note = (
        f"{values['text']}, {values['windows']} windows of {values['context']} tokens; dense perplexity "
        f"{number(values['dense'], 4)}. KL in nats per token; MB saved are 10^6 bytes against bf16, everything "
        "counted."
    )
    return Table(f"Parts, coded for the {_PATHS[path]} ({path})", header, rows, note)


def _tasks_table(results: Results, path: str) -> Table:
    values, dense = results[f"{path}-tasks"], results["dense-tasks"]["tasks"]
    rows = [["nothing (dense)", "0", number(100 * accuracy(dense)), "", ""]]
    for name, group in values["groups"].items():
        saved, (lost, error) = group["saved_bytes"] / 1e6, points_lost(dense, group["tasks"])
        points = f"{number(lost, 2)} ± {number(error, 2)}"
        rows.append(
            [name, number(saved), number(100 * accuracy(group["tasks"])), points, number(lost / saved, 2)]
        )
    header = ["compressed", "MB saved", "accuracy, %", "points lost", "points lost per MB"]
    note = (
        f"Mean over {', '.join(dense)}, the first {values['limit']} documents of each; guessing gets "
        f"{number(100 * accuracy(dense, 'chance'))}. Standard errors of the difference, paired by document."
    )
    return Table(f"Zero-shot tasks ({path})", header, rows, note)


def _blocks_table(values: Mapping[str, Any]) -> Table:
    rows = [
        [name, number(group["saved_bytes"] / 1e6), number(group["kl"]), number(1000 * _loss(values, name))]
        for name, group in values["groups"].items()
    ]
    note = f"{values['windows']} windows of {values['context']} tokens; only that block is compressed."
    return Table("Blocks (plain)", ["block", "MB saved", "KL to dense", "KL per MB, 10^-3"], rows, note)


def draw(results: Results, figure: Figure) -> None:
    paths = _paths(results)
    figure.set_size_inches(9, 6.2)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    top, bottom = halves
    for path, axes in zip(paths, top.subplots(1, len(paths), squeeze=False)[0], strict=True):
        values = results[f"{path}-parts"]
        names = list(values["groups"])[::-1]
        axes.barh(names, [1000 * _loss(values, name) for name in names], color=[_colour(n) for n in names])
        axes.axvline(1000 * _loss(values, ALL), color=INK, linestyle=":", linewidth=1)
        axes.set_title(f"{path}: KL per saved MB, 10⁻³ nats", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes, values = bottom.subplots(), results["plain-blocks"]
    numbers = [1000 * _loss(values, name) for name in values["groups"]]
    axes.bar(range(len(numbers)), numbers, color=COLOURS[0])
    axes.set_title("each block alone (plain): KL per saved MB, 10⁻³ nats", fontsize=9)
    axes.set_xlabel("block", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    if name in (ALL, ENDS):
        return COLOURS[2] if name == ENDS else INK
    return COLOURS[1] if name == ATTENTION or "attn" in name or "attention" in name else COLOURS[0]


def findings(results: Results) -> list[str]:
    return [
        _about_ends(results["plain-blocks"]),
        *(_about_attention(results[f"{path}-parts"], path) for path in _paths(results)),
        *(_about_tasks(results, p) for p in _paths(results) if f"{p}-tasks" in results),
        *(_about_sum(results[f"{path}-parts"], path) for path in _paths(results)),
    ]


def _about_ends(values: Mapping[str, Any]) -> str:
    losses = {int(name): _loss(values, name) for name in values["groups"]}
    numbers = sorted(losses)
    left = set(numbers[:_AUTHORS_FIRST]) | set(numbers[max(0, len(numbers) - _AUTHORS_LAST) :])
    outer = mean([losses[n] for n in left])
    inner = mean([losses[n] for n in numbers if n not in left])
    worst = sorted(losses, key=lambda n: -losses[n])[: len(left)]
    listed = ", ".join(f"{n} ({number(1000 * losses[n], 2)})" for n in worst)
    if outer is None or inner is None or inner <= 0:
        return f"The model has {len(numbers)} blocks, too few to set the outer ones apart from the others."
    held = "held" if outer > 1.2 * inner else "did not hold"
    return (
        f"That the outer blocks are the ones to spare {held}: a saved megabyte in the first {_AUTHORS_FIRST} and "
        f"last {_AUTHORS_LAST} costs {number(outer / inner, 2)} times what it costs in the others. The most "
        f"sensitive blocks are {listed} (KL per MB, 10^-3 nats)."
    )


def _about_attention(values: Mapping[str, Any], path: str) -> str:
    groups = values["groups"]
    if not {ATTENTION, FFN} <= set(groups):
        return f"{path}: the model has no separate attention and FFN matrices."
    ratio = _loss(values, ATTENTION) / _loss(values, FFN)
    share = groups[ATTENTION]["weights"] / (groups[ATTENTION]["weights"] + groups[FFN]["weights"])
    part = groups[ATTENTION]["kl"] / (groups[ATTENTION]["kl"] + groups[FFN]["kl"])
    if 0.8 < ratio < 1.25:
        word = "as sensitive as its size says"
    else:
        word = f"{'more' if ratio > 1 else 'less'} sensitive than its size says"
    kinds = [n for n in groups if n not in (ALL, FFN, ATTENTION, ENDS)]
    order = sorted(kinds, key=lambda n: -_loss(values, n))
    return (
        f"{path.capitalize()}, at {number(groups[ALL]['bpw'])} bits per weight: attention is {word}. It holds "
        f"{number(100 * share, 2)} % of the weights in the blocks and makes {number(100 * part, 2)} % of the "
        f"loss of the two parts; a megabyte saved there costs {number(ratio, 2)} times what it costs in the "
        f"FFN. By kind, most to least: "
        + ", ".join(f"{n} {number(1000 * _loss(values, n), 2)}" for n in order)
        + " (KL per MB, 10^-3 nats)."
    )


def _about_tasks(results: Results, path: str) -> str:
    values, dense = results[f"{path}-tasks"], results["dense-tasks"]["tasks"]
    words = []
    for name, group in values["groups"].items():
        lost, error = points_lost(dense, group["tasks"])
        per = number(lost / (group["saved_bytes"] / 1e6), 2)
        words.append(f"{name} {number(lost, 2)} ± {number(error, 2)} ({per} per MB)")
    return (
        f"{path.capitalize()}, zero-shot points lost: {'; '.join(words)}. With {values['limit']} documents of "
        f"each task, differences below about twice their standard error say nothing."
    )


def _about_sum(values: Mapping[str, Any], path: str) -> str:
    groups = values["groups"]
    added = sum(groups[name]["kl"] for name in (FFN, ATTENTION, ENDS) if name in groups)
    return (
        f"{path.capitalize()}: the losses of the parts add up to {number(added)} nats, everything together "
        f"costs {number(groups[ALL]['kl'])}; {number(groups[ALL]['kl'] / added, 2)} times as much."
    )
