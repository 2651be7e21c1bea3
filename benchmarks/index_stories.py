"""The trial of learning indices on stories260K: its models before and after distillation, and what is measured on
them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import data_file
from stories import read_model, read_tokenizer

TEXT = ("tinystories", "exllamav3_cal_tiny.txt")
FIRST, LAST = 180_000, 80_000  # bytes to train on, and to measure on
BPW, STEPS, BATCH, CONTEXT = "2.3", 120, 16, 256
RATES = {
    "lr_codebook": 4e-3,
    "lr_decoder": 4e-4,
    "lr_scale": 4e-3,
    "lr_norm": 4e-3,
    "lr_dense": 1.2e-3,
}  # 4 times the defaults
HOW = ("--context", str(CONTEXT), "--dtype", "float32", "--projected", "64", "--windows", "24")


def rows(folder: Path) -> list[list[str]]:
    """Make the models in a folder; the arguments of index_learning.py for each row."""
    dense, small, tuned = folder / "stories260K", folder / "small", folder / "tuned"
    first, last = folder / "first.txt", folder / "last.txt"
    read_model(data_file("weights", "stories260K.bin")).save_pretrained(dense)
    read_tokenizer(data_file("weights", "tok512.bin")).save_pretrained(dense)
    text = data_file(*TEXT).read_bytes()
    first.write_bytes(text[:FIRST])
    last.write_bytes(text[-LAST:])
    _run("compress", dense, "-o", small, "--bpw", BPW, "--keep-embeddings", "--calibration", first)
    how = ("--teacher", dense, "--text", first, "--validation-text", last, "--context", CONTEXT)
    rates = [part for name, rate in RATES.items() for part in ("--set", f"{name}={rate}")]
    _run("finetune", small, "-o", tuned, *how, "--steps", STEPS, "--set", f"loop.batch_size={BATCH}", *rates)
    texts = ["--teacher", str(dense), "--text", str(first), "--held", str(last), *HOW]
    return [
        [f"before distillation={small}", *texts],
        [f"after distillation={tuned}", *texts],
        [f"before distillation, segments accepted={small}", *texts, "--tokens", "8192", "--rounds", "4"],
    ]


def _run(*arguments: object) -> None:
    """`pocketllm` in a process of its own."""
    subprocess.run([sys.executable, "-m", "pocketllm", *map(str, arguments), "--quiet"], check=True)
