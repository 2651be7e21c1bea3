"""The runs of a part of the campaign: numbered, shared among processes, recorded one by one, so that a stop loses none.

Run N of a part draws its random numbers from the seed, the part and N alone, whichever process takes it and when.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = Callable[[random.Random, Path], dict[str, Any]]
"""One run, in a folder to work in. Returns `ends` (kinds of ends), `job`, and `bad` (what must not be, or None)."""


@dataclass(frozen=True)
class Plan:
    """How a part runs. count: of runs. record: a file of finished runs, one JSON object a line."""

    part: str
    count: int
    seed: int
    processes: int
    record: Path

    def carry_out(self, run: Run, place: Path) -> dict[str, Any]:
        """All runs that are not recorded yet.

        Returns:
            Counts of ends and jobs, and all runs that ended as they must not.
        """
        missing = sorted(set(range(self.count)) - {entry["number"] for entry in self._recorded()})
        workers = [
            self._start(run, missing[n :: self.processes], place / str(n)) for n in range(self.processes)
        ]
        while workers:
            workers = [worker for worker in workers if not _is_over(worker)]
            time.sleep(0.05)
            self._say()
        found = sorted(self._recorded(), key=lambda entry: int(entry["number"]))
        assert len(found) == self.count, f"{self.part}: {len(found)} of {self.count} runs are recorded"
        return {
            "count": self.count,
            "seed": self.seed,
            "ends": dict(Counter(end for entry in found for end in entry["ends"])),
            "jobs": dict(Counter(entry["job"] for entry in found)),
            "bad": [{"number": entry["number"], **entry["bad"]} for entry in found if entry["bad"]],
        }

    def _recorded(self) -> list[dict[str, Any]]:
        return [entry for entry in entries(self.record) if entry.get("part") == self.part]

    def _start(self, run: Run, numbers: Iterable[int], place: Path) -> int:
        """Take some of the runs in a process of its own; returns its id."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            with self.record.open("a", encoding="utf-8") as stream:
                for number in numbers:
                    place.mkdir(parents=True, exist_ok=True)
                    found = run(random.Random(f"{self.seed} {self.part} {number}"), place)
                    stream.write(json.dumps({"part": self.part, "number": number, **found}) + "\n")
                    stream.flush()
            code = 0
        finally:
            os._exit(code)

    def _say(self) -> None:
        if sys.stderr.isatty():
            done = self._recorded()
            bad = sum(bool(entry["bad"]) for entry in done)
            print(f"\r{self.part}: {len(done)} of {self.count}, {bad} bad", end="", file=sys.stderr)


def entries(record: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was cut off is left out."""
    if not record.is_file():
        return []
    found = []
    for line in record.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _is_over(worker: int) -> bool:
    done, status = os.waitpid(worker, os.WNOHANG)
    assert not (done and status), f"a process of the campaign ended with {status}"
    return bool(done)
