"""Run functions independently of torch settings that other code in the process has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@contextmanager
def default_torch_state() -> Iterator[None]:
    """torch as it is when a process starts: float32, CPU, gradients, no inference mode, no autocast.

    Deterministic algorithms are off inside as well: what runs here gives the same values without them. Every setting
    is restored afterwards.
    """
    import torch

    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                # Autocasts within inherit that nothing is cached: casts of parameters are else kept until the
                # outermost one ends, whatever an optimizer has done since.
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.are_deterministic_algorithms_enabled():
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warns)
            torch.use_deterministic_algorithms(False)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread, for little work while other threads are busy: it would wait for its own to get a core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_default_torch_state(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Run a function in `default_torch_state`."""

    @wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with default_torch_state():
            return function(*args, **kwargs)

    return run
