"""What the adapters of the peers share. It runs in a peer's own environment and imports nothing of ours.

An adapter is a program with two stages, each a process of its own:

    python adapt_X.py quantize JOB.json      # timed: dense model in, the peer's own packed files out
    python adapt_X.py dequantize JOB.json    # not timed: packed files in, dense bf16 weights and bits out
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # not at run time: a quantizer that needs no torch is not to pay for loading it


@dataclass(frozen=True)
class Job:
    """model: dense folder. tokens: JSON, [samples][length] ids. text: the same samples as plain text.
    work: folder of this setting. options: of the setting. seed: of every random choice.
    """

    model: Path
    tokens: Path
    text: Path
    work: Path
    options: dict[str, Any]
    seed: int

    @property
    def packed(self) -> Path:
        """Where the peer's own files go."""
        return self.work / "packed"

    @property
    def dense(self) -> Path:
        """Where the dequantized model goes."""
        return self.work / "dense"


@dataclass(frozen=True)
class Matrix:
    """A dequantized matrix [out, in], the bits it takes in the peer's files, and the name of its format."""

    weight: torch.Tensor
    stored_bits: int
    format: str


def run(quantize: Callable[[Job], dict[str, Any]], dequantize: Callable[[Job], dict[str, Matrix]]) -> None:
    """The program of an adapter: do the stage that the command line names."""
    stage, path = sys.argv[1:3]
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    for key in ("model", "tokens", "text", "work"):
        values[key] = Path(values[key])
    job = Job(**values)
    if stage == "quantize":
        job.packed.mkdir(parents=True, exist_ok=True)
        _write(job.work / "settings.json", quantize(job))
    else:
        _write(job.work / "bits.json", write_dense(job, dequantize(job)))


def block_matrices(model: Path) -> dict[str, torch.Tensor]:
    """The weight matrices of the transformer blocks, by name: what every peer is to quantize."""
    return {name: value for name, value in _tensors(model).items() if ".layers." in name and value.dim() == 2}


def write_dense(job: Job, matrices: dict[str, Matrix]) -> dict[str, Any]:
    """Write the dense model with these matrices in the place of its own; count the bits of the blocks'.

    Raises:
        ValueError: a block matrix is missing or has another shape.
    """
    import torch
    from safetensors.torch import save_file

    original = block_matrices(job.model)
    for name, weight in original.items():
        got = tuple(matrices[name].weight.shape) if name in matrices else None
        if got != tuple(weight.shape):
            raise ValueError(f"{name}: the peer's files give {got}, wanted {tuple(weight.shape)}")
    job.dense.mkdir(parents=True, exist_ok=True)
    for path in job.model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, job.dense)
    replaced = {name: matrix.weight.to(torch.bfloat16).contiguous() for name, matrix in matrices.items()}
    save_file(_tensors(job.model) | replaced, job.dense / "model.safetensors", {"format": "pt"})
    return _count([matrices[name] for name in original])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _count(matrices: list[Matrix]) -> dict[str, Any]:
    formats: dict[str, dict[str, int]] = {}
    for matrix in matrices:
        entry = formats.setdefault(matrix.format, {"matrices": 0, "weights": 0, "stored_bits": 0})
        entry["matrices"] += 1
        entry["weights"] += matrix.weight.numel()
        entry["stored_bits"] += matrix.stored_bits
    weights = sum(entry["weights"] for entry in formats.values())
    bits = sum(entry["stored_bits"] for entry in formats.values())
    return {"weights": weights, "stored_bits": bits, "bpw": bits / weights, "formats": formats}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
