"""Packed tensors read from weight files directly, after transformers has loaded everything else.

transformers spends more time on a tensor than reading most of the packed ones takes, since each gets a pattern for its
name and a thread. It still fills them where it decides on devices (several of them, `auto`) or was given the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pocketllm.format.layout import STORE
from pocketllm.runtime.layers import PackedMatrix, Store, packed_matrices


@dataclass(frozen=True)
class Unread:
    """The packed tensors of a model, out of transformers' sight until `read`.

    Args:
        store: of the model, not part of it meanwhile. names: parameter -> its name in the files.
        matrices: by parameter, without their tensors meanwhile. parts: parameter -> those, on the meta device.
    """

    files: tuple[Path, ...]
    device: torch.device
    store: Store
    names: Mapping[str, str]
    matrices: Mapping[str, PackedMatrix]
    parts: Mapping[str, Mapping[str, Tensor | None]]

    @classmethod
    def of(cls, model: nn.Module, files: Any, device_map: Any, names: Mapping[str, str]) -> Unread | None:
        """Hide the packed tensors of a model; None if transformers has to fill them.

        Args:
            files: that transformers reads; None if it was given tensors. device_map: as it has been resolved so far.
        """
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
        if not files or len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential"}:
            return None
        parts, matrices = {}, packed_matrices(model)
        for name, matrix in matrices.items():
            parts[name], matrix._buffers = matrix._buffers, {}
        store = model._modules.pop(STORE)
        assert isinstance(store, Store)
        return cls(tuple(map(Path, files)), torch.device(devices.pop()), store, names, matrices, parts)

    def stored_names(self) -> set[str]:
        """Names of the hidden tensors in the files, and as transformers renames them."""
        found = {f"{STORE}.{name}" for name, _ in self.store.named_buffers()}
        for name, parts in self.parts.items():
            found.update(f"{stem}.{part}" for stem in (name, self.names[name]) for part in parts)
        return found

    def are_others_of(self, model: nn.Module, hidden: Collection[str]) -> bool:
        """Whether all tensors in the files but the hidden ones have name and shape of a parameter or buffer."""
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        with ExitStack() as opened:
            handles = [opened.enter_context(safe_open(str(file), framework="pt")) for file in self.files]
            others = ((handle, name) for handle in handles for name in handle.keys() if name not in hidden)  # noqa: SIM118
            return all(handle.get_slice(name).get_shape() == shapes.get(name) for handle, name in others)

    def read(self, model: nn.Module) -> None:
        """Give the model its packed tensors; those that no file holds stay on the meta device."""
        model.add_module(STORE, self.store.eval())
        with ExitStack() as opened:
            handles: dict[str, Any] = {}
            for file in self.files:
                handle = opened.enter_context(safe_open(str(file), framework="pt"))
                handles.update(dict.fromkeys(handle.keys(), handle))
            owners: list[tuple[str, nn.Module]] = []
            for name, matrix in self.matrices.items():
                matrix._buffers = dict(self.parts[name])
                owners.append((self.names[name], matrix))
            owners += [(f"{STORE}.{path}", module) for path, module in self.store.named_modules()]
            for stem, owner in owners:
                for part in owner._buffers:
                    handle = handles.get(f"{stem}.{part}")
                    if handle is not None:
                        owner._buffers[part] = handle.get_tensor(f"{stem}.{part}").to(self.device)
