"""Throughput of `pocketllm serve` at 1, 8 and 32 requests: SmolLM2-135M packed, decoded, and not compressed.

    python benchmarks/serving.py [FOLDER]

FOLDER is SmolLM2-135M compressed as by benchmarks/runtime.py; without it, it is made first, in some fifteen minutes.
All servers run at once, each a process of its own, and are asked in turn; who is not asked waits without work.
Writes results/serving.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import save
from runtime import MODEL, compressed

REQUESTS = (1, 8, 32)
ROUNDS = 7
NEW_TOKENS = 32
CACHE_GB = 0.1
PROMPT = "The town of {} lies on a river. Its market is held every Tuesday, and people come from"
TOWNS = ["Alder", "Birch", "Cedar", "Damson", "Elm", "Fir", "Gorse", "Hazel"]


@contextlib.contextmanager
def serving(model: str, mode: str) -> Iterator[dict[str, Any]]:
    """A server's process and what it says of itself."""
    command = [sys.executable, "-m", "pocketllm", "serve", model, "--port", "0", "--json", "--quiet"]
    command += ["--mode", mode, "--dtype", "bfloat16", "--kv-cache-gb", str(CACHE_GB)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                sys.exit(f"{' '.join(command)}: ended before it answered")
            yield {**json.loads(line), "process": process.pid}
        finally:
            process.terminate()


async def ask(server: dict[str, Any], requests: int) -> float:
    """New tokens per second, over all requests, which are sent at once."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=server["url"], api_key="none", max_retries=0, timeout=600) as client:

        async def one(number: int) -> int:
            prompt = PROMPT.format(f"{TOWNS[number % len(TOWNS)]} {number}")
            done = await client.completions.create(
                model=server["model"], prompt=prompt, max_tokens=NEW_TOKENS, temperature=0
            )
            return int(done.usage.completion_tokens)

        started = time.perf_counter()
        tokens = await asyncio.gather(*(one(number) for number in range(requests)))
        return sum(tokens) / (time.perf_counter() - started)


def peak_bytes(process: int) -> int:
    """Most memory that a process has held, resident."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def measure(folder: str) -> list[dict[str, Any]]:
    """Every server at every number of requests: tokens per second in each round, and the memory at the end."""
    wanted = {"packed": (folder, "packed"), "dense": (folder, "dense"), "checkpoint": (MODEL, "auto")}
    speeds: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving(*each)) for name, each in wanted.items()}
        for server in servers.values():
            asyncio.run(ask(server, 1))
        for requests in REQUESTS * ROUNDS:
            for name, server in servers.items():
                speeds.setdefault((name, requests), []).append(asyncio.run(ask(server, requests)))
        peaks = {name: peak_bytes(server["process"]) for name, server in servers.items()}
    return [
        {
            "mode": name,
            "tokens_per_second": {n: speeds[name, n] for n in REQUESTS},
            "peak_memory_bytes": peaks[name],
        }
        for name in wanted
    ]


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, form = compressed(Path(scratch))
        runs = measure(folder)
    values = {
        "rounds": ROUNDS,
        "new_tokens": NEW_TOKENS,
        "kv_cache_gb": CACHE_GB,
        "load": os.getloadavg()[2],
        "runs": runs,
    }
    save("serving", "python benchmarks/serving.py", {"model": MODEL, "compressed": form, **values})


if __name__ == "__main__":
    main()
