"""The cost in KL of the type that packed layers round their inputs to, for prompts of more than 64 tokens.

    POCKETLLM_DATA=... python benchmarks/activation_types.py FOLDER

FOLDER is a compressed SmolLM2-135M with a hashed trellis. KL(decoded || run): the reference is the same model decoded
at load and run in float32, so that what is measured is rounding alone. WikiText-2 validation text, context 1024.
int8 is what runs on processors with AVX-512 VBMI; the kernels for other processors take bfloat16, which
`POCKETLLM_ISA=avx2` chooses. Writes results/activation_types.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import data_file, quiet, save

VALIDATION = ("wikitext2", "wiki.valid.near_raw.txt")
CONTEXT, WINDOWS = 1024, 4
RUNS = {
    "decoded, bfloat16": ("dense", "bfloat16", ""),
    "packed, float32": ("packed", "float32", ""),
    "packed, bfloat16": ("packed", "bfloat16", "avx2"),
    "packed, int8": ("packed", "bfloat16", ""),
}
"""Mode, dtype of the model, and instruction set if not the best."""


def child(folder: str, name: str) -> None:
    """One run in this process; prints JSON."""
    quiet()
    import torch

    import pocketllm
    from pocketllm.evaluate.kl import text_divergence
    from pocketllm.text.read import read_text

    mode, dtype, _ = RUNS[name]
    reference, tokenizer = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    model, _ = pocketllm.load(folder, mode=mode, dtype=getattr(torch, dtype))
    found = text_divergence(model, reference, tokenizer, read_text(data_file(*VALIDATION)), CONTEXT, WINDOWS)
    figures = ("kl", "kl_stderr", "perplexity", "reference_perplexity", "top1_agreement")
    print(json.dumps({figure: getattr(found, figure) for figure in figures}))


def main() -> None:
    """Measure and write."""
    folder, runs = sys.argv[1], dict[str, Any]()
    for name, (_, _, isa) in RUNS.items():
        environment = {**os.environ, "POCKETLLM_ISA": isa}
        command = [sys.executable, __file__, "child", folder, name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        runs[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, runs[name], flush=True)
    report = json.loads(Path(folder, "pocketllm.json").read_text())
    values = {"bpw_blocks": report["bpw_blocks"], "text": "WikiText-2 validation", "windows": WINDOWS}
    command_line = "POCKETLLM_DATA=... python benchmarks/activation_types.py FOLDER"
    save("activation_types", command_line, {**values, "context": CONTEXT, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:4])
    else:
        main()
