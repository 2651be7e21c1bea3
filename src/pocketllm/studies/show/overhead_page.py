"""Tables and picture of the study `overhead`."""

from __future__ import annotations

from pocketllm.studies.claims.overhead_claim import MEASURED, devices, forms_of, middle, ratio, rounds_of
from pocketllm.studies.definition import Note, Results, Table
from pocketllm.studies.measure.probe import DENSE
from pocketllm.studies.show.columns import Cell, figure, on, text
from pocketllm.studies.show.numbers import number
from pocketllm.studies.show.plot import COLOURS, Axis, Bars, Panel, Part, Picture

_FORM = {
    **on(
        "flops",
        {part: figure(part, times=1e-6) for part in ("networks", "scales", "rotation", "one token")},
    ),
    "decoding in tokens": figure("tokens"),
    "MB": figure("bytes_on_disk", 4, times=1e-6),
    "MB in bf16": figure("dense_bytes", 4, times=1e-6),
}


def tables(results: Results, note: Note) -> list[Table]:
    """Operations; what was measured, by device."""
    columns = {"form": text(0), **on(1, _FORM)}
    operations = Table.of("Operations", forms_of(results).items(), columns, note("Operations"))
    return [operations, *(_measured(results, device, note) for device in devices(results))]


def _measured(results: Results, device: str, note: Note) -> Table:
    rounds = rounds_of(results, device)
    first = rounds[0]

    def seconds(what: str) -> Cell:
        """The median, and its ratio to that of dense weights."""
        return lambda job: (
            f"{number(middle(rounds, job, f'{what}_seconds'))} ({number(ratio(results, device, job, what))}x)"
        )

    names = ("load, s", "first token, s", f"after {first['long']} tokens, s", "each token, s")
    columns = {
        "": lambda job: job,
        **{name: seconds(what) for name, what in zip(names, MEASURED, strict=True)},
        "tokens/s": lambda job: number(1 / middle(rounds, job, "token_seconds")),
        "MiB loaded": lambda job: number(middle(rounds, job, "loaded_bytes") / 2**20),
        "MiB at most": lambda job: number(middle(rounds, job, "peak_bytes") / 2**20),
    }
    gpu = first["gpu"] if device == "cuda" else None
    where = "CPU" if gpu is None else f"GPU ({gpu})"
    about = note("Measured", count=len(rounds), short=first["short"], gpu=gpu)
    return Table.of(f"Measured on the {where}", first["runs"], columns, about)


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
    panels = []
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
