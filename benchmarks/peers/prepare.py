"""Fetch the model and draw the calibration samples that every peer gets.

    python benchmarks/peers/prepare.py MODEL CALIBRATION_TEXT FOLDER

Writes tokens.json ([samples][length] token ids), samples.txt (the same as text, for peers that tokenize
themselves) and facts.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

from settings import SAMPLE_TOKENS, SAMPLES, SEED

from pocketllm.source.builtin import fetch
from pocketllm.text.read import read_text
from pocketllm.text.windows import token_windows


def main() -> None:
    """Samples are windows of the text, without overlap, drawn by the seed."""
    from transformers import AutoTokenizer

    path, folder = map(Path, sys.argv[2:4])
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(tokenizer, read_text(path), SAMPLE_TOKENS).tolist()
    drawn = random.Random(SEED).sample(windows, SAMPLES)
    facts = {
        "model": str(model),
        "model_sha256": _digest(model / "model.safetensors"),
        "calibration_text_sha256": _digest(path),
        "calibration_samples": SAMPLES,
        "calibration_sample_tokens": SAMPLE_TOKENS,
        "seed": SEED,
    }
    (folder / "tokens.json").write_text(json.dumps(drawn))
    (folder / "samples.txt").write_text(
        "\n\n".join(str(tokenizer.decode(ids)) for ids in drawn), encoding="utf-8"
    )
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    main()
