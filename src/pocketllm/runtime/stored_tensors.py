"""Packed tensors read from weight files directly, after transformers has loaded everything else.

transformers spends more time on a tensor than reading most of the packed ones takes, since each gets a pattern for its
name and a thread. It still fills them where it decides on devices (several of them, `auto`) or was given the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from pocketllm.format.layout import STORE
from pocketllm.runtime.layers import Store, packed_matrices


@dataclass(frozen=True)
class Unread:
    """The packed tensors of a model, out of transformers' sight until `read`.

    Args:
        store: of the model, not part of it meanwhile. names: parameter -> its name in the files.
    """

    files: tuple[Path, ...]
    device: torch.device
    store: Store
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, files: Any, device_map: Any, names: Mapping[str, str]) -> Unread | None:
        """Hide the packed tensors of a model; None if transformers has to fill them.

        Args:
            files: that transformers reads; None if it was given tensors. device_map: as it has been resolved so far.
        """
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
        if not files or len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential"}:
            return None
        for matrix in packed_matrices(model).values():
            matrix._non_persistent_buffers_set.update(matrix._buffers)
        store = model._modules.pop(STORE)
        assert isinstance(store, Store)
        return cls(tuple(map(Path, files)), torch.device(devices.pop()), store, names)

    def stored_names(self, model: nn.Module) -> set[str]:
        """Names of the hidden tensors in the files, and as transformers renames them."""
        found = {f"{STORE}.{name}" for name, _ in self.store.named_buffers()}
        for name, matrix in packed_matrices(model).items():
            found.update(f"{stem}.{part}" for stem in (name, self.names[name]) for part in matrix._buffers)
        return found

    def read(self, model: nn.Module) -> None:
        """Give the model its packed tensors; those that no file holds stay on the meta device."""
        model.add_module(STORE, self.store)
        with ExitStack() as opened:
            handles: dict[str, Any] = {}
            for file in self.files:
                handle = opened.enter_context(safe_open(str(file), framework="pt"))
                handles.update(dict.fromkeys(handle.keys(), handle))
            owners: list[tuple[str, nn.Module]]
            owners = [(self.names[name], matrix) for name, matrix in packed_matrices(model).items()]
            owners += [(f"{STORE}.{path}", module) for path, module in self.store.named_modules()]
            for stem, owner in owners:
                for part, empty in owner._buffers.items():
                    assert empty is not None
                    handle = handles.get(f"{stem}.{part}")
                    value = empty.to("meta") if handle is None else handle.get_tensor(f"{stem}.{part}")
                    owner._buffers[part] = value if value.is_meta else value.to(self.device)
                owner._non_persistent_buffers_set.clear()
