"""Activations of all windows between two blocks: a list in memory, or one on disk, of which one batch is in memory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, overload

import torch
from torch import Tensor

from pocketllm.format.workspace import cannot_keep


class Activations(Protocol):
    """What is needed of a list of batches."""

    def append(self, value: Tensor, /) -> None: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    @overload
    def __getitem__(self, at: int, /) -> Tensor: ...

    @overload
    def __getitem__(self, at: slice, /) -> list[Tensor]: ...


class SpooledActivations:
    """Batches on disk, each read when it is asked for, with the bits that were appended; the files go with the object.

    Args:
        folder: in which a temporary folder is made. device: of what is read.

    Raises:
        OutputError: they cannot be written.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=folder))
        except OSError as error:
            raise cannot_keep(folder, error) from error
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._device = device
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def append(self, value: Tensor, /) -> None:
        """Write one more batch."""
        path = self._path(len(self))
        try:
            path.write_bytes(value.detach().contiguous().cpu().view(torch.uint8).numpy().data)
        except OSError as error:
            raise cannot_keep(path, error) from error
        self._kinds.append((value.shape, value.dtype))

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, at: int, /) -> Tensor: ...

    @overload
    def __getitem__(self, at: slice, /) -> list[Tensor]: ...

    def __getitem__(self, at: int | slice, /) -> Tensor | list[Tensor]:
        numbers = range(len(self))[at]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        shape, dtype = self._kinds[numbers]
        content = bytearray(self._path(numbers).read_bytes())
        return torch.frombuffer(content, dtype=dtype).view(shape).to(self._device)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.bin"


def spooled(values: Activations, folder: Path, device: torch.device | str) -> SpooledActivations:
    """Batches on disk; themselves if they already are."""
    if isinstance(values, SpooledActivations):
        return values
    made = SpooledActivations(folder, device)
    for value in values:
        made.append(value)
    return made
