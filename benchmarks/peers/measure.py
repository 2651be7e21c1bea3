"""Run a command and say how long it took and how much memory it needed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """seconds: from start of the process to its end. cpu_seconds: of all its threads and children.

    peak_mib: the largest resident set of any one of its processes (ru_maxrss).
    load: how many others wanted the processor: the load average of the minute before the start.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float
    load: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types."""
        return asdict(self)


class CommandError(Exception):
    """A command failed; the message holds the end of its log."""


def measured(command: Sequence[str | Path], log: Path) -> Cost:
    """Run to the end, output into the log.

    A child's ru_maxrss starts from that of its parent: keep the caller small (no torch in it).

    Raises:
        CommandError: the exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    started = time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        shown = " ".join(map(str, command))
        raise CommandError(f"{shown}\nexit code {child.returncode}; end of {log}:\n" + "\n".join(tail))
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, load)
