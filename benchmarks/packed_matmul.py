"""Speed of products with packed matrices, beside dense ones in torch.

    python benchmarks/packed_matmul.py

A matrix of Llama 2 7B's `up` projection (11008 x 4096) in every form of index, by each instruction set, with one
and two threads; then several tokens at once. Everything is measured once in each of several rounds, so that what
else the machine does falls on all of them; results are medians. `per_core` counts weights per second of processor
time, `wall` per second of the clock. Writes results/packed_matmul.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from common import save

ROWS, COLUMNS = 11008, 4096
ROUNDS = 7
TOKENS = (1, 2, 8, 32, 128)
THREADS = (1, 2)


def stream_of(trellis: Any, per_row: int) -> Any:
    """A random stream is a random path; the bits after the last index are zero in real ones and not read."""
    import torch

    return torch.randint(0, 256, (trellis.nbytes(ROWS, per_row),), dtype=torch.uint8)


def independent(width: int, d: int) -> Any:
    """Independent indices."""
    import torch

    from pocketllm.codec.index_form import Independent
    from pocketllm.codec.kernels.packed_weight import packed_weight

    form = Independent(1 << width)
    stream = torch.randint(0, 256, (form.nbytes(ROWS, COLUMNS // d),), dtype=torch.uint8)
    return packed_weight(stream, torch.randn(1 << width, d), torch.ones(ROWS), COLUMNS, form)


def on_trellis(width: int, stride: int, d: int) -> Any:
    """A trellis with a free table."""
    import torch

    from pocketllm.codec.index_form import Trellis
    from pocketllm.codec.kernels.packed_weight import packed_weight

    trellis = Trellis(width, stride)
    stream, table = stream_of(trellis, COLUMNS // d), torch.randn(1 << width, d)
    return packed_weight(stream, table, torch.ones(ROWS), COLUMNS, trellis)


def on_hashed_trellis(width: int, stride: int, d: int) -> Any:
    """A hashed trellis."""
    import torch

    from pocketllm.codec.index_form import Trellis
    from pocketllm.codec.kernels.packed_weight import hashed_weight

    trellis, entries = Trellis(width, stride), torch.randint(-127, 128, (d, 256)).to(torch.int8)
    return hashed_weight(
        stream_of(trellis, COLUMNS // d), entries, torch.full((ROWS,), 1 / 64), COLUMNS, trellis
    )


def forms() -> dict[str, Any]:
    """Name -> packed matrix; 2 bits per weight where the name says nothing else."""
    return {
        "trellis, d 2, 12 bits": on_trellis(12, 4, 2),
        "trellis, d 4, 12 bits": on_trellis(12, 8, 4),
        "trellis, d 1, 12 bits": on_trellis(12, 2, 1),
        "trellis, d 2, 12 bits, 3 bits per weight": on_trellis(12, 6, 2),
        "independent, d 4, 8 bits": independent(8, 4),
        "independent, d 8, 16 bits": independent(16, 8),
        "hashed trellis, d 1, 12 bits": on_hashed_trellis(12, 2, 1),
        "hashed trellis, d 1, 16 bits": on_hashed_trellis(16, 2, 1),
        "hashed trellis, d 2, 12 bits, 1.5 bits per weight": on_hashed_trellis(12, 3, 2),
        "hashed trellis, d 1, 12 bits, 3 bits per weight": on_hashed_trellis(12, 3, 1),
    }


Work = Callable[[], Any]
Case = tuple[dict[str, Any], Work]


def cases() -> list[Case]:
    """What is measured: (facts, the call)."""
    import torch

    from pocketllm.codec.kernels import packed_cpu
    from pocketllm.codec.kernels.library import best_isa

    found: list[Case] = []
    best, dense = best_isa(), torch.randn(ROWS, COLUMNS)
    inputs = {count: torch.randn(count, COLUMNS, dtype=torch.bfloat16) for count in TOKENS}
    for dtype in (torch.bfloat16, torch.float32):
        weight = dense.to(dtype)
        for count, x in inputs.items():
            facts = {"form": f"dense {str(dtype).removeprefix('torch.')}", "isa": "torch", "tokens": count}
            found.append((facts, partial(torch.nn.functional.linear, x.to(dtype), weight)))
    for name, weight in forms().items():
        tensors, sizes = packed_cpu.tensors_of(weight), weight.sizes
        isas = {best} if sizes.banded else {isa for isa in type(best) if isa <= min(best, 1)}
        for isa in sorted(isas):
            for count in TOKENS if isa == max(isas) else (1,):
                facts = {"form": name, "isa": isa.name.lower(), "tokens": count}
                found.append((facts, partial(packed_cpu.multiply, inputs[count], tensors, sizes, isa)))
    return found


def timed(work: Work) -> tuple[float, float]:
    """(seconds of the clock, of all threads together)."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measured(found: list[Case], threads: int) -> list[dict[str, Any]]:
    """Every case once in each round; G weights per second, medians."""
    import torch

    torch.set_num_threads(threads)
    times: list[list[tuple[float, float]]] = [[] for _ in found]
    for number in range(ROUNDS + 1):
        for (_, work), kept in zip(found, times, strict=True):
            if number == 0:
                work()  # builds, first touches memory
            else:
                kept.append(timed(work))
    size = ROWS * COLUMNS / 1e9
    return [
        {
            **facts,
            "threads": threads,
            "per_core": round(size / statistics.median(cpu for _, cpu in kept), 2),
            "wall": round(size / statistics.median(wall for wall, _ in kept), 2),
        }
        for (facts, _), kept in zip(found, times, strict=True)
    ]


def main() -> None:
    """Measure and write."""
    import torch

    torch.manual_seed(0)
    found = cases()
    results = [row for threads in THREADS for row in measured(found, threads)]
    shape = {"rows": ROWS, "columns": COLUMNS, "rounds": ROUNDS, "unit": "1e9 weights per second"}
    save("packed_matmul", "python benchmarks/packed_matmul.py", {**shape, "results": results})


if __name__ == "__main__":
    main()
