"""The list of blocks of a model: find it, check it, replace its blocks by stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.errors import ConfigError, PocketError
from pocketllm.source.model_class import find_blocks, shared_modules

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block other than the activations."""
Record = Callable[[int, Tensor, Call], Any]
"""Called with the number of a block and its arguments; what it returns is what the block returns."""


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The blocks of a model that is calibrated, with their path.

    Raises:
        ConfigError: a model without such a list.
    """
    found = find_blocks(model)
    if found is None:
        raise refusal(model, "has no single list of blocks")
    return found


def check_shared(model: Any, path: str) -> None:
    """See that no module belongs to several blocks, or to a block and what lies outside.

    Args:
        path: of the list of blocks.

    Raises:
        ConfigError: one does; names its paths.
    """

    def block(name: str) -> str:
        return name.removeprefix(f"{path}.").partition(".")[0] if name.startswith(f"{path}.") else ""

    for name, first in shared_modules(model).items():
        if block(name) != block(first) and model.get_submodule(first)._parameters:
            raise refusal(model, f"runs one module as {first} and as {name}")


def refusal(model: Any, reason: str) -> ConfigError:
    """The error on a model that cannot be run block by block."""
    return ConfigError(
        f"calibration: {type(model).__name__} {reason}; use a preset without calibration (lookup-8x)"
    )


@contextmanager
def refused(model: Any, reason: str) -> Iterator[None]:
    """Make a `refusal` of whatever a model raises in a `with` statement."""
    try:
        yield
    except PocketError:
        raise
    except Exception as error:
        raise refusal(model, reason) from error


@contextmanager
def standing_in(blocks: nn.ModuleList, record: Record) -> Iterator[None]:
    """Replace the blocks by stand-ins that call `record`, for the duration of a `with` statement."""
    real = list(blocks)
    for number, block in enumerate(real):
        blocks[number] = _StandIn(block, number, record)
    try:
        yield
    finally:
        for number, block in enumerate(real):
            blocks[number] = block


class _StandIn(nn.Module):
    """Has the attributes of a block, and calls `record` with (number, hidden, other arguments) instead."""

    def __init__(self, block: nn.Module, number: int, record: Record) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if not k.startswith("_")})
        self._modules.update(block._modules)
        self.__dict__["record"] = lambda hidden, call: record(number, hidden, call)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["record"](hidden, (args, kwargs))


def shared_with(value: Any, earlier: Any) -> Any:
    """A value with its tensors replaced by equal ones of an earlier value: masks and positions of most batches are."""
    if isinstance(value, Tensor) and isinstance(earlier, Tensor):
        is_alike = value.shape == earlier.shape and value.dtype == earlier.dtype
        return earlier if value is earlier or (is_alike and torch.equal(value, earlier)) else value
    if isinstance(value, tuple) and isinstance(earlier, tuple) and len(value) == len(earlier):
        return tuple(map(shared_with, value, earlier))
    if isinstance(value, dict) and isinstance(earlier, dict) and value.keys() == earlier.keys():
        return {key: shared_with(each, earlier[key]) for key, each in value.items()}
    return value


class CaughtError(Exception):
    """Raised by a `Record` to end the run of a model early."""
