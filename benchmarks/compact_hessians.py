"""What it costs to keep the Hessian G of a layer's outputs in a compact form.

    POCKETLLM_DATA=... python benchmarks/compact_hessians.py [BLOCK ...]

Matrices are encoded at 2 bits per weight with G as it is and with compact forms of it, and compared by the loss
tr(E^T G E H), always with G as it is, damped as in use: G from gradients in 8 bits (the form in use for wide layers),
G of low rank plus its diagonal, and no G. Blocks 15 and 27 of SmolLM2-135M, or those that are named, 8192 tokens as by
default. Writes results/compact_hessians.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import data_file, quiet, save
from torch import Tensor
from transformers import AutoTokenizer

from pocketllm.calibrate import sensitivity
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.output_hessians import as_kept, output_hessians
from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import factorize
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate_hessian, rotate_matrix
from pocketllm.config import CompressConfig
from pocketllm.config.constants import OUTPUT_DAMPING
from pocketllm.format.kept import read_kept, write_kept
from pocketllm.plan.selection import classify
from pocketllm.source.builtin import fetch
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense
from pocketllm.text.read import read_calibration
from pocketllm.text.windows import calibration_windows

WIDTH, BITS, VECTOR_LEN, STRIP, TOKENS = 12, 4, 2, 32, 8192
RANKS = (32, 8, 4)  # low ranks: rows divided by these


def low_rank(hessian: Tensor, rank: int) -> Tensor:
    """The best approximation of a low rank, with the diagonal of the Hessian."""
    values, vectors = torch.linalg.eigh(hessian.double())
    loud = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    found = loud @ loud.T
    found.diagonal().copy_(hessian.diagonal())
    return found.float()


def losses(
    weight: Tensor, hessian: Tensor, outer: Tensor, forms: dict[str, Tensor | None]
) -> dict[str, float]:
    """The loss with each form of G over that with G as it is."""
    weight, inner = rotate_matrix(weight, (0, 1)), factorize(rotate_hessian(hessian, 1), VECTOR_LEN)
    table, true = seeded_codebook(1 << WIDTH, VECTOR_LEN, 0).float(), _factor(outer)

    def loss(used: Tensor | None) -> float:
        outputs = None if used is None else _factor(used)
        form = Trellis(WIDTH, BITS, STRIP)
        found = assign(weight, inner, table, row_rms(weight), form, outputs=outputs, passes=0)
        error = weight - table[found[0]].reshape(weight.shape) * found[1][:, None]
        return float(((true.hessian @ error @ inner.hessian) * error).sum())

    full = loss(outer)
    return {name: loss(form) / full for name, form in forms.items()}


def _factor(outer: Tensor) -> Any:
    return factorize(rotate_hessian(outer, 0), 1, OUTPUT_DAMPING)


def measure_both(source: DenseCheckpoint, windows: Tensor, folders: tuple[Path, Path]) -> None:
    """Write the Hessians of outputs as they are and as gradients in 8 bits."""

    def both(name: str, hessian: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return as_kept(name, hessian, []) | as_kept(name, hessian, gradients)

    sensitivity.as_kept, sensitivity.least_rows_in_8_bits = both, lambda tokens: 1
    matrices, _ = classify(source, CompressConfig())
    made = folders[0].with_name("both")
    sensitivity.measure(source, windows, matrices, 0.01, 0, two_sided=True, outputs=made)
    for path in made.iterdir():
        tensors, facts = read_kept(path)
        full = {name: x for name, x in tensors.items() if "|" not in name}
        for folder, some in zip(
            folders, (full, {n: x for n, x in tensors.items() if n not in full}), strict=True
        ):
            folder.mkdir(exist_ok=True)
            write_kept(folder / path.name, some, facts)


def main() -> None:
    """Measure and write down."""
    quiet()
    blocks = [int(word) for word in sys.argv[1:]] or [15, 27]
    model = fetch("builtin:smollm2-135m")
    source = open_dense(model)
    text = read_calibration(data_file("wikitext2", "wiki.train.first_part.txt"))
    windows = calibration_windows(AutoTokenizer.from_pretrained(model), [text], TOKENS, 512, 0)[0]
    matrices = [m for m in classify(source, CompressConfig())[0] if m.in_blocks]
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch) / "full", Path(scratch) / "coded"
        measure_both(source, windows, folders)
        stream = BlockStream(source, windows)
        for number, (path, block) in enumerate(stream):
            inside = [m for m in matrices if m.name.startswith(f"{path}.")] if number in blocks else []
            hessians = stream.inputs(block, inside).hessians if inside else {}
            full, coded = (output_hessians(f, path, "cpu", [m.name for m in inside]) for f in folders)
            for matrix in inside:
                outer, forms = full[matrix.name], {"gradients in 8 bits": coded[matrix.name]}
                forms |= {f"rank rows / {n}": low_rank(outer, matrix.rows // n) for n in RANKS}
                weight = source.read(matrix.name).float()
                values = losses(weight, hessians[matrix.name], outer, {**forms, "no G": None})
                found[matrix.kind][path] = values
                print(matrix.name, values, flush=True)
            if number == max(blocks):
                break
            stream.hidden = stream.run(block, stream.hidden)
    every = [values for paths in found.values() for values in paths.values()]
    mean = {form: sum(values[form] for values in every) / len(every) for form in every[0]}
    print(mean)
    values = {"blocks": blocks, "loss_over_that_with_G": found, "mean": mean}
    save("compact_hessians", "python benchmarks/compact_hessians.py", values)


if __name__ == "__main__":
    main()
