"""Jobs that encode matrices of a block, several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from pocketllm.codec.kernels.path_batches import PathBatches
from pocketllm.plan.matrices import Matrix

MOST_PARALLEL = 4
"""Jobs at once; each takes memory of its own."""
WEIGHT_BYTES = ROW_PAIR_BYTES = 48
"""Memory of a job per weight of its matrix, and per number of G: about a dozen float32 copies."""


def most_parallel(matrices: Sequence[Matrix], device: torch.device) -> int:
    """How many of some matrices are encoded at once: on a GPU no more than its free memory holds."""
    if device.type != "cuda" or not matrices:
        return MOST_PARALLEL
    needed = max(WEIGHT_BYTES * m.weights + ROW_PAIR_BYTES * m.rows**2 for m in matrices)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    return max(1, min(MOST_PARALLEL, free // needed))


def _searching_together(jobs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    """Jobs for threads, on the GPU of this thread."""
    batches, gpu = PathBatches(), torch.cuda.current_device()

    def run(job: Callable[[], None]) -> None:
        with torch.cuda.device(gpu), batches.member():
            job()

    return [partial(run, job) for job in jobs]


def run_parallel(
    jobs: Sequence[Callable[[], None]], device: torch.device | str, of: int = 0, most: int = MOST_PARALLEL
) -> Iterator[None]:
    """Run jobs that do not depend on each other; yields before each, and ends when all are done.

    On a CPU some run at once and share the threads: jobs of many small operations gain little from threads of
    their own. Results depend only on the number of threads. On a GPU some run at once, so that paths are searched for
    all of them in one launch; results do not depend on that.

    Args:
        of: number of jobs that these are a part of, which decides how many threads each has.
        most: jobs at once.
    """
    threads, jobs = torch.get_num_threads(), [torch.no_grad()(job) for job in jobs]
    on_gpu = torch.device(device).type == "cuda"
    workers = min(len(jobs), most) if on_gpu else min(threads, max(of, len(jobs)), most)
    if on_gpu and workers > 1:
        jobs = _searching_together(jobs)
    if workers < 2:
        for job in jobs:
            yield
            job()
        return
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    ) as pool:
        try:
            for running in [pool.submit(job) for job in jobs]:
                yield
                running.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # which threads started later would take over
