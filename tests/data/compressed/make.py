"""Compress four tiny models and keep the weights that they decode to, for tests/numerics/test_stored_bytes.py.

    PYTHONPATH=. python tests/data/compressed/make.py

A folder is named after the version that wrote it and is never written again: every later version has to decode it
to the same weights. A release that changes the stored form adds its own folders with this command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests import tiny

import pocketllm

HERE = Path(__file__).resolve().parent


def settings() -> dict[str, tuple[str, dict[str, int], pocketllm.CompressConfig]]:
    """Architecture, sizes and settings by name: each form of decoder, index, rotation and codebook."""
    published = dataclasses.replace(
        pocketllm.preset("paper-16x"), dense_first=0, dense_last=0, target_bpw=9.0
    )
    calibrated = dataclasses.replace(tiny.on_trellis(calibration={"two_sided": True}), seed=3)
    drawn = dataclasses.replace(calibrated.codec, codebook_source="seed")
    assert calibrated.calibration is not None
    one_sided = dataclasses.replace(calibrated.calibration, two_sided=False, rotate=False, passes=1)
    return {
        "published": ("gpt2", {"n_layer": 1, "n_embd": 24}, published),
        "calibrated": ("llama", {"num_hidden_layers": 1}, calibrated),
        "hashed": (
            "llama",
            {"num_hidden_layers": 1},
            dataclasses.replace(tiny.on_trellis(4.0, codec=tiny.HASHED), seed=3),
        ),
        "seeded": (
            "mixtral",
            {"num_hidden_layers": 1, "intermediate_size": 20},
            dataclasses.replace(calibrated, codec=drawn, calibration=one_sided),
        ),
    }


def main() -> None:
    """Write every folder that is not there."""
    torch.set_num_threads(1)
    for name, (architecture, sizes, config) in settings().items():
        folder = HERE / f"{pocketllm.__version__}-{name}"
        if folder.exists():
            continue
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            pocketllm.compress(tiny.save(Path(name), architecture, **sizes), config, folder)
        layout = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        model, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
        decoded = {key: model.get_parameter(key).contiguous() for key in layout["matrices"]}
        save_file(decoded, HERE / f"{folder.name}.decoded.safetensors")


if __name__ == "__main__":
    main()
