"""What compensation between the matrices of a block gains, and what it costs. Writes results/compensate.json.

    POCKETLLM_DATA=... python benchmarks/compensate.py [--model stories260K] [--bpw 3.05] [--steps 0 20] [--seeds 0 1]

The default preset with embedding and head left dense. stories260K (see stories.py) is calibrated on the first four
fifths of TinyStories text and measured on the last; SmolLM2-135M is calibrated on WikiText-2's train text and measured
on its raw test text. Perplexity and KL divergence are in float32. Figures that were measured before are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import RESULTS, SMOLLM2, data_file, quiet, save
from stories import read_model, read_tokenizer

import pocketllm
from pocketllm.evaluate.kl import text_divergence
from pocketllm.source.builtin import fetch
from pocketllm.source.folder import load_dense
from pocketllm.text.read import read_text

STORIES = "stories260K"


@dataclass(frozen=True)
class Trial:
    """A dense model, the file that it is calibrated on, the text that it is measured on, and how."""

    model: str
    calibration: Path
    held: str
    context: int
    windows: int


def stories(folder: Path) -> Trial:
    """The small model, made in a folder."""
    model, text = folder / STORIES, data_file("tinystories", "exllamav3_cal_tiny.txt").read_text("utf-8")
    read_model(data_file("weights", "stories260K.bin")).save_pretrained(model)
    read_tokenizer(data_file("weights", "tok512.bin")).save_pretrained(model)
    train, end = folder / "train.txt", len(text) * 4 // 5
    train.write_text(text[:end], "utf-8")
    return Trial(str(model), train, text[end:], context=256, windows=60)


def smollm2() -> Trial:
    """The larger one."""
    train, held = data_file("wikitext2", "wiki.train.first_part.txt"), data_file("wikitext2", "wiki.test.raw")
    return Trial(SMOLLM2.source, train, read_text(held), context=1024, windows=SMOLLM2.windows)


def measured(trial: Trial, bpw: float, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Compress and measure."""
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    given = {"texts": (str(trial.calibration),), "context": min(512, trial.context), "compensate": steps}
    calibration = replace(config.calibration, **given)
    config = replace(config, target_bpw=bpw, keep_embeddings=True, calibration=calibration, seed=seed)
    started = time.process_time()
    report = pocketllm.compress(trial.model, config, folder / "small", overwrite=True)
    seconds = time.process_time() - started
    source = fetch(trial.model) if trial.model == SMOLLM2.source else Path(trial.model)
    model, tokenizer = pocketllm.load(folder / "small", mode="dense")
    found = text_divergence(model, load_dense(source), tokenizer, trial.held, trial.context, trial.windows)
    return {
        "bpw_blocks": report.bpw_blocks,
        "perplexity": found.perplexity,
        "dense_perplexity": found.reference_perplexity,
        "kl": found.kl,
        "kl_stderr": found.kl_stderr,
        "processor_seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure what is named and not known."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", choices=(STORIES, SMOLLM2.name), default=STORIES)
    parser.add_argument("--bpw", type=float, default=3.05)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    path = RESULTS / "compensate.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["runs"] if path.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        trial = stories(Path(scratch)) if chosen.model == STORIES else smollm2()
        for steps in chosen.steps:
            for seed in chosen.seeds:
                which = {"model": chosen.model, "bpw": chosen.bpw, "steps": steps, "seed": seed}
                if any(which.items() <= run.items() for run in runs):
                    continue
                runs.append({**which, **measured(trial, chosen.bpw, steps, seed, Path(scratch))})
                print(runs[-1], flush=True)
                save("compensate", "python benchmarks/compensate.py", {"runs": runs})


if __name__ == "__main__":
    main()
