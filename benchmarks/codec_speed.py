"""Speed of the codec's two inner loops: unpacking indices, and finding the nearest codeword.

    python benchmarks/codec_speed.py

Unpacking: 2^24 random indices at several widths, the best of five. Nearest codeword: every subvector of
SmolLM2's block weights, row-scaled, against a codebook of 2^15 of them at d = 8, once. CPU seconds are beside
the wall clock's, so that a machine that was busy with something else shows. Writes results/codec_speed.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from common import quiet, save

MODEL = "builtin:smollm2-135m"
WIDTHS = (1, 4, 8, 11, 12, 13, 15, 16, 24)
COUNT = 1 << 24
VECTOR_LEN, CODEBOOK_SIZE = 8, 1 << 15


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of wall clock and of all threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def packing(width: int) -> dict[str, float]:
    """Indices per second, packing and unpacking, in millions."""
    import torch

    from pocketllm.codec.packing import pack, unpack

    indices = torch.randint(0, 1 << width, (COUNT,), dtype=torch.int32)
    stream = pack(indices, width)
    assert torch.equal(unpack(stream, width, COUNT), indices)
    best = {
        name: min(timed(work)["seconds"] for _ in range(5))
        for name, work in (
            ("pack", lambda: pack(indices, width)),
            ("unpack", lambda: unpack(stream, width, COUNT)),
        )
    }
    return {"width": width, **{f"{name}_million_per_second": COUNT / s / 1e6 for name, s in best.items()}}


def block_subvectors() -> Iterator[Any]:
    """[N, 8] row-scaled subvectors of each matrix of the blocks."""
    from pocketllm.codec.normalization import divide_rows, row_rms
    from pocketllm.codec.subvectors import cut
    from pocketllm.plan.selection import classify
    from pocketllm.source.dense_checkpoint import open_dense, resolve

    source = open_dense(resolve(MODEL))
    for matrix in classify(source, _config())[0]:
        if matrix.in_blocks:
            weight = source.read(matrix.name)
            yield cut(divide_rows(weight, row_rms(weight)), VECTOR_LEN).reshape(-1, VECTOR_LEN)


def _config() -> Any:
    import pocketllm

    return pocketllm.CompressConfig(vector_len=VECTOR_LEN, codebook_size=CODEBOOK_SIZE)


def assignment() -> dict[str, Any]:
    """One search for every subvector of the blocks."""
    import torch

    from pocketllm.codec.codebook import Searcher

    points = torch.cat(list(block_subvectors()))
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:CODEBOOK_SIZE]
    searcher = Searcher(points[chosen])
    searcher.nearest(points[: 1 << 15])  # loads and builds what the first call needs
    found = timed(lambda: searcher.nearest(points))
    products = 2.0 * len(points) * CODEBOOK_SIZE * VECTOR_LEN
    return {
        "vector_len": VECTOR_LEN,
        "codebook_size": CODEBOOK_SIZE,
        "weights": points.numel(),
        **found,
        "gflop_per_second": products / found["seconds"] / 1e9,
    }


def main() -> None:
    """Measure both."""
    quiet()
    packed = [packing(width) for width in WIDTHS]
    for entry in packed:
        print({key: round(value, 1) for key, value in entry.items()}, flush=True)
    nearest = assignment()
    print(nearest, flush=True)
    values = {"model": MODEL, "indices": COUNT, "packing": packed, "nearest": nearest}
    save("codec_speed", "python benchmarks/codec_speed.py", values)


if __name__ == "__main__":
    main()
