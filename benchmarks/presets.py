"""The presets on one model: size, error, perplexity, time. Writes results/presets.json.

    POCKETLLM_DATA=... python benchmarks/presets.py [--model smollm2-135m] [PRESET ...]

Perplexity: WikiText-2 raw test, context 1024, first 16 windows (Gemma: 6), evaluated in float32. Results of another
model than SmolLM2 are in results/presets_MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import CONTEXT, RESULTS, SMOLLM2, SUBJECTS, Subject, data_file, quiet, save

import pocketllm
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.text.read import read_text


def measure(subject: Subject, name: str, text: str, folder: Path) -> dict[str, Any]:
    """Compress with one preset, load it back, evaluate."""
    import torch

    report = pocketllm.compress(subject.source, pocketllm.preset(name), folder)
    model, tokenizer = pocketllm.load(folder, dtype=torch.float32)
    found = perplexity(model, tokenizer, text, CONTEXT, subject.windows)
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


def dense(subject: Subject, text: str) -> dict[str, Any]:
    """The model as it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocketllm.format.checkpoint import folder_bytes
    from pocketllm.source.builtin import fetch

    folder = fetch(subject.source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = perplexity(model, AutoTokenizer.from_pretrained(folder), text, CONTEXT, subject.windows)
    return {"perplexity": found.perplexity, "tokens": found.tokens, "bytes_on_disk": folder_bytes(folder)}


def main() -> None:
    """Measure the presets named on the command line, all by default; others keep their earlier figures."""
    quiet()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    parser.add_argument("presets", nargs="*")
    given = parser.parse_args()
    subject = SUBJECTS[given.model]
    text = read_text(data_file("wikitext2", "wiki.test.raw"))
    path = RESULTS / f"{subject.results('presets')}.json"
    results = json.loads(path.read_text())["presets"] if path.is_file() else {}
    reference = dense(subject, text)
    for name in given.presets or pocketllm.PRESETS:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = measure(subject, name, text, Path(scratch) / name)
        print(
            name, {k: v for k, v in results[name].items() if k not in ("config", "nmse_by_kind")}, flush=True
        )
        values = {
            "model": subject.source,
            "text": "WikiText-2 raw test",
            "context": CONTEXT,
            "windows": subject.windows,
            "dtype": "float32",
            "dense": reference,
            "presets": {key: results[key] for key in pocketllm.PRESETS if key in results},
        }
        option = "" if subject is SMOLLM2 else f" --model {subject.name}"
        save(subject.results("presets"), f"python benchmarks/presets.py{option}", values)


if __name__ == "__main__":
    main()
