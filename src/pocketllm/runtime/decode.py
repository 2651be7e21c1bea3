"""Decode single matrices of a compressed model, without building the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pocketllm.errors import FormatError
from pocketllm.format.checkpoint import STORE, Layout, read_layout
from pocketllm.format.trust import check_sizes, weights_of
from pocketllm.runtime.layers import PackedMatrix, Store


@dataclass
class Matrices:
    """The matrices of a compressed model, decoded one at a time.

    Example:
        >>> matrices = Matrices.open(Path("smol-8x"))
        >>> matrices.read("model.layers.0.mlp.up_proj.weight").shape
        torch.Size([1536, 576])
    """

    layout: Layout
    store: Store
    _files: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Matrices:
        """Read the codebooks and decoders of a compressed model.

        Raises:
            FormatError: not a compressed model, a file that cannot be read, or a tensor that is missing.
        """
        layout = read_layout(folder)
        files: dict[str, Any] = {}
        weights = weights_of(folder)
        check_sizes(layout, sum(path.stat().st_size for path in weights), folder / "config.json")
        for path in weights:
            try:
                handle = safe_open(str(path), framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
            files.update(dict.fromkeys(handle.keys(), handle))
        matrices = cls(layout, Store(layout), files)
        matrices._fill(matrices.store, STORE)
        return matrices

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A decoded parameter, in its shape in the model.

        Raises:
            FormatError: its tensors are missing or of another size than the layout says.
        """
        return self.packed(name, dtype)()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, compressed or not, in the model."""
        entry = self.layout.matrices.get(name)
        return tuple(self._files[name].get_slice(name).get_shape()) if entry is None else entry.shape

    def stored(self, name: str) -> Tensor:
        """A parameter that is not compressed, as it is stored."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def indices(self, name: str) -> Tensor:
        """[rows, n] int32: the index of every subvector of a matrix.

        Raises:
            FormatError: as `read`.
        """
        return self.packed(name, torch.float32).unpacked()

    def codewords(self, name: str) -> Tensor:
        """[rows, n]: the codeword of every subvector of a matrix (on a hashed trellis: that of its first number).

        Raises:
            FormatError: as `read`.
        """
        packed = self.packed(name, torch.float32)
        return packed.form.codewords(packed.unpacked())

    def names(self) -> Iterable[str]:
        """Names of the compressed parameters."""
        return self.layout.matrices

    def parameters(self) -> Iterator[str]:
        """Names of all stored parameters, compressed or not, in the order of the files."""
        parts = self.layout.tensors()
        for key in self._files:
            name = key.removesuffix(".indices")
            if name in self.layout.matrices:
                yield name
            elif key not in parts:
                yield key

    def packed(self, name: str, dtype: torch.dtype) -> PackedMatrix:
        """A compressed parameter that stays packed, and decodes to a dtype.

        Raises:
            FormatError: as `read`.
        """
        packed = PackedMatrix(self.layout.matrices[name], self.store, dtype)
        self._fill(packed, name)
        return packed

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its stored buffers."""
        for path, owner in module.named_modules():
            for key, buffer in list(owner._buffers.items()):
                name = ".".join(part for part in (prefix, path, key) if part)
                if name not in self._files:
                    raise FormatError(f"{name}: no file contains it; fetch the model again")
                stored = self._files[name].get_tensor(name)
                assert buffer is not None
                if stored.shape != buffer.shape or stored.dtype != buffer.dtype:
                    raise FormatError(
                        f"{name}: stored as {stored.dtype} {tuple(stored.shape)}, wanted {buffer.dtype} "
                        f"{tuple(buffer.shape)}; fetch the model again"
                    )
                owner._buffers[key] = stored
