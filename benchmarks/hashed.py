"""The hashed trellis against the free table of 4096 pairs: SmolLM2-135M at equal bits. Writes results/hashed.json.

    POCKETLLM_DATA=... python benchmarks/hashed.py [--keep FOLDER] [NAME ...]

As the models in docs/calibration.md: embedding dense, calibrated on the first part of WikiText-2's train text.
Perplexity and KL(dense || compressed): WikiText-2 raw test, context 1024, first 16 windows, bfloat16. Encoding, the
model's own passes over the text included, is timed in seconds of the processor, since the clock depends on what else
a machine does. Sensitivities are measured once for all runs. With --keep the compressed models stay in FOLDER, for
`pocketllm bench` and for a later run, which does not make them again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, data_file, quiet, save

import pocketllm
from pocketllm.compression import Event
from pocketllm.config import CompressConfig

MODEL = "builtin:smollm2-135m"
CONTEXT, WINDOWS = 1024, 16


def _at(bpw: float, hashed: bool, codec: dict[str, Any] | None = None, **changes: Any) -> CompressConfig:
    """The default preset at another target, with a dense embedding."""
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    return replace(
        config,
        target_bpw=bpw,
        keep_embeddings=True,
        codec=replace(config.codec, codebook_source="hashed" if hashed else "fit", **(codec or {})),
        calibration=replace(config.calibration, texts=texts),
        **changes,
    )


def settings() -> dict[str, CompressConfig]:
    """Every setting by name."""
    own_tables = {"codebook_scope": "matrix", "codec": {"depth": 0}}
    return {
        "table, 2.05": _at(2.05, hashed=False),
        "hashed, 2.05": _at(2.05, hashed=True),
        "table, 3.05": _at(3.05, hashed=False),
        "hashed, 3.05": _at(3.05, hashed=True),
        "hashed, 2.05, a table of its own for each matrix, no decoder": _at(2.05, hashed=True, **own_tables),
        "hashed, 2.05, d = 1": _at(2.05, hashed=True, vector_len=1),
        "hashed, 2.05, windows of 14 bits": _at(2.05, hashed=True, codec={"trellis_width": 14}),
        "table, 2.05, another seed": _at(2.05, hashed=False, seed=1),
        "hashed, 2.05, another seed": _at(2.05, hashed=True, seed=1),
    }


def compressed(name: str, folder: Path, measurements: str) -> dict[str, Any]:
    """Compress one setting, or take what an earlier run left; facts about it."""
    began: dict[str, float] = {}

    def progress(event: Event) -> None:
        began.setdefault(event.stage, time.process_time())

    kept = folder.with_name(f"{folder.name}.json")
    if kept.is_file():
        return json.loads(kept.read_text())  # type: ignore[no-any-return]
    config = settings()[name]
    report = pocketllm.compress(MODEL, config, folder, progress=progress, calibration_folder=measurements)
    facts = {
        "bpw_blocks": report.bpw_blocks,
        "bytes_on_disk": report.bytes_on_disk,
        "bytes_by_part": report.bytes_by_part,
        "nmse_blocks": sum(m.nmse or 0.0 for m in report.matrices) / len(report.matrices),
        "proxy_error_blocks": sum(m.proxy_error or 0.0 for m in report.matrices) / len(report.matrices),
        "encode_processor_seconds": time.process_time() - began["encode"],
        "seconds": report.seconds,
        "config": shown(config),
    }
    kept.write_text(json.dumps(facts))
    return facts


def child(name: str, folder: str, measurements: str) -> None:
    """Compress and evaluate one setting; print facts as JSON."""
    quiet()
    import torch

    from pocketllm.evaluate.kl import text_divergence
    from pocketllm.source.builtin import fetch
    from pocketllm.source.folder import load_dense
    from pocketllm.text.read import read_text

    facts = compressed(name, Path(folder), measurements)
    model, tokenizer = pocketllm.load(folder, mode="dense", dtype=torch.bfloat16)
    reference = load_dense(fetch(MODEL), torch.bfloat16)
    text = read_text(data_file("wikitext2", "wiki.test.raw"))
    found = text_divergence(model, reference, tokenizer, text, CONTEXT, WINDOWS)
    figures = {"perplexity": found.perplexity, "kl": found.kl, "kl_stderr": found.kl_stderr}
    print(json.dumps({**figures, "dense_perplexity": found.reference_perplexity, **facts}))


def shown(config: CompressConfig) -> dict[str, Any]:
    """A setting as it stands in the results."""
    values = config.to_dict()
    values["calibration"]["texts"] = ["wikitext2/wiki.train.first_part.txt"]
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def main() -> None:
    """Measure the settings named on the command line, by default those without a result as they are now."""
    quiet()
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    path = RESULTS / "hashed.json"
    results: dict[str, Any] = json.loads(path.read_text())["settings"] if path.is_file() else {}
    known = {name: entry["config"] for name, entry in results.items()}
    names = given.names or [name for name, config in settings().items() if known.get(name) != shown(config)]
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        for name in names:
            folder = root / name.replace(", ", "-").replace(" ", "_")
            command = [sys.executable, __file__, "child", name, str(folder), str(root / "measurements")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {k: v for k, v in results[name].items() if k != "config"}, flush=True)
            values = {"model": MODEL, "text": "WikiText-2 raw test", "context": CONTEXT, "windows": WINDOWS}
            kept = {key: results[key] for key in settings() if key in results}
            save("hashed", "python benchmarks/hashed.py", {**values, "settings": kept})


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:5])
    else:
        main()
