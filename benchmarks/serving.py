"""Throughput of `pocketllm serve` at 1, 8 and 32 requests: SmolLM2-135M packed, decoded, and not compressed.

    python benchmarks/serving.py [FOLDER] [--engine transformers|vllm]

FOLDER is SmolLM2-135M compressed as by benchmarks/runtime.py; without it, it is made first, in some fifteen minutes.
All servers run at the same time, each a process of its own, and are asked in turn; who is not asked waits without work.
Writes results/serving.json, or results/serving_vllm.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import save
from runtime import MODEL, compress, form

REQUESTS = (1, 8, 32)
ROUNDS = 7
NEW_TOKENS = 32
CACHE_GB = 0.1
PROMPT = "The town of {} lies on a river. Its market is held every Tuesday, and people come from"
TOWNS = ["Alder", "Birch", "Cedar", "Damson", "Elm", "Fir", "Gorse", "Hazel"]
RESULTS = {"transformers": "serving", "vllm": "serving_vllm"}
LONGEST_START = 300.0  # seconds

Server = dict[str, Any]


@contextlib.contextmanager
def serving(model: str, mode: str, engine: str) -> Iterator[Server]:
    """A server's process, its address, and the name of its model; it may still be starting."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "pocketllm", "serve", model, "--engine", engine, "--port", str(port)]
    command += ["--mode", mode, "--dtype", "bfloat16", "--kv-cache-gb", str(CACHE_GB), "--quiet"]
    name = Path(model).name if Path(model).exists() else model
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield {"url": f"http://127.0.0.1:{port}", "model": name, "process": process}
        finally:
            process.terminate()


def wait_for(server: Server) -> None:
    """Return when a server answers; end the program if it has ended."""
    deadline = time.monotonic() + LONGEST_START
    while time.monotonic() < deadline and server["process"].poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server['url']}/health", timeout=5):
            return
        time.sleep(1)
    sys.exit(f"{' '.join(server['process'].args)}: does not answer")


async def ask(server: Server, requests: int) -> float:
    """New tokens per second, over all requests, which are sent at once."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=f"{server['url']}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:

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
    """Most memory that a process and those it has started have held, resident."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    peaks = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    started = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    return 1024 * sum(map(int, peaks)) + sum(peak_bytes(int(child)) for child in started)


def measure(folder: str, engine: str) -> list[dict[str, Any]]:
    """Every server at every number of requests: tokens per second in each round, and the memory at the end."""
    wanted = {"packed": (folder, "packed"), "dense": (folder, "dense"), "checkpoint": (MODEL, "auto")}
    speeds: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, each in wanted.items():  # in turn: three that start at once take longer than vLLM waits
            servers[name] = stack.enter_context(serving(*each, engine))
            wait_for(servers[name])
            asyncio.run(ask(servers[name], 1))
        for requests in REQUESTS * ROUNDS:
            for name, server in servers.items():
                speeds.setdefault((name, requests), []).append(asyncio.run(ask(server, requests)))
        peaks = {name: peak_bytes(server["process"].pid) for name, server in servers.items()}
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--engine", choices=RESULTS, default="transformers")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or compress(Path(scratch, "smol"))
        runs = measure(folder, chosen.engine)
        facts = {"model": MODEL, "compressed": form(folder), "engine": chosen.engine}
    values = {
        "rounds": ROUNDS,
        "new_tokens": NEW_TOKENS,
        "kv_cache_gb": CACHE_GB,
        "load": os.getloadavg()[0],
        "runs": runs,
    }
    engine = "" if chosen.engine == "transformers" else f" --engine {chosen.engine}"
    save(RESULTS[chosen.engine], f"python benchmarks/serving.py{engine}", {**facts, **values})


if __name__ == "__main__":
    main()
