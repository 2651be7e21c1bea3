"""The cost of decoding compared with dense weights: in operations, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry, select
from pocketllm.studies.measure.overhead_steps import MODES
from pocketllm.studies.measure.probe import DENSE
from pocketllm.studies.show import plot
from pocketllm.studies.show.numbers import number

MEASURED = ("load", "first", "long", "token")
"""The timed quantities."""
_COMPARED = ("load", "token", "long", "peak_bytes")


def devices(results: Results) -> dict[str, list[Entry]]:
    """Device -> its rounds."""
    found = {device: select(results, device + "-{round}") for device in ("cpu", "cuda")}
    return {device: rounds for device, rounds in found.items() if rounds}


def forms(results: Results) -> dict[str, Mapping[str, Any]]:
    """Form -> its bytes and operations; with `tokens`: decoding over the operations of one token."""
    found = select(results, "form-{form}")
    return {v["form"]: {**v, "tokens": v["decode_flops"] / v["flops"]["one token"]} for v in found}


def middle(results: Results, device: str, job: str, key: str) -> float:
    """Median over the rounds."""
    return float(median(values["runs"][job][key] for values in devices(results)[device]))


def ratio(results: Results, device: str, job: str, what: str) -> float:
    """A job's figure over that of the dense checkpoint: median over the rounds of the ratio in each.

    what: one of `MEASURED`, taken as processor time on the CPU and as time on the GPU; or a whole key.
    """
    clock = "seconds" if device == "cuda" else "cpu_seconds"
    key = f"{what}_{clock}" if what in MEASURED else what
    runs = [values["runs"] for values in devices(results)[device]]
    return float(median(run[job][key] / run[DENSE][key] for run in runs))


def _ratios(results: Results, device: str, form: str, mode: str) -> dict[str, float]:
    return {what: ratio(results, device, f"{form}, {MODES[mode]}", what) for what in _COMPARED}


def _all(results: Results) -> Iterator[Values]:
    """The ratios of every form on the CPU."""
    by_mode = {mode: [_ratios(results, "cpu", form, mode) for form in forms(results)] for mode in MODES}
    yield {"long": devices(results)["cpu"][0]["long"], **by_mode}


def _each(results: Results) -> Iterator[Values]:
    for device, rounds in devices(results).items():
        for form in forms(results):
            yield {
                "device": "GPU" if device == "cuda" else "CPU",
                "form": form,
                "load": middle(results, device, f"{form}, {MODES['dense']}", "load_seconds"),
                "dense_load": middle(results, device, DENSE, "load_seconds"),
                "long": rounds[0]["long"],
                **{mode: _ratios(results, device, form, mode) for mode in MODES},
            }


def _operations(results: Results) -> Iterator[Values]:
    yield {"tokens": {name: form["tokens"] for name, form in forms(results).items()}}


FINDINGS = (
    Finding("the cost of decoding at load, and of staying packed", _all),
    Finding("the cost by form", _each),
    Finding("operations of decoding", _operations),
)


def picture(results: Results) -> plot.Picture:
    """Time and memory over those of the dense checkpoint; a row for each device."""
    rows = [_row(results, device) for device in devices(results)]
    return plot.Picture(9, 3.6 * len(rows), [plot.Part(rows)])


def _row(results: Results, device: str) -> list[plot.Panel]:
    first = devices(results)[device][0]
    jobs, prompt = list(first["runs"])[::-1], f"prompt of {first['long']} tokens"
    colours = [plot.COLOURS[0 if job == DENSE else 1 if "packed" in job else 2] for job in jobs]
    shown = {"load": "load", prompt: "long", "each token": "token", "peak memory": "peak_bytes"}
    panels: list[plot.Panel] = []
    for title, what in shown.items():
        lengths = [ratio(results, device, job, what) for job in jobs]
        numbers = [
            plot.mark("text", length, place, f" {number(length)}", va="center", fontsize=8)
            for place, length in enumerate(lengths)
        ]
        panels.append(
            plot.Panel(
                f"{title}{' (GPU)' if device == 'cuda' else ''}",
                [plot.mark("barh", range(len(jobs)), lengths, color=colours), *numbers],
                plot.Axis("times dense", low=0, high=1.35 * max(lengths)),
                plot.Axis(ticks=range(len(jobs)), names=[""] * len(jobs) if panels else jobs),
                small=True,
            )
        )
    return panels
