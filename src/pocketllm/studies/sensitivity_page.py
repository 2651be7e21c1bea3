"""What is made of the results of the study `sensitivity`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pocketllm.studies import sensitivity_tasks as tasks
from pocketllm.studies.noise import CONFIDENCE, Difference, paired
from pocketllm.studies.sensitivity_tasks import ALL, ATTENTION, ENDS, FFN
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, INK, number, with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PATHS = {"plain": "error of the weights", "calibrated": "error of the layers' outputs"}
_AUTHORS_FIRST, _AUTHORS_LAST = 3, 2  # blocks that the paper leaves dense


def _loss(values: Mapping[str, Any], name: str) -> float:
    """Nats of divergence per token for a saved megabyte; no number where the divergence is not finite."""
    return _kl(values["groups"][name]) / _megabytes(values, name)


def _kl(group: Mapping[str, Any]) -> float:
    return math.nan if group["kl"] is None else float(group["kl"])


def _error(values: Mapping[str, Any], name: str) -> float:
    """The standard error of `_loss`; infinite where there was but one window."""
    error = values["groups"][name]["kl_stderr"]
    return math.inf if error is None else float(error) / _megabytes(values, name)


def _megabytes(values: Mapping[str, Any], name: str) -> float:
    return float(values["groups"][name]["saved_bytes"]) / 1e6


def _per_megabyte(values: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """`_loss` in thousandths ± its standard error."""
    return with_error(1000 * _loss(values, name), 1000 * _error(values, name), digits)


def _losses(values: Mapping[str, Any], name: str) -> list[str]:
    """Cells: perplexity, how much it rose for a saved megabyte, KL, KL for a saved megabyte."""
    group, saved = values["groups"][name], _megabytes(values, name)
    known = None not in (group["perplexity"], values["dense"])
    rose = group["perplexity"] - values["dense"] if known else None
    return [
        number(group["perplexity"], 4),
        "not finite" if rose is None else number(1000 * rose / saved),
        with_error(_kl(group), _error(values, name) * saved),
        _per_megabyte(values, name),
    ]


_LOSSES = ["perplexity", "rise per MB, 10^-3", "KL to dense", "KL per MB, 10^-3"]


def _paths(results: Results) -> list[str]:
    return [path for path in _PATHS if f"{path}-parts" in results]


def tables(results: Results) -> list[Table]:
    found = [_parts_table(results[f"{path}-parts"], path) for path in _paths(results)]
    return [*found, *tasks.tables(results), _blocks_table(results["plain-blocks"])]


def _parts_table(values: Mapping[str, Any], path: str) -> Table:
    rows = [
        [
            name,
            number(group["weights"] / 1e6),
            number(group["bpw"]),
            number(_megabytes(values, name)),
            *_losses(values, name),
            f"{number(_loss(values, name) / _loss(values, ALL))}x",
        ]
        for name, group in values["groups"].items()
    ]
    header = ["compressed alone", "weights, 10^6", "bpw", "MB saved", *_LOSSES, "of everything's"]
    note = (
        f"{values['text']}, {values['windows']} windows of {values['context']} tokens; dense perplexity "
        f"{number(values['dense'], 4)}. KL in nats per token ± its standard error over the windows, which "
        "perplexity lacks here; rise: of the perplexity over the dense model's; MB saved are 10^6 bytes against "
        "bf16, everything counted."
    )
    return Table(f"Parts, coded for the {_PATHS[path]} ({path})", header, rows, note)


def _blocks_table(values: Mapping[str, Any]) -> Table:
    rows = [[name, number(_megabytes(values, name)), *_losses(values, name)] for name in values["groups"]]
    note = (
        f"{values['windows']} windows of {values['context']} tokens; dense perplexity {number(values['dense'], 4)}; "
        "only that block is compressed. Differences are taken window by window."
    )
    return Table("Blocks (plain)", ["block", "MB saved", *_LOSSES], rows, note)


def draw(results: Results, figure: Figure) -> None:
    """KL per saved megabyte: by part and kind, by block."""
    from matplotlib.patches import Patch

    paths = _paths(results)
    figure.set_size_inches(9, 7)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    top, bottom = halves
    for path, axes in zip(paths, top.subplots(1, len(paths), squeeze=False)[0], strict=True):
        values = results[f"{path}-parts"]
        names = list(values["groups"])[::-1]
        numbers, errors = _drawn(values, names)
        axes.barh(names, numbers, xerr=errors, error_kw=_WHISKERS, color=[_colour(n) for n in names])
        axes.axvline(1000 * _loss(values, ALL), color=INK, linestyle=":", linewidth=1)
        axes.set_title(path, fontsize=9)
        axes.set_xlabel("KL per saved MB, 10⁻³ nats", fontsize=8)
        axes.tick_params(labelsize=8)
    shown = {
        ATTENTION: "attention",
        FFN: "FFN",
        ENDS: "embedding and head",
        ALL: "everything (dotted: its cost)",
    }
    patches = [Patch(color=_colour(name), label=words) for name, words in shown.items()]
    top.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes, values = bottom.subplots(), results["plain-blocks"]
    numbers, errors = _drawn(values, list(values["groups"]))
    blocks = [int(name) for name in values["groups"]]
    spared = {*sorted(blocks)[:_AUTHORS_FIRST], *sorted(blocks)[max(0, len(blocks) - _AUTHORS_LAST) :]}
    colours = [COLOURS[3] if block in spared else COLOURS[5] for block in blocks]
    axes.bar(blocks, numbers, yerr=errors, error_kw=_WHISKERS, color=colours)
    axes.set_title(f"plain, each block alone; lines everywhere: {CONFIDENCE:.0%} intervals", fontsize=9)
    axes.set_xlabel("block", fontsize=8)
    axes.set_ylabel("KL per saved MB, 10⁻³ nats", fontsize=8)
    axes.tick_params(labelsize=8)
    words = "left dense by the authors", "coded by them"
    patches = [Patch(color=COLOURS[n], label=each) for n, each in zip((3, 5), words, strict=True)]
    bottom.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


_WHISKERS = {"ecolor": INK, "capsize": 2, "lw": 0.9}


def _drawn(values: Mapping[str, Any], names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Thousandths of nats per saved megabyte, and half their intervals; 0 where there was but one window."""
    losses = [
        Difference(_loss(values, n), _error(values, n), values["windows"] - 1).times(1000) for n in names
    ]
    return [loss.value for loss in losses], [loss.margin if loss.known else 0.0 for loss in losses]


