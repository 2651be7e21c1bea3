"""Time and memory to plan the compression of very large models, over checkpoints that have headers and no data.

The plan at 3 bits per weight, with calibration as by default: every matrix, its bits, and the exact size of the result;
the calibration text is read, and sensitivities are not measured. Each model is planned in a process of its own, and its
checkpoint (a sparse file, see large_models.py, with the tokenizer of SmolLM2-135M) is written before the clock starts.
Limits: a minute and 2 GB for 70B.

python benchmarks/large_plan.py            # all, into results/large_plan.json
python benchmarks/large_plan.py llama-3.1-70b  # some, shown
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import quiet, save
from large_models import BPW, Large, _sizes, sparse_checkpoint

from pocketllm.source.builtin import fetch

SECONDS, BYTES = 60.0, 2e9
MODELS = {
    "llama-3.1-8b": Large("LlamaConfig", _sizes(4096, 14336, 32, 32, 8, 128256)),
    "llama-3.1-70b": Large("LlamaConfig", _sizes(8192, 28672, 80, 64, 8, 128256)),
    "llama-3.1-405b": Large("LlamaConfig", _sizes(16384, 53248, 126, 128, 8, 128256)),
    "moe-1t": Large(  # the dimensions of Kimi K2
        "DeepseekV3Config",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "n_routed_experts": 384}
        | {"num_attention_heads": 64, "num_key_value_heads": 64, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "vocab_size": 163840},
    ),
}


def plan(folder: str) -> dict[str, Any]:
    """Plan the checkpoint in a folder, in this process."""
    import dataclasses

    import pocketllm

    started = time.monotonic()
    config = dataclasses.replace(pocketllm.preset("calibrated-8x"), target_bpw=BPW)
    report = pocketllm.dry_run(folder, config)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": sum(math.prod(matrix.shape) for matrix in report.matrices),
        "matrices": len(report.matrices),
        "bytes_on_disk": report.bytes_on_disk,
        "bpw_matrices": report.bpw_matrices,
    }


def measured(large: Large) -> dict[str, Any]:
    """Write the checkpoint and plan it in a process of its own."""
    import transformers

    with tempfile.TemporaryDirectory() as place:
        dense = sparse_checkpoint(getattr(transformers, large.config)(**large.settings), Path(place))
        for path in fetch("builtin:smollm2-135m").glob("*token*"):
            shutil.copy(path, place)
        command = [sys.executable, __file__, "--plan", place]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    is_within = found["seconds"] <= SECONDS and found["peak_memory_bytes"] <= BYTES
    return {"dense_bytes": dense, **found, "within_limits": is_within}


def main() -> None:
    quiet()
    if sys.argv[1:2] == ["--plan"]:
        print(json.dumps(plan(sys.argv[2])))
        return
    found = {name: measured(MODELS[name]) for name in sys.argv[1:] or MODELS}
    print(json.dumps(found, indent=1))
    if not sys.argv[1:]:
        save("large_plan", "python benchmarks/large_plan.py", {"bpw": BPW, "models": found})


if __name__ == "__main__":
    main()
