"""Fast computation: the dtype of a model's matrix products, and jobs in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_MAX_PARALLEL = 4  # each needs its own memory


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 if the machine computes in it at full speed, otherwise float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = (getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if any(has) else torch.float32


def autocast(device: torch.device | str) -> torch.autocast:
    """Compute matrix products in `fast_dtype`; sums and everything else in float32."""
    dtype = fast_dtype(device)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def run_parallel(jobs: Sequence[Callable[[], None]], device: torch.device | str) -> Iterator[None]:
    """Run independent jobs; yields before each and returns when all are done.

    On a CPU several run at once and share the threads, because jobs of many small operations gain little from
    threads of their own. Results depend only on the number of threads.
    """
    threads, jobs = torch.get_num_threads(), [torch.no_grad()(job) for job in jobs]
    workers = min(threads, len(jobs), _MAX_PARALLEL)
    if torch.device(device).type != "cpu" or workers < 2:
        for job in jobs:
            yield
            job()
        return
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
    ) as pool:
        try:
            for running in [pool.submit(job) for job in jobs]:
                yield
                running.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # which threads started later would take over