def _colour(name: str) -> str:
    if name in (ALL, ENDS):
        return COLOURS[2] if name == ENDS else INK
    return COLOURS[1] if name == ATTENTION or "attn" in name or "attention" in name else COLOURS[0]


def findings(results: Results) -> list[str]:
    parts = {path: results[f"{path}-parts"] for path in _paths(results)}
    blocks = results["plain-blocks"]
    return [
        _broken(blocks, "Blocks") or _about_ends(blocks),
        *(
            _broken(values, path.capitalize()) or _about_attention(values, path)
            for path, values in parts.items()
        ),
        *tasks.findings(results),
        *(_about_sum(values, path) for path, values in parts.items() if not _broken(values, path)),
    ]


def _broken(values: Mapping[str, Any], what: str) -> str:
    """What is said where a divergence is not finite; nothing where all are."""
    names = [name for name, group in values["groups"].items() if group["kl"] is None]
    if not names:
        return ""
    return (
        f"{what}: nothing is compared, since the KL is not finite with these compressed: {', '.join(names)}."
    )


def _by_window(values: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Mean over the groups of their KL for a saved megabyte, in each window."""
    groups = [(values["groups"][name]["window_kl"], _megabytes(values, name)) for name in names]
    return [
        sum(kl[window] / saved for kl, saved in groups) / len(groups) for window in range(values["windows"])
    ]


def _about_ends(values: Mapping[str, Any]) -> str:
    losses = {int(name): _loss(values, name) for name in values["groups"]}
    numbers = sorted(losses)
    left = sorted({*numbers[:_AUTHORS_FIRST], *numbers[max(0, len(numbers) - _AUTHORS_LAST) :]})
    others = [n for n in numbers if n not in left]
    if not others:
        return f"The model has {len(numbers)} blocks, too few to set the outer ones apart from the others."
    outer, inner = (_by_window(values, [str(n) for n in each]) for each in (left, others))
    gap = paired(outer, inner).times(1000)
    held = ("held on average" if gap.value > 0 else "did not hold") if gap.clear else "is not seen"
    worst = sorted(losses, key=lambda n: -losses[n])[: len(left)]
    listed = ", ".join(f"{n} ({_per_megabyte(values, str(n), 2)})" for n in worst)
    means = [sum(each) / len(each) for each in (outer, inner)]
    return (
        f"That the outer blocks are the ones to spare {held}: KL per saved megabyte is {number(1000 * means[0], 2)} "
        f"in the first {_AUTHORS_FIRST} and last {_AUTHORS_LAST}, {number(1000 * means[1], 2)} in the others (10^-3 "
        f"nats), {number(means[0] / means[1], 2)} times as much; the difference is {gap.verdict}. The highest "
        f"blocks are {listed}.{_misplaced(worst, left)}"
    )


def _misplaced(worst: Sequence[int], left: Sequence[int]) -> str:
    """Blocks among the most sensitive that the authors code, and those that they spare and are not among them."""
    coded, spared = (_listed(sorted({*a} - {*b})) for a, b in ((worst, left), (left, worst)))
    if not coded:
        return " They are those that the authors leave dense."
    return f" Of these the authors code {coded}; they spare {spared}, which is not among them."


def _listed(blocks: Sequence[int]) -> str:
    return " and ".join(map(str, blocks))


def _about_attention(values: Mapping[str, Any], path: str) -> str:
    groups = values["groups"]
    if not {ATTENTION, FFN} <= set(groups):
        return f"{path}: the model has no separate attention and FFN matrices."
    attention, ffn = (_by_window(values, [name]) for name in (ATTENTION, FFN))
    ratio = _loss(values, ATTENTION) / _loss(values, FFN)
    off = paired(attention, [ratio * loss for loss in ffn])  # 0, with the error of the ratio's numerator
    ratio_error, gap = off.error / _loss(values, FFN), paired(attention, ffn)
    share = groups[ATTENTION]["weights"] / (groups[ATTENTION]["weights"] + groups[FFN]["weights"])
    part = groups[ATTENTION]["kl"] / (groups[ATTENTION]["kl"] + groups[FFN]["kl"])
    if not gap.clear:
        word = "not seen to be more or less sensitive than its size says"
    else:
        word = f"{'more' if ratio > 1 else 'less'} sensitive than its size says"
    kinds = [n for n in groups if n not in (ALL, FFN, ATTENTION, ENDS)]
    order = sorted(kinds, key=lambda n: -_loss(values, n))
    return (
        f"{path.capitalize()}, at {number(groups[ALL]['bpw'])} bits per weight: attention is {word}. It holds "
        f"{number(100 * share, 2)} % of the weights in the blocks and makes {number(100 * part, 2)} % of the "
        f"loss of the two parts; a megabyte saved there costs {with_error(ratio, ratio_error, 2)} times what "
        f"it costs in the FFN. By kind, most to least: "
        + ", ".join(f"{n} {_per_megabyte(values, n, 2)}" for n in order)
        + " (KL per MB, 10^-3 nats)."
    )


def _about_sum(values: Mapping[str, Any], path: str) -> str:
    groups = values["groups"]
    names = [name for name in (FFN, ATTENTION, ENDS) if name in groups]
    added = sum(groups[name]["kl"] for name in names)
    by_part = zip(*(groups[name]["window_kl"] for name in names), strict=True)
    gap = paired(groups[ALL]["window_kl"], [sum(window) for window in by_part])
    return (
        f"{path.capitalize()}: the losses of the parts add up to {number(added)} nats, everything together "
        f"costs {number(groups[ALL]['kl'])}; {gap.told('more', 'less')}."
    )
