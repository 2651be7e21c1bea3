"""Whether a static cache and torch.compile pay when tokens are generated on a CPU: SmolLM2-135M, packed and dense.

    python benchmarks/compiled_generation.py FOLDER

FOLDER is SmolLM2-135M compressed. 64 new tokens after a short prompt, greedily, by transformers' `generate`; every
run is a process of its own. The first generation includes compiling, the best of three more is the speed; a second
process finds compiled code in torch's cache. Writes results/compiled_generation.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import quiet, save

MODEL, NEW_TOKENS, THREADS, PROMPT = "builtin:smollm2-135m", 64, 2, "The river"
WAYS = ("as it is", "static cache", "static cache, compiled", "static cache, compiled before")


def child(folder: str, mode: str, way: str) -> None:
    """One run in this process; prints JSON."""
    quiet()
    import torch
    from transformers import CompileConfig

    import pocketllm

    torch.set_num_threads(THREADS)
    model, tokenizer = pocketllm.load(folder, mode=mode, dtype=torch.bfloat16)
    given = tokenizer(PROMPT, return_tensors="pt")
    how: dict[str, Any] = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    if way != WAYS[0]:
        how |= {"cache_implementation": "static", "disable_compile": "compiled" not in way}
    if "compiled" in way:
        config = CompileConfig(fullgraph=False, mode="default")
        config._compile_all_devices = True
        how["compile_config"] = config
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        model.generate(**given, **how)
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"first_seconds": seconds[0], "tokens_per_second": NEW_TOKENS / min(seconds[1:])}))


def main() -> None:
    """Measure and write."""
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        for mode in ("packed", "dense"):
            for way in WAYS:
                command = [sys.executable, __file__, "child", sys.argv[1], mode, way]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, env=environment, check=False
                )
                if done.returncode:
                    sys.exit(f"{mode}, {way}: failed")
                runs.setdefault(mode, {})[way] = json.loads(done.stdout.splitlines()[-1])
                print(mode, way, runs[mode][way], flush=True)
    values = {"model": MODEL, "new_tokens": NEW_TOKENS, "load": os.getloadavg()[2], "runs": runs}
    save("compiled_generation", "python benchmarks/compiled_generation.py FOLDER", values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:5])
    else:
        main()
