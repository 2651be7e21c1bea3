"""The values of steps as records: chosen by their keys, grouped, and summarized over seeds and steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import mean

Entry = Mapping[str, Any]
"""The values of a step."""
EXPLODED = 10.0
"""A gradient has exploded if its norm is this many times that of the first step."""


def select(results: Results, pattern: str) -> list[Entry]:
    """The values of the steps whose keys match, in order; each with the words that its key has in braces.

    pattern: `tuned.{depth}.{times}.{rate}` matches `tuned.5.1.0.016`: depth 5, times 1, rate 0.016. Only the last
    of the words may hold a dot; numbers are converted.
    """
    parts = re.split(r"\{(\w+)\}", pattern)
    literals, names = parts[::2], parts[1::2]
    groups = [f"(?P<{name}>{'.+' if name == names[-1] else '[^.]+?'})" for name in names] + [""]
    expression = "".join(re.escape(a) + b for a, b in zip(literals, groups, strict=True))
    matches = ((re.fullmatch(expression, key), value) for key, value in results.items())
    return [{**value, **{n: _number(w) for n, w in m.groupdict().items()}} for m, value in matches if m]


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def grouped(entries: Iterable[Entry], key: str) -> dict[Any, list[Entry]]:
    """The entries by their value at `key`, in rising order, where at least two have the same."""
    found: dict[Any, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry[key], []).append(entry)
    return {value: same for value, same in sorted(found.items()) if len(same) > 1}


def lowest(entries: Iterable[Entry], key: str) -> Entry | None:
    """The entry whose mean over the seeds is the lowest at `key`; None where none is finite."""
    known = [(value, n, entry) for n, entry in enumerate(entries) if (value := mean(entry[key])) is not None]
    return min(known)[2] if known else None


def over_entries(entries: Sequence[Entry], key: str) -> list[float | None]:
    """For each seed the mean over several steps' values of that key."""
    return [mean([entry[key][n] for entry in entries]) for n in range(len(entries[0][key]))]


def exploded(entries: Sequence[Entry]) -> tuple[int, int]:
    """(trainings whose gradient grew past `EXPLODED` times its first norm or was not finite, trainings)."""
    count = 0
    for entry in entries:
        ends = zip(entry["first_gradient"], entry["peak_gradient"], entry["end_nmse"], strict=True)
        count += sum(
            end is None or first is None or peak is None or peak > EXPLODED * first
            for first, peak, end in ends
        )
    return count, sum(len(entry["end_nmse"]) for entry in entries)


def highest(entries: Sequence[Entry], key: str) -> float | None:
    """Over all steps and seeds; None where one was not finite."""
    values = [value for entry in entries for value in entry[key]]
    return None if None in values else max(values)
