"""Products with packed matrices on a GPU, next to bf16: agreement, time, share of the memory bandwidth, crossover.

    python benchmarks/gpu_runtime.py [--dry-run]

The matrices of a block of Llama 2 7B with random indices, at 2 and 3 bits per weight, rotated on both sides, for 1 to
512 tokens of bfloat16. `packed` is the time of a layer, rotations included; `stream` and `decoded` are those of the two
ways to multiply without rotations, of which packed_gpu.FEW_TOKENS chooses one. Calls are recorded as a CUDA graph and
go through copies of the matrix, since a single one would stay in the cache. Writes results/gpu_runtime.json.

`--dry-run` takes tiny matrices and prints what it measured; without a GPU it wants TRITON_INTERPRET=1, and then its
times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import save
from torch import Tensor

# Matrix -> (rows, columns, how many a block has).
SHAPES = {"q, k, v, o": (4096, 4096, 4), "gate, up": (11008, 4096, 2), "down": (4096, 11008, 1)}
TINY = {"q": (32, 48, 1), "up": (48, 32, 2)}
# (name, bits per weight, width, stride, d, hashed)
FORMS = (
    ("hashed trellis, d 2", 2, 12, 4, 2, True),
    ("hashed trellis, d 1", 2, 12, 2, 1, True),
    ("hashed trellis, d 1", 3, 12, 3, 1, True),
    ("trellis, d 2", 2, 12, 4, 2, False),
    ("trellis, d 2", 3, 12, 6, 2, False),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
MOST_FROM_STREAM = 128  # more do not fit into the registers of a program
BEYOND_CACHE = 512 << 20  # bytes of all copies of a matrix
ROUNDS = 7

Work = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """shapes: of the matrices. tokens: how many. dtype: of activations, in which torch multiplies densely."""

    device: torch.device
    shapes: dict[str, tuple[int, int, int]]
    tokens: tuple[int, ...]
    dtype: torch.dtype
    copies_bytes: int


def setting(dry_run: bool) -> Setting:
    """What is measured here; ends the program with code 1 if that takes a GPU."""
    gpu, interpreted = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    if not gpu and not (dry_run and interpreted):
        sys.exit(
            "gpu_runtime.py needs a GPU, and torch sees none; to try it on a CPU: "
            "TRITON_INTERPRET=1 python benchmarks/gpu_runtime.py --dry-run"
        )
    device = torch.device("cuda" if gpu else "cpu")
    if dry_run:  # the interpreter multiplies float32 only
        return Setting(device, TINY, (1, 3), torch.bfloat16 if gpu else torch.float32, 0)
    return Setting(device, SHAPES, TOKENS, torch.bfloat16, BEYOND_CACHE)


def packed(rows: int, columns: int, form: tuple[Any, ...], device: torch.device) -> Any:
    """A matrix of random indices, rotated on both sides; a random stream is a random path."""
    from pocketllm.codec.index_form import Trellis
    from pocketllm.codec.kernels.packed_weight import PackedWeight, Sizes

    _, _, width, stride, d, hashed = form
    trellis = Trellis(width, stride)
    nbytes = trellis.nbytes(rows, -(-columns // d))
    stream = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    entries = torch.randint(-127, 128, (d, 256), device=device).to(torch.int8)
    table = entries if hashed else torch.randn(1 << width, d, device=device)
    scale = torch.full((rows,), 1 / 64 if hashed else 1.0, device=device)
    sizes = Sizes(rows, columns, d, width, stride, trellis.strip_rows, banded=False)
    return PackedWeight(stream, table, scale, sizes).rotated((1, 2))


def seconds(calls: list[Work], device: torch.device) -> float:
    """Time of one of several calls, median over rounds."""
    for call in calls:
        call()  # compiles
    if device.type == "cpu":
        return statistics.median(wall(call) for call in calls)
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS + 1):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[1:])


def wall(call: Work) -> float:
    """Seconds of the clock."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def copies(of: Tensor, most: int) -> list[Tensor]:
    """A tensor and so many copies that together they take `most` bytes."""
    count = max(1, -(-most // (of.numel() * of.element_size())))
    return [of, *(of.clone() for _ in range(count - 1))]


def products(weight: Any, chosen: Setting) -> Iterator[dict[str, Any]]:
    """Times of a packed matrix by number of tokens, and how far products lie from the reference."""
    from pocketllm.codec.kernels import packed_gpu
    from pocketllm.codec.kernels.packed_cpu import tensors_of
    from pocketllm.codec.kernels.packed_op import packed_matmul_reference

    sizes, tensors = weight.sizes, tensors_of(weight)
    weights = [tensors._replace(stream=stream) for stream in copies(weight.stream, chosen.copies_bytes)]
    for count in chosen.tokens:
        x = torch.randn(count, sizes.columns, device=chosen.device, dtype=chosen.dtype)
        plain = x.float() if count == 1 else x
        wanted = packed_matmul_reference(x, weight)
        error = (packed_gpu.multiply(x, tensors, sizes) - wanted).norm() / wanted.norm()
        ways = {"packed": (packed_gpu.multiply, x), "decoded": (packed_gpu.by_decoding, plain)}
        if count <= MOST_FROM_STREAM:
            ways["stream"] = (packed_gpu.from_stream, plain)
        times = {
            name: seconds([lambda w=w, way=way, x=at: way(x, w, sizes) for w in weights], chosen.device)
            for name, (way, at) in ways.items()
        }
        yield {"tokens": count, "relative_error": float(error), "seconds": times}


def dense(rows: int, columns: int, chosen: Setting) -> dict[int, float]:
    """Tokens -> seconds of a dense product in torch."""
    matrix = torch.randn(rows, columns, device=chosen.device, dtype=chosen.dtype)
    matrices, found = copies(matrix, chosen.copies_bytes), {}
    for count in chosen.tokens:
        x = torch.randn(count, columns, device=chosen.device, dtype=chosen.dtype)
        calls: list[Work] = [lambda m=m, x=x: torch.nn.functional.linear(x, m) for m in matrices]
        found[count] = seconds(calls, chosen.device)
    return found


def bandwidth(chosen: Setting) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(max(chosen.copies_bytes, 1 << 20), dtype=torch.uint8, device=chosen.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)], chosen.device)


