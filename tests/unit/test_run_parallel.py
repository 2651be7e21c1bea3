"""Parallel jobs: threads per job, the order of progress, and failures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from pocketllm.compression.matrix_jobs import run_parallel


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "jobs", "each"), [(1, 3, 1), (2, 3, 1), (4, 2, 2), (8, 5, 2), (3, 1, 3)])
def test_threads_are_shared(threads: int, jobs: int, each: int) -> None:
    torch.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    reported = list(
        run_parallel([lambda n=n: seen.append((n, torch.get_num_threads())) for n in range(jobs)], "cpu")
    )
    assert len(reported) == jobs
    assert sorted(seen) == [(n, each) for n in range(jobs)]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_that_fails_ends_it(threads: int) -> None:
    torch.set_num_threads(threads)
    done: list[int] = []

    def job(number: int) -> None:
        if number == 1:
            raise ValueError("second")
        done.append(number)

    with pytest.raises(ValueError, match="second"):
        list(run_parallel([partial(job, number) for number in range(3)], "cpu"))
    assert 0 in done and torch.get_num_threads() == threads


def test_no_gradients_inside() -> None:
    torch.set_num_threads(2)
    seen: list[bool] = []
    list(run_parallel([lambda: seen.append(torch.is_grad_enabled())] * 2, "cpu"))
    assert seen == [False, False]
