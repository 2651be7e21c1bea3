"""Throughput of vLLM at 1, 8 and 32 requests: SmolLM2-135M packed, decoded at load, and not compressed.

    PYTHON benchmarks/vllm_serving.py FOLDER

PYTHON is that of the environment that tests/vllm/make_environment.sh makes; FOLDER is SmolLM2-135M compressed as by
benchmarks/runtime.py. Each model runs in a process of its own. Writes results/vllm_serving.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import save

MODEL = "builtin:smollm2-135m"
REQUESTS = (1, 8, 32)
ROUNDS = 5
NEW_TOKENS = 32
PROMPT = "The town of number {} lies on a river. Its market is held every Tuesday, and people come from"


def measure(folder: str, mode: str) -> dict[str, Any]:
    """Tokens per second in each round at every number of requests, and the memory at the end."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    named = {"quantization_config": {"quant_method": "pocketllm", "mode": mode}}
    llm = LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=max(REQUESTS),
        enable_prefix_caching=False,
        hf_overrides={} if mode == "checkpoint" else named,
    )
    asked = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    llm.generate([PROMPT.format(0)] * 2, asked, use_tqdm=False)
    speeds: dict[int, list[float]] = {}
    for requests in REQUESTS * ROUNDS:
        prompts = [PROMPT.format(number) for number in range(requests)]
        started = time.perf_counter()
        done = llm.generate(prompts, asked, use_tqdm=False)
        tokens = sum(len(one.outputs[0].token_ids) for one in done)
        speeds.setdefault(requests, []).append(tokens / (time.perf_counter() - started))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mode": mode, "tokens_per_second": speeds, "peak_memory_bytes": peak}


def main() -> None:
    """Measure in processes of their own, and write."""
    if len(sys.argv) == 3:
        print("RESULT", json.dumps(measure(*sys.argv[1:])))
        return
    import vllm
    from pocketllm.format import read_report
    from pocketllm.source import resolve

    folder, runs = sys.argv[1], []
    for mode in ("packed", "auto", "checkpoint"):
        of = str(resolve(MODEL)) if mode == "checkpoint" else folder
        done = subprocess.run(
            [sys.executable, __file__, of, mode], stdout=subprocess.PIPE, text=True, check=True
        )
        runs.append(json.loads(done.stdout.split("RESULT ")[1]))
    report = read_report(Path(folder))
    values = {
        "model": MODEL,
        "compressed": {"bpw_blocks": report["bpw_blocks"], "bytes_on_disk": report["bytes_on_disk"]},
        "vllm": vllm.__version__,
        "threads": len(os.sched_getaffinity(0)),
        "rounds": ROUNDS,
        "new_tokens": NEW_TOKENS,
        "load": os.getloadavg()[2],
        "runs": runs,
    }
    save("vllm_serving", "python benchmarks/vllm_serving.py FOLDER", values)


if __name__ == "__main__":
    main()
