"""Threads that search for paths together: the same paths as alone, and failures that keep nobody waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Barrier
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import factorize
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import cpu, reference, select
from pocketllm.codec.kernels.path_batches import PathBatches
from pocketllm.codec.kernels.reference import PathProblem
from pocketllm.compression import matrix_jobs
from pocketllm.compression.matrix_jobs import run_parallel

Jobs = list[Callable[[], None]]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many problems each launch of a kernel has; the kernel is the reference, on a CPU."""
    found: list[int] = []

    class Kernel(ModuleType):
        cheapest_paths = staticmethod(reference.cheapest_paths)

        @staticmethod
        def cheapest_paths_of(problems: Sequence[PathProblem]) -> list[Tensor]:
            found.append(len(problems))
            return [reference.cheapest_paths(problem) for problem in problems]

    kernel = Kernel("kernel")
    monkeypatch.setattr(cpu, "searches", lambda problem: False)
    monkeypatch.setattr(select, "_triton", lambda device: kernel)
    monkeypatch.setattr(select, "_agrees", lambda *case: True)
    yield found


def matrices() -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Matrices of different shapes and rates, with error feedback on both sides."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, stride in ((24, 12, 2), (9, 8, 2), (16, 12, 3), (20, 6, 2), (8, 12, 2)):
        weight, table = (torch.randn(n, generator=generator) for n in ((rows, columns), (64, 2)))
        x, y = (torch.randn(50, n, generator=generator) for n in (columns, rows))
        factor, outputs = factorize(x.T @ x / 50, 2, 0.01), factorize(y.T @ y / 50, 1, 0.3)
        form = Trellis(6, stride, strip_rows=8)
        yield partial(assign, weight, factor, table, torch.ones(rows), form, outputs=outputs)


def test_matrices_encoded_together_are_those_encoded_alone(sizes: list[int]) -> None:
    alone = [encode() for encode in matrices()]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def job(number: int, encode: Callable[[], tuple[Tensor, Tensor]]) -> None:
        found[number] = encode()

    jobs: Jobs = [partial(job, *numbered) for numbered in enumerate(matrices())]
    assert len(list(run_parallel(jobs, "cuda"))) == len(alone)
    assert max(sizes) > 1 and sorted(found) == list(range(len(alone)))
    for number, (indices, scale) in enumerate(alone):
        assert torch.equal(found[number][0], indices) and torch.equal(found[number][1], scale)


def empty_problem() -> PathProblem:
    nothing = torch.empty(0)
    return PathProblem(*[nothing] * 8, lengths=[], lookahead=[], width=6, stride=2)


def test_a_search_that_fails_ends_all_who_wait() -> None:
    def broken(problems: Sequence[PathProblem]) -> list[Tensor]:
        raise RuntimeError("out of memory")

    batches, entered, failed = PathBatches(), Barrier(2, timeout=30), list[int]()

    def job(number: int) -> None:
        with batches.member():
            entered.wait()
            with pytest.raises(RuntimeError, match="out of memory"):
                batches.search(empty_problem(), broken)
            failed.append(number)

    list(run_parallel([partial(job, number) for number in range(2)], "cuda"))
    assert sorted(failed) == [0, 1]


def test_nobody_waits_for_a_job_that_ended() -> None:
    """Neither for one that failed, which then ends all."""
    batches, entered, found = PathBatches(), Barrier(3, timeout=30), list[float]()

    def searches() -> None:
        with batches.member():
            entered.wait()
            found.append(float(batches.search(empty_problem(), lambda ps: [torch.tensor(len(ps))] * len(ps))))

    def fails() -> None:
        with batches.member():
            entered.wait()
            raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        list(run_parallel([searches, searches, fails], "cuda"))
    assert found == [2, 2]


def test_as_many_matrices_at_once_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shape:
        def __init__(self, rows: int, columns: int) -> None:
            self.rows, self.weights = rows, rows * columns

    gpu, some = torch.device("cuda"), [Shape(4096, 4096), Shape(11008, 4096)]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 30)
    for free, most in ((1, 1), (16, 2), (100, 4)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free << 30, 1 << 40))
        assert matrix_jobs.most_parallel(some, gpu) == most  # type: ignore[arg-type]
    assert matrix_jobs.most_parallel(some, torch.device("cpu")) == 4  # type: ignore[arg-type]
