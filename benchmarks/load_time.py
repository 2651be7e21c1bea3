"""Time and memory of loading SmolLM2-135M, stage by stage: packed against the dense checkpoint.

    python benchmarks/load_time.py FOLDER

FOLDER is SmolLM2-135M compressed. Every run is a process of its own, the two in turn; the libraries are imported
before the clock starts. A stage ends where the next begins; memory is what is resident at its end, beyond the
process before loading. Files are hashed in a thread from the second stage on. Writes results/load_time.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import save

MODEL, ROUNDS, THREADS = "builtin:smollm2-135m", 9, 2
PACKED = (
    ("pocketllm.runtime.load_model", "_read_config", "files but the weights verified"),
    ("pocketllm.runtime.load_model", "read_tokenizer", "configuration"),
    ("pocketllm.runtime.load_model", "_from_pretrained", "tokenizer"),
    ("pocketllm.runtime.transformers_plugin", "layout_for", "modules built (transformers)"),
    ("pocketllm.runtime.transformers_plugin", "take_over_missing", "parameters replaced by packed ones"),
    ("pocketllm.runtime.transformers_plugin", "give_back_missing", "dense tensors read (transformers)"),
    ("pocketllm.runtime.transformers_plugin", "compute_weights", "packed tensors mapped"),
    ("pocketllm.runtime.transformers_plugin", "run_experts_one_by_one", "tables and bands made"),
)
"""Functions whose first call ends a stage, and the stage."""
DENSE = (
    ("pocketllm.source.folder", "read_config", "nothing"),
    ("pocketllm.source.folder", "model_class", "configuration"),
    ("pocketllm.source.folder", "read_tokenizer", "modules built, tensors mapped (transformers)"),
)
REST = "rest, and waiting for the hash"


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Clock:
    """Stages as they pass."""

    def __init__(self) -> None:
        self.began, self.before, self.stages = time.perf_counter(), resident(), list[dict[str, Any]]()

    def stage(self, name: str) -> None:
        """End a stage, once."""
        if name not in [stage["name"] for stage in self.stages]:
            done = time.perf_counter() - self.began - sum(stage["seconds"] for stage in self.stages)
            self.stages.append({"name": name, "seconds": done, "bytes": resident() - self.before})

    def watch(self, module: str, function: str, name: str) -> None:
        """End a stage whenever a function is called."""
        owner = sys.modules[module]
        original: Callable[..., Any] = getattr(owner, function)

        def called(*arguments: Any, **options: Any) -> Any:
            self.stage(name)
            return original(*arguments, **options)

        setattr(owner, function, called)


def child(model: str, mode: str) -> None:
    """One run in this process; prints JSON."""
    import torch

    import pocketllm
    from pocketllm.evaluate.own_process import import_all, peak_bytes
    from pocketllm.runtime import transformers_plugin  # noqa: F401
    from pocketllm.source import folder as dense, load_dense, resolve

    torch.set_num_threads(THREADS)
    folder = resolve(model)
    import_all(str(folder))
    base, clock = peak_bytes("cpu", forget=True), Clock()
    for entry in PACKED if mode == "packed" else DENSE:
        clock.watch(*entry)
    clock.began = time.perf_counter()
    if mode == "packed":
        loaded, _ = pocketllm.load(folder, dtype=torch.bfloat16)
    else:
        loaded = load_dense(folder, torch.bfloat16)
        dense.read_tokenizer(folder, False)
    clock.stage(REST if mode == "packed" else "tokenizer")
    seconds = time.perf_counter() - clock.began
    with torch.inference_mode():
        loaded(torch.tensor([[5]]))
    first = time.perf_counter() - clock.began
    found = {"stages": clock.stages, "seconds": seconds, "first_token_seconds": first}
    print(json.dumps({**found, "peak_bytes": peak_bytes("cpu") - base}))


def median(runs: list[Any]) -> Any:
    """One run of the medians of several."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: median([run[key] for run in runs]) for key in first}
    if isinstance(first, list):
        return [median(list(same)) for same in zip(*runs, strict=True)]
    return first if isinstance(first, str) else type(first)(statistics.median(runs))


def main() -> None:
    """Measure and write."""
    models = {"packed": sys.argv[1], "checkpoint": MODEL}
    runs: dict[str, list[Any]] = {mode: [] for mode in models}
    for _ in range(ROUNDS):
        for mode, model in models.items():
            command = [sys.executable, __file__, "child", model, mode]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
    nbytes = sum(path.stat().st_size for path in Path(models["packed"]).glob("*.safetensors"))
    values = {"model": MODEL, "rounds": ROUNDS, "weight_file_bytes": nbytes, "load": os.getloadavg()[2]}
    found = {mode: median(each) for mode, each in runs.items()}
    save("load_time", "python benchmarks/load_time.py FOLDER", {**values, "runs": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:4])
    else:
        main()
