"""Calibrated compression of SmolLM2-135M: size, error, perplexity, time, memory. Writes results/calibrated.json.

    POCKETLLM_DATA=... python benchmarks/calibrated.py [NAME ...]

Whole models, and choices changed one at a time; models whose embedding stays dense are measured beside the
peers (peers/run.py). Perplexity: WikiText-2 raw test, context 1024, first 16 windows, evaluated in bfloat16.
Calibrated on the first part of WikiText-2's train text. Each setting runs in a process of its own, so that its
peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, data_file, quiet, save

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.text.read import read_text

MODEL = "builtin:smollm2-135m"
CONTEXT, WINDOWS = 1024, 16


def _base(bpw: float, **changes: Any) -> CompressConfig:
    """The default preset at another target; changes of codec and calibration by their own names."""
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    calibration = replace(config.calibration, texts=texts, **changes.pop("calibration", {}))
    codec = replace(config.codec, **changes.pop("codec", {}))
    return replace(config, target_bpw=bpw, codec=codec, calibration=calibration, **changes)


def settings() -> dict[str, CompressConfig]:
    """Every setting by name."""
    whole = {f"everything at {bpw}": _base(bpw) for bpw in (4.0, 3.0, 2.5, 2.0)}
    plain = {"trellis_width": None, "codebook_source": "fit"}

    def at_two(**changes: Any) -> CompressConfig:
        return _base(2.05, keep_embeddings=True, **changes)

    ablations = {
        "2.05, one codebook per kind": at_two(codebook_scope="kind"),
        "2.05, decoder per kind": at_two(decoder_scope="kind"),
        "2.05, free table of 4096 pairs": at_two(codec={"codebook_source": "fit"}),
        "2.05, codebook from a seed": at_two(codec={"codebook_source": "seed"}),
        "2.05, independent indices": at_two(codec=plain),
        "2.05, refined": at_two(calibration={"refine_epochs": 2}),
        "2.05, inputs alone": at_two(calibration={"two_sided": False}),
        "2.05, all tokens alike": at_two(calibration={"weigh_tokens": False}),
        "2.05, inputs of the dense model": at_two(calibration={"sequential": False}),
    }
    return {**whole, **ablations}


def child(name: str, folder: str) -> None:
    """Compress and evaluate one setting; print facts as JSON."""
    quiet()
    import resource

    import torch

    config = settings()[name]
    report = pocketllm.compress(MODEL, config, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, tokenizer = pocketllm.load(folder, dtype=torch.bfloat16)
    text = read_text(data_file("wikitext2", "wiki.test.raw"))
    found = perplexity(model, tokenizer, text, CONTEXT, WINDOWS)
    blocks = [m for m in report.matrices if "embed" not in m.name and "lm_head" not in m.name]
    facts = {
        "perplexity": found.perplexity,
        "seconds": report.seconds,
        "peak_memory_bytes": peak,
        "bytes_on_disk": report.bytes_on_disk,
        "ratio_files_bf16": report.ratio_files_bf16,
        "ratio_files_fp32": report.ratio_files_fp32,
        "bpw_blocks": report.bpw_blocks,
        "bpw_matrices": report.bpw_matrices,
        "nmse_blocks": sum(m.nmse for m in blocks) / len(blocks),
        "proxy_error_blocks": sum(m.proxy_error or 0.0 for m in blocks) / len(blocks),
        "config": shown(config),
    }
    print(json.dumps(facts))


def shown(config: CompressConfig) -> dict[str, Any]:
    """A setting as it stands in the results."""
    values = config.to_dict()
    values["calibration"]["texts"] = ["wikitext2/wiki.train.first_part.txt"]
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def dense(text: str) -> float:
    """Perplexity of the model as it is, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocketllm.source.builtin import fetch

    folder = fetch(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return perplexity(model, AutoTokenizer.from_pretrained(folder), text, CONTEXT, WINDOWS).perplexity


def main() -> None:
    """Measure the settings named on the command line, by default those without a result as they are now."""
    quiet()
    path = RESULTS / "calibrated.json"
    results: dict[str, Any] = json.loads(path.read_text())["settings"] if path.is_file() else {}
    known = {name: entry["config"] for name, entry in results.items()}
    names = sys.argv[1:] or [name for name, config in settings().items() if known.get(name) != shown(config)]
    reference = dense(read_text(data_file("wikitext2", "wiki.test.raw")))
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "child", name, str(Path(scratch) / "out")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {k: v for k, v in results[name].items() if k != "config"}, flush=True)
        values = {
            "model": MODEL,
            "text": "WikiText-2 raw test",
            "calibration": "WikiText-2 raw train, first part",
            "context": CONTEXT,
            "windows": WINDOWS,
            "dtype": "bfloat16",
            "dense_perplexity": reference,
            "settings": {key: results[key] for key in settings() if key in results},
        }
        save("calibrated", "python benchmarks/calibrated.py", values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:4])
    else:
        main()
