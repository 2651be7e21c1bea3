"""One run of llama.cpp in this process, measured as `pocketllm bench` measures; runtime.py starts it.

    python benchmarks/llama_cpp.py FILE.gguf THREADS PROMPT_TOKENS NEW_TOKENS

Needs `xllamacpp` (llama.cpp in a wheel) and nothing else of this repository: an environment of its own will do.
Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def timings(server: Any, prompt: list[int], new: int) -> dict[str, float]:
    """What llama.cpp says of one greedy completion."""
    request = {
        "prompt": prompt,
        "n_predict": new,
        "temperature": 0,
        "cache_prompt": False,
        "ignore_eos": True,
    }
    found: dict[str, float] = server.handle_completions(request)["timings"]
    return found


def main() -> None:
    """Measure and print."""
    import xllamacpp

    file, (threads, prompt, new) = sys.argv[1], map(int, sys.argv[2:])
    base, started = peak_bytes(), time.perf_counter()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_ctx, parameters.n_parallel = 1024, 1
    server = xllamacpp.Server(parameters)
    load_seconds = time.perf_counter() - started
    ids = random.Random(0).choices(range(1000, 40000), k=prompt)  # words, no marks of a chat
    many = max(timings(server, ids, 1)["prompt_per_second"] for _ in range(2))
    single = max(timings(server, ids[:1], new)["predicted_per_second"] for _ in range(2))
    run = {
        "load_seconds": load_seconds,
        "prompt_tokens_per_second": many,
        "tokens_per_second": single,
        "peak_memory_bytes": peak_bytes() - base,
        "weights_bytes": Path(file).stat().st_size,
        "threads": threads,
    }
    print(json.dumps(run))


if __name__ == "__main__":
    main()
