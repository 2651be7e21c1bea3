"""A compressed folder as the tensors of the dense checkpoint that it stands for, one at a time.

vLLM fuses, cuts, ties and places weights while it reads a checkpoint, by the names of the original one. With these
tensors it does so as for any other model, whatever codebook, bits and rotation each of them has. A matrix may stay
packed (vllm_parts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from pocketllm.integrations.vllm_parts import carrier
from pocketllm.runtime.decode import Matrices
from pocketllm.runtime.load_checks import verify_folder
from pocketllm.source.folder import meta_model
from pocketllm.torch_state import in_default_torch_state


@dataclass
class DenseStream:
    """The tensors of a compressed model under the names of its dense checkpoint.

    model: of transformers, on the meta device; it knows how stored names became those of its parameters.
    dtype: of decoded matrices.
    """

    matrices: Matrices
    model: Any
    dtype: torch.dtype

    @classmethod
    @in_default_torch_state
    def open(cls, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> DenseStream:
        """Verify a compressed model: checksums, and that nothing is missing or was added.

        Raises:
            FormatError: names the file, and the tensor if one is damaged.
        """
        verify_folder(folder)
        return cls(Matrices.open(folder), meta_model(folder, trust_remote_code), dtype)

    def tensors(
        self,
        is_read: Callable[[str], bool] = lambda name: True,
        stays_packed: Callable[[str], bool] = lambda name: False,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), decoded one parameter at a time.

        Args:
            is_read: whether a parameter is read at all. stays_packed: whether a matrix is not decoded, where that is
                possible. Both get names of the dense checkpoint.
        """
        for parameter in self.matrices.parameters():
            names = self._names(parameter)
            if not any(map(is_read, names)):
                continue
            if stays_packed(names[0]) and self._is_unchanged(parameter):
                yield names[0], carrier(self.matrices.packed(parameter, self.dtype))
            else:
                yield from self._converted(parameter, self._value(parameter)).items()

    def _names(self, parameter: str) -> list[str]:
        """The tensors of the dense checkpoint that a parameter becomes."""
        return list(self._converted(parameter, torch.empty(self.matrices.shape(parameter), device="meta")))

    def _is_unchanged(self, parameter: str) -> bool:
        """Whether a parameter is a compressed matrix [rows, columns] that the dense checkpoint holds as it is."""
        entry = self.matrices.layout.matrices.get(parameter)
        if entry is None or entry.transposed or len(entry.shape) != 2:
            return False
        value = torch.empty(entry.shape, device="meta")
        return next(iter(self._converted(parameter, value).values())) is value

    def _value(self, parameter: str) -> Tensor:
        if parameter in self.matrices.layout.matrices:
            return self.matrices.read(parameter, self.dtype)
        return self.matrices.stored(parameter)

    def _converted(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """What transformers makes of a parameter when it saves the model: experts apart, the original names."""
        found: dict[str, Tensor] = revert_weight_conversion(self.model, {parameter: value})
        return found
