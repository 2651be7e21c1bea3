"""Load a model in a separate process and time it, so that no measurement benefits from earlier ones.

python -m pocketllm.studies.measure.probe '{"folder": …, "mode": …}'   # prints one JSON object
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import LoadError

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
    _import_all(probe.folder)
    base = _peak_bytes(probe.device, forget=True)
    clock = _Clock(probe.device)
    model, tokenizer = _load(probe)
    found = clock.named("load")
    found["loaded_bytes"] = _peak_bytes(probe.device) - base
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
    return {**found, "tokens": made - 1, "peak_bytes": _peak_bytes(probe.device) - base}


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


def _import_all(folder: str) -> None:
    """Import the modules that loading needs, before time and memory are measured."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import pocketllm
    from pocketllm.source import need_tokenizer

    pocketllm.load  # noqa: B018
    need_tokenizer(Path(folder))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def _load(probe: Probe) -> tuple[Any, Any]:
    import pocketllm
    from pocketllm.source import load_dense, need_tokenizer

    placed = "cuda" if probe.device == "cuda" else None
    if probe.mode != DENSE:
        return pocketllm.load(probe.folder, mode=probe.mode, device_map=placed)
    folder = Path(probe.folder)
    return load_dense(folder, device_map=placed), need_tokenizer(folder)


def _peak_bytes(device: str, forget: bool = False) -> int:
    """Most memory that this process has held so far: resident, or allocated on the GPU.

    forget: what was held and given back until now does not count any more.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process, too
        if forget:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    print(json.dumps(measure(Probe(**json.loads(sys.argv[1])))))
