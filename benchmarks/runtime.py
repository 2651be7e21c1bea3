"""Speed and memory of SmolLM2-135M packed, decoded and uncompressed, on one thread and on two.

    python benchmarks/runtime.py [FOLDER]

FOLDER is SmolLM2-135M compressed to 2.05 bits per weight; without it, it is made first, in some fifteen minutes.
Every run is a process of its own, in turn with the others (`pocketllm bench`). Writes results/runtime.json.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import save

MODEL = "builtin:smollm2-135m"
BPW, CALIBRATION_TOKENS = 2.05, 8192
THREADS = (1, 2)
ROUNDS = 5


def compressed(scratch: Path) -> tuple[str, dict[str, Any]]:
    """The folder named on the command line, or one that is made now; and its size."""
    import pocketllm
    from pocketllm.format import read_report

    folder = sys.argv[1] if len(sys.argv) > 1 else str(scratch / "smol")
    if len(sys.argv) == 1:
        config = pocketllm.preset("calibrated-10x")
        calibration = dataclasses.replace(config.calibration, tokens=CALIBRATION_TOKENS)
        config = dataclasses.replace(config, target_bpw=BPW, calibration=calibration)
        pocketllm.compress(MODEL, config, folder)
    report = read_report(Path(folder))
    return folder, {"bpw_blocks": report["bpw_blocks"], "bytes_on_disk": report["bytes_on_disk"]}


def measure(folder: str) -> list[dict[str, Any]]:
    """Runs of all modes by each number of threads."""
    from pocketllm.evaluate import BenchConfig, bench

    runs = []
    for threads in THREADS:
        config = BenchConfig(threads=threads, rounds=ROUNDS)
        runs += [dataclasses.asdict(run) for run in bench([folder], ["packed", "dense"], config, MODEL)]
    for run in runs:
        run["model"] = MODEL if run["mode"] == "checkpoint" else "compressed"
    return runs


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, form = compressed(Path(scratch))
        runs = measure(folder)
    values = {"rounds": ROUNDS, "load": os.getloadavg()[2], "runs": runs}
    save("runtime", "python benchmarks/runtime.py", {"model": MODEL, "compressed": form, **values})


if __name__ == "__main__":
    main()
