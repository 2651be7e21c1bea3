"""Speed and memory of models, each measured in a separate process.

    python -m pocketllm.evaluate.bench_runs '{"model": …, "mode": …, "config": …}'   # one run in this process

Two tests, as llama-bench has them: a prompt of random tokens in one forward pass, and tokens one by one, greedily,
after a single one.
"""

from __future__ import annotations

import inspect
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketllm.errors import ConfigError, LoadError

CHECKPOINT = "checkpoint"
MODES = ("packed", "dense", "auto")


@dataclass(frozen=True)
class BenchConfig:
    """What is run.

    prompt_tokens, new_tokens: length of the two tests. threads: of the CPU; 0 for all cores. rounds: processes for
    each model and mode. dtype: to compute in.

    Raises:
        ConfigError: a number out of range, or an unknown dtype.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    threads: int = 0
    rounds: int = 3
    dtype: str = "bfloat16"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if not 0 <= self.threads <= 1024:
            raise ConfigError(f"threads: got {self.threads}, wanted 0 (all cores) to 1024")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype: got {self.dtype!r}, wanted float32, bfloat16 or float16")


@dataclass(frozen=True)
class BenchRun:
    """One model in one mode; medians over the rounds.

    mode: packed or dense, as it ran, or `checkpoint` for a dense model. load_seconds: of model and tokenizer.
    peak_memory_bytes: most resident memory beyond that of a process that has imported the same libraries.
    weights_bytes: of the parameters and buffers in memory.
    """

    model: str
    mode: str
    dtype: str
    load_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float
    peak_memory_bytes: int
    weights_bytes: int
    threads: int


def bench(
    models: Sequence[str],
    modes: Sequence[str],
    config: BenchConfig,
    against: str | None = None,
    on_progress: Callable[[float, str], None] = lambda share, what: None,
) -> list[BenchRun]:
    """Run every compressed model in every mode, and a dense model, in turn.

    Args:
        models: folders or hub ids of compressed models. modes: of `MODES`. against: a dense model.
        on_progress: called with the finished share and the next run.

    Raises:
        ConfigError: no model, an unknown mode, a compressed model as `against`, a dense one in `models`, or one with
            too few positions.
        LoadError: a process failed; the message ends with its last line of output.
    """
    if not models and against is None:
        raise ConfigError("bench: got no model; name a compressed model, or a dense one with --against")
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong or not modes:
        raise ConfigError(f"mode: got {', '.join(wrong) or 'none'}, wanted one or more of {', '.join(MODES)}")
    jobs = [(model, mode) for model in models for mode in modes]
    jobs += [] if against is None else [(against, CHECKPOINT)]
    for model, mode in jobs:
        _check(model, mode, config)
    found: dict[tuple[str, str], list[BenchRun]] = {job: [] for job in jobs}
    for number in range(config.rounds):
        for at, job in enumerate(jobs):
            on_progress((number + at / len(jobs)) / config.rounds, f"{job[0]}, {job[1]}")
            found[job].append(_run(*job, config))
    return [_median(runs) for runs in found.values()]


def _check(model: str, mode: str, config: BenchConfig) -> None:
    from pocketllm.format import check_dense, is_compressed
    from pocketllm.source import resolve
    from pocketllm.source.folder import read_config
    from pocketllm.text.vocabulary import check_positions

    folder = resolve(model)
    if mode == CHECKPOINT:
        check_dense(folder, model, "with --against")
    elif not is_compressed(folder):
        raise ConfigError(f"{model}: is not a compressed model; name a dense one with --against")
    most = max(config.prompt_tokens, 1 + config.new_tokens)
    check_positions(read_config(folder, config.trust_remote_code), most, model)


def _run(model: str, mode: str, config: BenchConfig) -> BenchRun:
    job = json.dumps({"model": model, "mode": mode, "config": asdict(config)})
    command = [sys.executable, "-m", "pocketllm.evaluate.bench_runs", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LoadError(f"{model}: cannot be run in mode {mode} ({last})")
    return BenchRun(**json.loads(done.stdout.splitlines()[-1]))


def _median(runs: list[BenchRun]) -> BenchRun:
    def middle(name: str) -> Any:
        values = [getattr(run, name) for run in runs]
        return values[0] if isinstance(values[0], str) else type(values[0])(statistics.median(values))

    return BenchRun(**{name: middle(name) for name in asdict(runs[0])})


def run_here(model: str, mode: str, config: BenchConfig) -> BenchRun:
    """One run in this process; see `BenchRun`."""
    import torch

    from pocketllm.evaluate.own_process import import_all, peak_bytes
    from pocketllm.source import resolve

    if config.threads:
        torch.set_num_threads(config.threads)
    folder, dtype = resolve(model), getattr(torch, config.dtype)
    import_all(str(folder))
    base = peak_bytes("cpu", forget=True)
    started = time.perf_counter()
    loaded, _ = _loaded(folder, mode, dtype, config.trust_remote_code)
    load_seconds = time.perf_counter() - started
    prompt, token = _speeds(loaded, config)
    return BenchRun(
        model=model,
        mode=mode if mode == CHECKPOINT else "packed" if _is_packed(loaded) else "dense",
        dtype=config.dtype,
        load_seconds=load_seconds,
        prompt_tokens_per_second=prompt,
        tokens_per_second=token,
        peak_memory_bytes=peak_bytes("cpu") - base,
        weights_bytes=_weights_bytes(loaded),
        threads=torch.get_num_threads(),
    )


def _loaded(folder: Path, mode: str, dtype: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import pocketllm
    from pocketllm.source import load_dense
    from pocketllm.source.folder import read_tokenizer

    if mode == CHECKPOINT:
        return load_dense(folder, dtype, trust_remote_code), read_tokenizer(folder, trust_remote_code)
    return pocketllm.load(folder, mode=mode, dtype=dtype, trust_remote_code=trust_remote_code)


def _speeds(model: Any, config: BenchConfig) -> tuple[float, float]:
    """Prompt tokens and new tokens per second; the better of two runs, so that the first absorbs one-time costs."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.randint(0, size, (1, config.prompt_tokens), generator=torch.Generator().manual_seed(0))

    def prompt() -> float:
        started = time.perf_counter()
        model(ids, use_cache=True, **last)
        return config.prompt_tokens / (time.perf_counter() - started)

    def tokens() -> float:
        out = model(ids[:, :1], use_cache=True)
        started = time.perf_counter()
        for _ in range(config.new_tokens):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return config.new_tokens / (time.perf_counter() - started)

    with torch.inference_mode():
        return max(prompt(), prompt()), max(tokens(), tokens())


def _is_packed(model: Any) -> bool:
    from pocketllm.runtime.layers import packed_matrices

    return bool(packed_matrices(model))


def _weights_bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(asdict(run_here(job["model"], job["mode"], BenchConfig(**job["config"])))))
