"""Speed of `generate` on SmolLM2-135M with a growing cache, a static one, and a compiled forward pass.

    python benchmarks/compiled.py FOLDER

FOLDER is SmolLM2-135M compressed; it runs packed, next to the dense checkpoint. Every run is a process of its own.
Compiling (torch.compile as `generate` calls it: full graph, static cache) is timed in a process without a cache and in
another one with the cache of the first. Writes results/compiled.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import quiet, save

MODEL, THREADS, NEW_TOKENS = "builtin:smollm2-135m", 2, 64
WAYS = ("dynamic", "static", "compiled", "compiled again")


def options(way: str) -> dict[str, Any]:
    """Arguments of `generate` for a way to run it."""
    from transformers import CompileConfig

    if way == "dynamic":
        return {}
    if way == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # else only on GPUs
    return {"cache_implementation": "static", "compile_config": config}


def child(model: str, way: str) -> None:
    """One run in this process; prints JSON."""
    import torch

    import pocketllm
    from pocketllm.evaluate.own_process import import_all, peak_bytes
    from pocketllm.format import is_compressed
    from pocketllm.source import load_dense, resolve

    quiet()
    torch.set_num_threads(THREADS)
    folder = resolve(model)
    import_all(str(folder))
    base = peak_bytes("cpu", forget=True)
    packed = is_compressed(folder)
    loaded = pocketllm.load(folder, dtype=torch.bfloat16)[0] if packed else load_dense(folder, torch.bfloat16)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    seconds = []
    for _ in range(3):  # the first one also compiles
        started = time.perf_counter()
        loaded.generate(torch.arange(5, 13)[None], **length, **options(way))
        seconds.append(time.perf_counter() - started)
    usual = min(seconds[1:])
    found = {"tokens_per_second": NEW_TOKENS / usual, "first_seconds": seconds[0] - usual}
    print(json.dumps({**found, "peak_bytes": peak_bytes("cpu") - base}))


def run(model: str, way: str, cache: str) -> dict[str, float]:
    """One run in a process of its own. cache: folder of compiled code."""
    command = [sys.executable, __file__, "child", model, way]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and write after every run: compiling takes a minute each."""
    models = {"packed": sys.argv[1], "checkpoint": MODEL}
    jobs = [(name, way) for way in WAYS[:2] for name in models] + [
        (name, way) for name in models for way in WAYS[2:]
    ]
    shared = {"model": MODEL, "threads": THREADS, "new_tokens": NEW_TOKENS}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, way in jobs:
            found = run(models[name], way, str(Path(scratch, name)))
            runs.append({"model": name, "way": way, **found})
            values = {**shared, "load": os.getloadavg()[2], "runs": runs}
            save("compiled", "python benchmarks/compiled.py FOLDER", values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:4])
    else:
        main()
