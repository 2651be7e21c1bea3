"""Calibrated compression of one model: size, error, perplexity, time, memory. Writes results/calibrated.json.

    POCKETLLM_DATA=... python benchmarks/calibrated.py [--model smollm2-135m] [--keep FOLDER] [NAME ...]

Whole models, and choices changed one at a time; models whose embedding stays dense are measured beside the
peers (peers/run.py). Perplexity: WikiText-2 raw test, context 1024, first 16 windows (Gemma: 6), evaluated in bfloat16.
Calibrated on the first part of WikiText-2's train text. Each setting runs in a process of its own, so that its
peak memory is its own. Results of another model than SmolLM2 are in results/calibrated_MODEL.json.
With --keep the compressed models stay in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CONTEXT, RESULTS, SMOLLM2, SUBJECTS, Subject, data_file, quiet, save

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.evaluate.kl import text_divergence
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.source.builtin import fetch
from pocketllm.source.folder import load_dense
from pocketllm.text.read import read_text


def _base(bpw: float, **changes: Any) -> CompressConfig:
    """The default preset at another target; changes of codec and calibration by their own names."""
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    calibration = replace(config.calibration, texts=texts, **changes.pop("calibration", {}))
    codec = replace(config.codec, **changes.pop("codec", {}))
    return replace(config, target_bpw=bpw, codec=codec, calibration=calibration, **changes)


def settings(subject: Subject) -> dict[str, CompressConfig]:
    """Every setting by name; choices one by one are those of SmolLM2."""
    whole = {f"everything at {bpw}": _base(bpw) for bpw in (4.0, 3.0, 2.5, 2.0)}
    if subject is not SMOLLM2:
        return whole
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


def child(subject: Subject, name: str, folder: str) -> None:
    """Compress and evaluate one setting; print facts as JSON."""
    quiet()
    import resource

    import torch

    config = settings(subject)[name]
    report = pocketllm.compress(subject.source, config, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, tokenizer = pocketllm.load(folder, mode="dense", dtype=torch.bfloat16)
    reference = load_dense(fetch(subject.source), torch.bfloat16)
    text = read_text(data_file("wikitext2", "wiki.test.raw"))
    found = text_divergence(model, reference, tokenizer, text, CONTEXT, subject.windows)
    blocks = [m for m in report.matrices if "embed" not in m.name and "lm_head" not in m.name]
    facts = {
        "perplexity": found.perplexity,
        "kl": found.kl,
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


def dense(subject: Subject, text: str) -> float:
    """Perplexity of the model as it is, in bfloat16."""
    import torch
    from transformers import AutoTokenizer

    folder = fetch(subject.source)
    model = load_dense(folder, torch.bfloat16)
    return perplexity(model, AutoTokenizer.from_pretrained(folder), text, CONTEXT, subject.windows).perplexity


def main() -> None:
    """Measure the settings named on the command line, by default those without a result as they are now."""
    quiet()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    subject = SUBJECTS[given.model]
    path = RESULTS / f"{subject.results('calibrated')}.json"
    results: dict[str, Any] = json.loads(path.read_text())["settings"] if path.is_file() else {}
    known = {name: entry["config"] for name, entry in results.items()}
    wanted = settings(subject)
    names = given.names or [name for name, config in wanted.items() if known.get(name) != shown(config)]
    reference = dense(subject, read_text(data_file("wikitext2", "wiki.test.raw")))
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (given.keep or Path(scratch)) / f"{subject.name}-{name.replace(' ', '_')}"
            command = [sys.executable, __file__, "child", subject.name, name, str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, {k: v for k, v in results[name].items() if k != "config"}, flush=True)
        values = {
            "model": subject.source,
            "text": "WikiText-2 raw test",
            "calibration": "WikiText-2 raw train, first part",
            "context": CONTEXT,
            "windows": subject.windows,
            "dtype": "bfloat16",
            "dense_perplexity": reference,
            "settings": {key: results[key] for key in wanted if key in results},
        }
        option = "" if subject is SMOLLM2 else f" --model {subject.name}"
        save(subject.results("calibrated"), f"python benchmarks/calibrated.py{option}", values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(SUBJECTS[sys.argv[2]], *sys.argv[3:5])
    else:
        main()
