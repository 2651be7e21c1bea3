"""Decoding on a GPU: load, first token, speed and memory of a compressed model in both modes, and of the dense one.

    python benchmarks/decoding_gpu.py FOLDER [--rounds 2]

Each runs in a process of its own, one after another, as in the study `overhead`. Writes
results/decoding_gpu.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from common import save

from pocketllm.model.checkpoint import read_report
from pocketllm.model.source import resolve
from pocketllm.studies import probe
from pocketllm.studies.overhead_page import MODES

MODEL = "builtin:smollm2-135m"


def main() -> None:
    """Measure and write down the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    jobs = {"dense checkpoint": (str(resolve(MODEL)), probe.DENSE)}
    jobs |= {shown: (chosen.folder, mode) for mode, shown in MODES.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(chosen.rounds):
        for name, (folder, mode) in jobs.items():
            runs[name].append(probe.run(probe.Probe(folder, mode, "cuda", 1, 16, 512, 64, 5.0)))
            print(name, runs[name][-1], flush=True)
    medians: dict[str, Any] = {
        name: {key: median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    values = {
        "model": MODEL,
        "bpw_blocks": read_report(Path(chosen.folder))["bpw_blocks"],
        "rounds": chosen.rounds,
        "medians": medians,
    }
    save("decoding_gpu", "python benchmarks/decoding_gpu.py", values, device="cuda")


if __name__ == "__main__":
    main()
