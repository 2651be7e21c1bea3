"""Load time, peak memory and speed of both loading modes, each in a process of its own.

    POCKETLLM_DATA=... python benchmarks/loading.py

Compresses SmolLM2-135M with the preset lookup-8x first. Peak memory is the resident set's (ru_maxrss); `base`
is that of a process which has imported everything and loaded nothing. Writes results/loading.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import data_file, quiet, save

MODEL = "builtin:smollm2-135m"
REPEATS = 3


def child(mode: str, folder: str, text_file: str) -> None:
    """Load one way, evaluate, generate; print facts as JSON."""
    quiet()
    import resource
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pocketllm
    from pocketllm.evaluate.generate import generate
    from pocketllm.evaluate.perplexity import perplexity
    from pocketllm.text.read import read_text

    pocketllm.load  # noqa: B018 - import what loading imports before the clock starts

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    facts = {"base_mib": peak()}
    started = time.perf_counter()
    if mode == "bf16 checkpoint":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif mode != "nothing":
        model, tokenizer = pocketllm.load(folder, mode=mode, dtype=torch.float32)
    facts["load_seconds"] = time.perf_counter() - started
    facts["peak_after_load_mib"] = peak()
    if mode != "nothing":
        text = read_text(text_file)
        started = time.perf_counter()
        facts["perplexity"] = perplexity(model, tokenizer, text, 1024, 2).perplexity
        facts["seconds_2_windows"] = time.perf_counter() - started
        facts["tokens_per_second"] = generate(model, tokenizer, "The capital of France is").tokens_per_second
        facts["peak_mib"] = peak()
    print(json.dumps(facts))


def main() -> None:
    """Measure every mode, alternating, and keep the medians."""
    import pocketllm
    from pocketllm.source.builtin import fetch

    text = str(data_file("wikitext2", "wiki.test.raw"))
    modes = {"nothing": "", "bf16 checkpoint": str(fetch(MODEL)), "dense": "", "packed": ""}
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "out")
        pocketllm.compress(MODEL, pocketllm.preset("lookup-8x"), folder)
        for _ in range(REPEATS):
            for mode, source in modes.items():
                command = [sys.executable, __file__, "child", mode, source or folder, text]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        mode: {key: sorted(r[key] for r in found)[len(found) // 2] for key in found[0]}
        for mode, found in runs.items()
    }
    print(json.dumps(medians, indent=1))
    save("loading", "python benchmarks/loading.py", {"model": MODEL, "dtype": "float32", "medians": medians})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:5])
    else:
        main()
