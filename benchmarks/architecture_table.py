"""Tables of docs/models.md (which model types work how, large dimensions without weights, cost), and of peak memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common import GEMMA, SMOLLM2
from pages import load_results, markdown_table

LITTLE = 0.5
"""Share of the weights that is compressed, below which a type is named."""


def architectures() -> str:
    """Every causal language model type of transformers: works, refused with the reason, fails."""
    found = load_results("architectures")
    types: dict[str, Any] = found["types"]
    count = Counter(_state(entry, "without") + " / " + _state(entry, "with") for entry in types.values())
    both = [f"`{kind}`" for kind, entry in types.items() if _is(entry, "works", "works")]
    rows = [
        [f"`{kind}`", _state(entry, "without"), _state(entry, "with"), _reason(entry)]
        for kind, entry in types.items()
        if not _is(entry, "works", "works")
    ]
    summary = "; ".join(f"{state}: {number}" for state, number in count.most_common())
    head = ["type", "without calibration", "with calibration", "reason"]
    little = [
        f"`{kind}` {share:.0%}"
        for kind, entry in types.items()
        if (share := min((entry.get("compressed") or {"": 1.0}).values())) < LITTLE
    ]
    return (
        f"{len(types)} model types of transformers {found['transformers']}. Without / with calibration: {summary}.\n\n"
        f"Types that work with and without calibration, in both modes: {', '.join(both)}.\n\n"
        "Types of which less than half of the (tiny) model's weights are compressed, because the others are in vision "
        "or audio towers (`--set towers=true` compresses their linear layers), in convolutions, in tables of "
        f"positions, or in linear layers outside the blocks: {', '.join(little)}. `compress` and `--dry-run` warn "
        "then, and name the share and the reasons.\n\n"
        f"{markdown_table(head, rows)}\n\n`{found['command']}`"
    )


def large_models() -> str:
    """Exact sizes of large models, and one block of each."""
    found = load_results("large_models")
    rows = []
    for name, entry in found["models"].items():
        whole, block = entry["whole"], entry.get("block")
        rows.append(
            [
                name,
                f"{whole['dense_bytes'] / 1e9:.1f}",
                f"{whole['bytes_on_disk'] / 1e9:.2f}",
                f"{whole['bpw_matrices']:.3f}",
                str(whole["matrices"]),
                f"{whole['plan_seconds']:.1f}",
                *(_block(block) if block is not None else [""] * 5),
            ]
        )
    head = [
        "model",
        "bf16, GB",
        "at 3 bits, GB",
        "bpw",
        "matrices",
        "dry run, s",
        "one block, M weights",
        "form of its indices",
        "loaded in both modes",
        "processor s",
        "peak GB",
    ]
    machine = found["machine"]
    note = (
        "GB are 10^9 bytes; sizes are exact and exclude the tokenizer. Time and memory are of compressing the block "
        f"without calibration; {machine['processor']}, {machine['cores']} cores. `{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def peak_memory() -> str:
    """Peak memory of calibrated compression by stage."""
    found = load_results("peak_memory")
    stages = list(dict.fromkeys(stage for entry in found["models"].values() for stage in entry["stages"]))
    rows = []
    for model, entry in found["models"].items():
        beyond = (entry["peak_bytes"] - entry["nothing_loaded_bytes"]) / 1e9
        cells = [_gigabytes(entry["stages"].get(stage)) for stage in stages]
        rows.append([f"`{model}`", f"{entry['dense_bytes'] / 1e6:.0f}", *cells, f"{beyond:.2f}"])
    head = ["model", "dense, MB", *stages, "beyond a process that has loaded nothing"]
    note = (
        "Resident GB (10^9 bytes); in brackets without the pages of mapped files, which the system can drop. "
        f"Default preset at {found['bpw']} bits per weight, embedding included, {found['machine']['threads']} threads. "
        f"`{found['command']}`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def cost() -> str:
    """How long compressing the two real models takes, and how much memory."""
    rows = []
    for subject in (SMOLLM2, GEMMA):
        presets, calibrated = (load_results(subject.results(kind)) for kind in ("presets", "calibrated"))
        runs = [
            (f"`{name}`", entry, presets)
            for name, entry in presets["presets"].items()
            if name.startswith("lookup")
        ]
        runs += [
            (f"default, {name}", entry, calibrated)
            for name, entry in calibrated["settings"].items()
            if name.startswith("everything")
        ]
        dense = presets["dense"]["bytes_on_disk"] / 1e6
        for name, entry, found in runs:
            peak, threads = entry.get("peak_memory_bytes"), found["machine"]["threads"]
            memory = "" if peak is None else f"{peak / 1e9:.1f}"
            sizes = f"{dense:.0f}", f"{entry['bytes_on_disk'] / 1e6:.0f}"
            rows.append([subject.title, name, *sizes, str(threads), f"{entry['seconds']:.0f}", memory])
    alone = load_results("peak_memory")
    peaks = ", ".join(
        f"{entry['peak_bytes'] / 1e9:.1f} GB ({model} at {alone['bpw']} bits, `{alone['command']}`)"
        for model, entry in alone["models"].items()
    )
    head = ["model", "compressed by", "dense, MB", "MB on disk", "threads", "seconds", "peak GB"]
    note = (
        f"Elapsed seconds; some of these runs shared the machine ({alone['machine']['processor']}, "
        f"{alone['machine']['cores']} cores) with other work. Peak resident memory of the same process, for Gemma "
        f"before compressing took less memory; now: {peaks}. "
        "`python benchmarks/presets.py`, `python benchmarks/calibrated.py`"
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _gigabytes(peaks: list[int] | None) -> str:
    return "" if peaks is None else f"{peaks[0] / 1e9:.2f} ({peaks[1] / 1e9:.2f})"


def _block(block: dict[str, Any]) -> list[str]:
    """Cells of the block of a large model."""
    state = "agrees" if block["agrees"] and block["bytes_are_planned"] else "differs"
    peak = f"{block['peak_memory_bytes'] / 1e9:.1f}"
    form = block.get("form", "look-up")  # the presets lookup-*, in results before the form was noted
    return [f"{block['weights'] / 1e6:.0f}", form, state, f"{block['processor_seconds']:.0f}", peak]


def _is(entry: dict[str, Any], without: str, calibrated: str) -> bool:
    return (_state(entry, "without"), _state(entry, "with")) == (without, calibrated)


def _state(entry: dict[str, Any], name: str) -> str:
    """works, refused, fails or not built, for both modes; the worse if they differ."""
    if entry["not_built"]:
        return "not built"
    states = {value.partition(":")[0] for value in entry["results"][name].values()}
    return next(state for state in ("fails", "refused", "works") if state in states)


def _reason(entry: dict[str, Any]) -> str:
    if entry["not_built"]:
        return _cell(f"transformers cannot build it at this size: {entry['not_built']}")
    reasons = [value for modes in entry["results"].values() for value in modes.values() if value != "works"]
    return _cell("; ".join(dict.fromkeys(reason.partition(": ")[2] for reason in reasons)))


def _cell(text: str) -> str:
    shown = text.removesuffix("; use a preset without calibration (lookup-8x)").removeprefix("calibration: ")
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
