"""Searches for paths that several threads ask for at the same time, run as one.

On a GPU the strips of one matrix are too few to fill it. Matrices that do not depend on each other are therefore
encoded in threads, and each thread waits for its paths until all of them have asked for theirs. The search of a strip
does not depend on those with it, so that paths are the same as without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from pocketllm.codec.kernels.reference import PathProblem

Search = Callable[[Sequence[PathProblem]], list[Tensor]]


@dataclass(eq=False)
class _Request:
    problem: PathProblem
    found: Tensor | None = None
    error: BaseException | None = None

    @property
    def is_answered(self) -> bool:
        return self.found is not None or self.error is not None


class PathBatches:
    """The threads whose searches are run together."""

    def __init__(self) -> None:
        self._changed, self._members = threading.Condition(), 0
        self._waiting: list[tuple[_Request, Search]] = []

    @contextmanager
    def member(self) -> Iterator[None]:
        """Inside this, the others wait for the searches of this thread."""
        with self._changed:
            self._members += 1
        token = _batches.set(self)
        try:
            yield
        finally:
            _batches.reset(token)
            with self._changed:
                self._members -= 1
                self._answer_if_complete()

    def search(self, problem: PathProblem, search: Search) -> Tensor:
        """Paths of a problem, found by `search` together with those that the other threads ask for.

        Raises:
            whatever `search` does, in every thread that waited for it.
        """
        request = _Request(problem)
        with self._changed:
            self._waiting.append((request, search))
            self._answer_if_complete()
            self._changed.wait_for(lambda: request.is_answered)
        if request.error is not None:
            raise request.error
        assert request.found is not None
        return request.found

    def _answer_if_complete(self) -> None:
        """Search, if every member waits."""
        if not self._waiting or len(self._waiting) < self._members:
            return
        asked, self._waiting = self._waiting, []
        requests, search = [request for request, _ in asked], asked[0][1]
        try:
            found = search([request.problem for request in requests])
        except BaseException as error:
            for request in requests:
                request.error = error
        else:
            for request, paths in zip(requests, found, strict=True):
                request.found = paths
        self._changed.notify_all()


_batches: ContextVar[PathBatches | None] = ContextVar("_batches", default=None)


def current() -> PathBatches | None:
    """The batches that this thread is a member of."""
    return _batches.get()
