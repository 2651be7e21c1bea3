"""The cost of decoding compared with dense weights: in operations, time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.overhead_steps import MODES
from pocketllm.studies.measure.probe import DENSE

MEASURED = ("load", "first", "long", "token")
"""The timed quantities."""
_TOLD = ("load", "token", "long", "peak_bytes")


def rounds_of(results: Results, device: str) -> list[Mapping[str, Any]]:
    """The rounds on a device."""
    return [values for key, values in results.items() if key.startswith(f"{device}-")]


def devices(results: Results) -> list[str]:
    """Those that were measured on."""
    return [device for device in ("cpu", "cuda") if rounds_of(results, device)]


def forms_of(results: Results) -> dict[str, Mapping[str, Any]]:
    """Form -> its bytes and operations; with `tokens`: decoding over the operations of one token."""
    forms = {key.removeprefix("form-"): v for key, v in results.items() if key.startswith("form-")}
    return {name: {**v, "tokens": v["decode_flops"] / v["flops"]["one token"]} for name, v in forms.items()}


def middle(results: Results, device: str, job: str, key: str) -> float:
    """Median over the rounds."""
    return float(median(values["runs"][job][key] for values in rounds_of(results, device)))


def ratio(results: Results, device: str, job: str, what: str) -> float:
    """A job's figure over that of the dense checkpoint: median over the rounds of the ratio in each.

    what: one of `MEASURED`, taken as processor time on the CPU and as time on the GPU; or a whole key.
    """
    clock = "seconds" if device == "cuda" else "cpu_seconds"
    key = f"{what}_{clock}" if what in MEASURED else what
    runs = [values["runs"] for values in rounds_of(results, device)]
    return float(median(run[job][key] / run[DENSE][key] for run in runs))


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: ratios to dense weights, by device, form and mode; operations in tokens."""
    return {
        "long": rounds_of(results, "cpu")[0]["long"],
        "all": {
            mode: {what: _range(results, shown, what) for what in _TOLD} for mode, shown in MODES.items()
        },
        "forms": [_form(results, device, name) for device in devices(results) for name in forms_of(results)],
        "tokens": {name: form["tokens"] for name, form in forms_of(results).items()},
    }


def _range(results: Results, mode: str, what: str) -> list[float]:
    """The least and the highest ratio of the forms on the CPU."""
    found = [ratio(results, "cpu", f"{name}, {mode}", what) for name in forms_of(results)]
    return [min(found), max(found)]


def _form(results: Results, device: str, name: str) -> dict[str, Any]:
    jobs = {mode: f"{name}, {shown}" for mode, shown in MODES.items()}
    return {
        "device": "GPU" if device == "cuda" else "CPU",
        "name": name,
        "load": middle(results, device, jobs["dense"], "load_seconds"),
        "dense_load": middle(results, device, DENSE, "load_seconds"),
        "long": rounds_of(results, device)[0]["long"],
        **{mode: {what: ratio(results, device, job, what) for what in _TOLD} for mode, job in jobs.items()},
    }
