"""What the fast rotation costs in quality against a dense random orthogonal one, and what either gains.

    POCKETLLM_DATA=... python benchmarks/rotation.py

Three blocks of SmolLM2-135M, 2 bits per weight on a trellis, Hessians of the dense model on 8192 tokens. Proxy
error tr(E H E^T) / tr(W H W^T), the mean over matrices of a kind. Writes results/rotation.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from common import data_file, quiet, save
from torch import Tensor
from transformers import AutoTokenizer

from pocketllm.calibrate.blocks import BlockStream
from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import factorize
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate_hessian, rotate_matrix
from pocketllm.config import CompressConfig
from pocketllm.plan.selection import classify
from pocketllm.source.builtin import fetch
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.text.read import read_calibration
from pocketllm.text.windows import calibration_windows

BLOCKS = (2, 15, 27)
TRELLIS, VECTOR_LEN = Trellis(12, 4), 2

Rotated = tuple[Tensor, Tensor]  # weight, Hessian


def fast(weight: Tensor, hessian: Tensor) -> Rotated:
    """Hadamard and Hartley factors with random signs: n log n."""
    return rotate_matrix(weight, (0, 1)), rotate_hessian(hessian, 1)


def dense(weight: Tensor, hessian: Tensor) -> Rotated:
    """Random orthogonal matrices of full size: n^2, and n^2 numbers to store or make again."""
    left, right = (_orthogonal(size, seed) for size, seed in zip(weight.shape, (0, 1), strict=True))
    return left @ weight @ right.T, right @ hessian @ right.T


def none(weight: Tensor, hessian: Tensor) -> Rotated:
    """As it is."""
    return weight, hessian


def _orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


def proxy_error(rotated: Rotated) -> float:
    """Proxy error of a matrix encoded for its inputs."""
    weight, hessian = rotated
    factor = factorize(hessian, VECTOR_LEN)
    table = seeded_codebook(1 << TRELLIS.width, VECTOR_LEN, 0).float()
    indices, scale = assign(weight, factor, table, row_rms(weight), TRELLIS, passes=0)
    error = weight - table[indices].reshape(weight.shape) * scale[:, None]
    loss, energy = (((x @ factor.hessian) * x).sum() for x in (error, weight))
    return float(loss / energy)


def main() -> None:
    """Measure three blocks with each rotation."""
    quiet()
    folder = fetch("builtin:smollm2-135m")
    source = open_dense(folder)
    text = read_calibration(data_file("wikitext2", "wiki.train.first_part.txt"))
    windows = calibration_windows(AutoTokenizer.from_pretrained(folder), [text], 8192, 512, 0)
    matrices = [m for m in classify(source, CompressConfig())[0] if m.in_blocks]
    forms: dict[str, Callable[[Tensor, Tensor], Rotated]] = {"none": none, "fast": fast, "dense": dense}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stream = BlockStream(source, windows)
    for number, (path, block) in enumerate(stream):
        if number in BLOCKS:
            inside = [m for m in matrices if m.name.startswith(f"{path}.")]
            hessians = stream.inputs(block, inside).hessians
            for matrix in inside:
                for name, form in forms.items():
                    error = proxy_error(form(source.read(matrix.name).float(), hessians[matrix.name]))
                    found[name][matrix.kind].append(error)
        stream.hidden = stream.run(block, stream.hidden)
        if number == max(BLOCKS):
            break
    means = {n: {k: sum(v) / len(v) for k, v in kinds.items()} for n, kinds in found.items()}
    overall = {name: sum(kinds.values()) / len(kinds) for name, kinds in means.items()}
    print(overall)
    values = {"blocks": BLOCKS, "tokens": windows.numel(), "by_kind": means, "mean": overall}
    save("rotation", "python benchmarks/rotation.py", values)


if __name__ == "__main__":
    main()
