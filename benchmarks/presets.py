"""The presets on SmolLM2-135M: size, error, perplexity, time. Writes results/presets.json.

    POCKETLLM_DATA=... python benchmarks/presets.py [PRESET ...]

Perplexity: WikiText-2 raw test, context 1024, first 16 windows, evaluated in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import RESULTS, data_file, quiet, save

import pocketllm
from pocketllm.evaluate.perplexity import perplexity, read_text

MODEL = "builtin:smollm2-135m"
CONTEXT, WINDOWS = 1024, 16


def measure(name: str, text: str, folder: Path) -> dict[str, Any]:
    """Compress with one preset, load it back, evaluate."""
    import torch

    report = pocketllm.compress(MODEL, pocketllm.preset(name), folder)
    model, tokenizer = pocketllm.load(folder, dtype=torch.float32)
    found = perplexity(model, tokenizer, text, CONTEXT, WINDOWS)
    kinds: dict[str, list[float]] = defaultdict(list)
    for matrix in report.matrices:
        kinds[matrix.kind].append(matrix.nmse)
    in_blocks = [m for m in report.matrices if "embed" not in m.name and "lm_head" not in m.name]
    return {
        "perplexity": found.perplexity,
        "seconds": report.seconds,
        "bytes_on_disk": report.bytes_on_disk,
        "ratio_files_bf16": report.ratio_files_bf16,
        "ratio_files_fp32": report.ratio_files_fp32,
        "ratio_matrices_fp32": report.ratio_matrices_fp32,
        "ratio_matrices_bf16": report.ratio_matrices_bf16,
        "bpw_matrices": report.bpw_matrices,
        "bpw_blocks": report.bpw_blocks,
        "nmse_blocks": sum(m.nmse for m in in_blocks) / len(in_blocks),
        "nmse_by_kind": {kind: sum(v) / len(v) for kind, v in kinds.items()},
        "least_utilization": min(m.codebook_utilization for m in report.matrices),
        "codecs": sorted({(m.vector_len, m.codebook_size) for m in report.matrices}),
        "config": report.config,
    }


def dense(text: str) -> dict[str, Any]:
    """The model as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocketllm.source.builtin import fetch
    from pocketllm.format.checkpoint import folder_bytes

    folder = fetch(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = perplexity(model, AutoTokenizer.from_pretrained(folder), text, CONTEXT, WINDOWS)
    return {"perplexity": found.perplexity, "tokens": found.tokens, "bytes_on_disk": folder_bytes(folder)}


def main() -> None:
    """Measure the presets named on the command line, all by default; others keep their earlier figures."""
    quiet()
    text = read_text(data_file("wikitext2", "wiki.test.raw"))
    path = RESULTS / "presets.json"
    results = json.loads(path.read_text())["presets"] if path.is_file() else {}
    reference = dense(text)
    for name in sys.argv[1:] or pocketllm.PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = measure(name, text, Path(scratch) / name)
        print(
            name, {k: v for k, v in results[name].items() if k not in ("config", "nmse_by_kind")}, flush=True
        )
        values = {
            "model": MODEL,
            "text": "WikiText-2 raw test",
            "context": CONTEXT,
            "windows": WINDOWS,
            "dtype": "float32",
            "dense": reference,
            "presets": {key: results[key] for key in pocketllm.PRESETS if key in results},
        }
        save("presets", "python benchmarks/presets.py", values)


if __name__ == "__main__":
    main()
