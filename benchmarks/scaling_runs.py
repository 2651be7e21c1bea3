"""Compress one small random model with 1, 2 and 4 processes on a CPU: bytes, work of each stage, traffic, memory.

Written is the processor time of the busiest rank by stage, which does not depend on what else the machine does;
seconds on the clock would need a core for each process. Into results/scaling_runs.json, for `scaling.py --check`.

python benchmarks/scaling_runs.py          # a model with two blocks of width 256
python benchmarks/scaling_runs.py --small  # a tiny one, shown
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import quiet, save

SIZES = (1, 2, 4)
_BLOCKS, _HIDDEN, _INNER, _VOCABULARY = 2, 256, 704, 2048
_TOKENS, _MEASURED, _CONTEXT = 16384, 4096, 512


@dataclasses.dataclass
class Clock:
    """Processor seconds by stage; a stage within another does not count for it."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    inner: list[float] = dataclasses.field(default_factory=lambda: [0.0])

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count the time of a function or method as a stage."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*arguments: Any, **settings: Any) -> Any:
            started = time.process_time()
            self.inner.append(0.0)
            try:
                return original(*arguments, **settings)
            finally:
                total = time.process_time() - started
                self.seconds[stage] += total - self.inner.pop()
                self.inner[-1] += total

        setattr(owner, name, timed)


def watched() -> tuple[Clock, dict[str, int]]:
    """Time the stages of a run in this process, and count the bytes that it sends and receives."""
    import torch.distributed as dist

    from pocketllm.calibrate import blocks, sensitivity, window_sums
    from pocketllm.compression import encode_blocks, matrix_encoder

    clock, exchanged = Clock(), {"bytes": 0}
    clock.watch(sensitivity, "block_backward", "passes")
    clock.watch(blocks.BlockStream, "run", "passes")
    clock.watch(blocks.BlockStream, "inputs", "passes")
    clock.watch(window_sums, "add_square", "products")
    clock.watch(sensitivity, "_gain", "factors of measuring")
    clock.watch(sensitivity._Blocks, "_measure_outputs", "factors of measuring")
    clock.watch(encode_blocks, "_input_hessians", "factors")
    clock.watch(matrix_encoder.MatrixEncoder, "encode", "encode")

    def counted(name: str) -> None:
        original: Callable[..., Any] = getattr(dist, name)

        def call(tensor: Any, *arguments: Any, **settings: Any) -> Any:
            exchanged["bytes"] += tensor.numel() * tensor.element_size()
            return original(tensor, *arguments, **settings)

        setattr(dist, name, call)

    for name in ("isend", "recv", "broadcast"):
        counted(name)
    return clock, exchanged


def child(folder: str) -> None:
    """One of the processes."""
    import pocketllm
    from pocketllm.ranks import launched

    clock, exchanged = watched()
    place, (rank, size) = Path(folder), launched()
    settings = json.loads((place / "settings.json").read_text())
    base = pocketllm.preset("calibrated-8x")
    assert base.calibration is not None
    text = (str(place / "text.txt"),)
    calibration = dataclasses.replace(base.calibration, texts=text, **settings)
    config = dataclasses.replace(base, target_bpw=3.0, calibration=calibration)
    started = time.monotonic()
    pocketllm.compress(
        place / "dense", config, place / f"of-{size}", calibration_folder=place / f"measured-{size}"
    )
    found = {
        "seconds": clock.seconds,
        "processor_seconds": time.process_time(),
        "clock_seconds": time.monotonic() - started,
        "bytes_exchanged": exchanged["bytes"],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (place / f"rank-{size}-{rank}.json").write_text(json.dumps(found))


def run(place: Path, size: int) -> dict[str, Any]:
    """Compress with some processes."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    )
    command = [sys.executable, *launcher, __file__, "--child", str(place)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [json.loads((place / f"rank-{size}-{rank}.json").read_text()) for rank in range(size)]
    digest = hashlib.sha256()
    for file in sorted((place / f"of-{size}").iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    names = ranks[0]["seconds"]
    return {
        "sha256": digest.hexdigest(),
        "busiest_seconds": {name: max(rank["seconds"].get(name, 0.0) for rank in ranks) for name in names},
        "ranks": ranks,
    }


def main() -> None:
    quiet()
    if "--child" in sys.argv:
        child(sys.argv[2])
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests import tiny

    is_small = "--small" in sys.argv
    shape = {"hidden_size": _HIDDEN, "intermediate_size": _INNER, "num_hidden_layers": _BLOCKS}
    settings = {"tokens": _TOKENS, "sensitivity_tokens": _MEASURED, "context": _CONTEXT}
    if is_small:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        settings = {"tokens": 1024, "sensitivity_tokens": 256, "context": 64}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": _VOCABULARY}
        LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(place / "dense")
        tiny.tokenizer().save_pretrained(place / "dense")
        source = (Path(os.__file__).parent / "argparse.py").read_text(encoding="utf-8")  # any text
        (place / "text.txt").write_text(source, encoding="utf-8")
        (place / "settings.json").write_text(json.dumps(settings))
        runs = {str(size): run(place, size) for size in SIZES}
    assert len({entry["sha256"] for entry in runs.values()}) == 1, "the bytes differ"
    print(json.dumps({size: entry["busiest_seconds"] for size, entry in runs.items()}, indent=1))
    if not is_small:
        body = {"model": {**shape, **heads}, "settings": settings, "runs": runs}
        save("scaling_runs", "python benchmarks/scaling_runs.py", body)


if __name__ == "__main__":
    main()
