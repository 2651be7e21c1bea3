"""Load a model in a separate process and time it, so that no measurement benefits from earlier ones.

python -m pocketllm.studies.measure.probe '{"folder": …, "mode": …}'   # prints one JSON object
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import LoadError
from pocketllm.evaluate import import_all, peak_bytes

DENSE = "dense checkpoint"


@dataclass(frozen=True)
class Probe:
    """The job of a process.

    folder: of the model. mode: DENSE (not compressed), or as `pocketllm.load` has it.
    short, long: tokens of the two prompts. new_tokens: most that are generated after the short one.
    budget_seconds: generates fewer where one token takes longer than that allows.
    """

    folder: str
    mode: str
    device: str
    threads: int
    short: int
    long: int
    new_tokens: int
    budget_seconds: float


def run(probe: Probe) -> dict[str, float]:
    """Run a probe in a new process; returns the result of `measure`.

    Raises:
        LoadError: the process failed; the message ends with its last words.
    """
    command = [sys.executable, "-m", "pocketllm.studies.measure.probe", json.dumps(asdict(probe))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LoadError(f"{probe.folder}: cannot be measured in mode {probe.mode!r} ({last})")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(probe: Probe) -> dict[str, float]:
    """In this process: load, first token, speed, memory.

    Returns:
        load_seconds; first_seconds: the first call after loading, for one token after the short prompt;
        long_seconds: for one token after the long prompt; token_seconds: for each token that follows the first
        one, tokens of them; each beside `…_cpu_seconds`, what the processors worked for it, which other work
        on the machine changes little. loaded_bytes, peak_bytes: most memory held until the model is loaded
        and until the end, beyond what the process held before (on a GPU: what torch held there).
    """
    import torch

    from pocketllm import generate
    from pocketllm.text import default_text

    torch.set_num_threads(probe.threads)
    if probe.device == "cuda":
        torch.zeros(1, device="cuda")  # starts it up
    import_all(probe.folder)
    base = peak_bytes(probe.device, forget=True)
    clock = _Clock(probe.device)
    model, tokenizer = _load(probe)
    found = clock.named("load")
    found["loaded_bytes"] = peak_bytes(probe.device) - base
    ids = tokenizer(default_text(held_out=True)[: 16 * probe.long], verbose=False)["input_ids"]
    short, long = tokenizer.decode(ids[: probe.short]), tokenizer.decode(ids[: probe.long])

    def timed(name: str, prompt: str, tokens: int) -> tuple[dict[str, float], int]:
        clock = _Clock(probe.device)
        done = generate(model, tokenizer, prompt, tokens)
        return clock.named(name), done.tokens

    found |= timed("first", short, 1)[0]
    again = timed("token", short, 1)[0]
    wanted = max(1, min(probe.new_tokens, int(probe.budget_seconds / again["token_seconds"])))
    more, made = timed("token", short, 1 + wanted)
    found |= {key: max(1e-6, more[key] - again[key]) / max(1, made - 1) for key in again}
    found |= timed("long", long, 1)[0]
    return {**found, "tokens": made - 1, "peak_bytes": peak_bytes(probe.device) - base}


class _Clock:
    """Seconds since it was made: on the wall, and of work by the processors."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def named(self, name: str) -> dict[str, float]:
        """NAME_seconds and NAME_cpu_seconds."""
        wall, cpu = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return {f"{name}_seconds": wall, f"{name}_cpu_seconds": cpu}


def _load(probe: Probe) -> tuple[Any, Any]:
    import pocketllm
    from pocketllm.source import load_dense, need_tokenizer

    placed = "cuda" if probe.device == "cuda" else None
    if probe.mode != DENSE:
        return pocketllm.load(probe.folder, mode=probe.mode, device_map=placed)
    folder = Path(probe.folder)
    return load_dense(folder, device_map=placed), need_tokenizer(folder)


if __name__ == "__main__":
    print(json.dumps(measure(Probe(**json.loads(sys.argv[1])))))