def crossover(runs: list[dict[str, Any]]) -> int | None:
    """The least number of tokens from which on decoding is faster in all runs; None if there is none."""
    slower = [
        run["tokens"]
        for run in runs
        if run["seconds"].get("stream", float("inf")) < run["seconds"]["decoded"]
    ]
    beyond = [run["tokens"] for run in runs if run["tokens"] > max(slower, default=0)]
    return min(beyond, default=None)


def measured(chosen: Setting) -> dict[str, Any]:
    """All figures."""
    copied, runs = bandwidth(chosen), []
    for matrix, (rows, columns, number) in chosen.shapes.items():
        plain = dense(rows, columns, chosen)
        for form in FORMS:
            weight = packed(rows, columns, form, chosen.device)
            facts = {"matrix": matrix, "form": form[0], "bits": form[1], "in_block": number}
            for run in products(weight, chosen):
                took, bytes_read = run["seconds"], weight.stream.numel()
                run |= {"dense_seconds": plain[run["tokens"]], "bytes": bytes_read}
                run["bandwidth_share"] = bytes_read / took.get("stream", took["packed"]) / copied
                runs.append(facts | run)
    blocks = []
    for name, bits, *_ in FORMS:
        for count in chosen.tokens:
            some = [r for r in runs if (r["form"], r["bits"], r["tokens"]) == (name, bits, count)]
            ours, theirs = (
                sum(r["in_block"] * time_of(r) for r in some)
                for time_of in (lambda r: r["seconds"]["packed"], lambda r: r["dense_seconds"])
            )
            facts = {"form": name, "bits": bits, "tokens": count}
            blocks.append({**facts, "seconds": ours, "dense_seconds": theirs, "over_dense": ours / theirs})
    return {
        "bandwidth_bytes_per_second": copied,
        "crossover_tokens": crossover(runs),
        "blocks": blocks,
        "runs": runs,
    }


def main() -> None:
    """Measure and write; on a dry run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny matrices; writes nothing")
    dry_run = parser.parse_args().dry_run
    chosen = setting(dry_run)
    torch.manual_seed(0)
    with torch.no_grad():
        found = measured(chosen)
    if dry_run:
        print(json.dumps(found, indent=1))
    else:
        save("gpu_runtime", "python benchmarks/gpu_runtime.py", {"rounds": ROUNDS, **found}, device="cuda")


if __name__ == "__main__":
    main()
