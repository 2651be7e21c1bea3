"""Numbers of the tables and picture of the study `overhead`."""

from __future__ import annotations

from functools import partial
from typing import Any

from pocketllm.studies.claims.overhead_claim import MEASURED, devices, forms_of, middle, ratio, rounds_of
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.probe import DENSE
from pocketllm.studies.show.numbers import number
from pocketllm.studies.show.plot import COLOURS, Axis, Bars, Panel, Part, Picture


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the forms and devices, medians and ratios over the rounds."""
    return {
        "forms": forms_of(results),
        "devices": {device: rounds_of(results, device) for device in devices(results)},
        "measured": MEASURED,
        "middle": partial(middle, results),
        "ratio": partial(ratio, results),
    }


def picture(results: Results) -> Picture:
    """Time and memory over those of the dense checkpoint; a row for each device."""
    found = devices(results)
    return Picture(9, 3.6 * len(found), [Part([_row(results, device) for device in found])])


def _row(results: Results, device: str) -> list[Panel]:
    first = rounds_of(results, device)[0]
    jobs = list(first["runs"])[::-1]
    colours = [COLOURS[0] if job == DENSE else COLOURS[1 if "packed" in job else 2] for job in jobs]
    shown = {
        "load": "load",
        f"prompt of {first['long']} tokens": "long",
        "each token": "token",
        "peak memory": "peak_bytes",
    }
    panels: list[Panel] = []
    for title, what in shown.items():
        lengths = [ratio(results, device, job, what) for job in jobs]
        panels.append(
            Panel(
                f"{title}{' (GPU)' if device == 'cuda' else ''}",
                [Bars(range(len(jobs)), lengths, {"color": colours}, values=number)],
                x=Axis("times dense", low=0, high=1.35 * max(lengths)),
                y=Axis(ticks=range(len(jobs)), names=[""] * len(jobs) if panels else jobs),
                small=True,
            )
        )
    return panels
