"""Parameters that hold the matrices of all experts of a block: [experts, ., .], or [experts * ., .] in one matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

_COUNT = re.compile(r"(.*_)?num(_local)?_experts|n(_routed)?_experts")
_SIZES = (("input_size", "output_size"), ("in_features", "out_features"))
"""Names under which a class of experts may declare the sizes of one."""


@dataclass(frozen=True)
class Experts:
    """count: of the experts. rows, columns: outputs and inputs of one, as it is encoded. transposed: stored as
    [inputs, outputs].
    """

    count: int
    rows: int
    columns: int
    transposed: bool = False


def find_experts(module: Any, name: str, shape: tuple[int, ...], hidden: int | None) -> Experts | None:
    """The experts that a parameter of a block holds; None if it holds none.

    "expert" must occur in the name of the parameter or of its module's class, and the module must not be one of
    torch's own layers. Experts in one matrix are encoded as they are stored, whatever their forward does with them.

    Args:
        hidden: size of the model's hidden states.
    """
    if "expert" not in f"{name} {type(module).__name__}".lower() or isinstance(module, _torch_layers()):
        return None
    if min(shape[-2:], default=0) < 2 or "bias" in name.rpartition(".")[2]:
        return None  # a scale or bias of each expert
    if len(shape) == 3:
        experts, rows, columns = shape
        if _is_transposed(module, name.rpartition(".")[2], rows, columns, hidden):
            return Experts(experts, columns, rows, True)
        return Experts(experts, rows, columns)
    if len(shape) != 2:
        return None
    counts = {
        value for key, value in vars(module).items() if isinstance(value, int) and _COUNT.fullmatch(key)
    }
    count = counts.pop() if len(counts) == 1 else 0
    # [experts, n] is a bias, or a router.
    is_stack = count > 1 and shape[0] % count == 0 and shape[0] > count
    return Experts(count, shape[0] // count, shape[1]) if is_stack else None


def _torch_layers() -> tuple[type, ...]:
    return (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def _is_transposed(module: Any, leaf: str, rows: int, columns: int, hidden: int | None) -> bool:
    """Whether experts are stored as [experts, inputs, outputs].

    If the module declares neither this nor their sizes, the position of the hidden size decides.
    """
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said)
    for inputs, outputs in _SIZES:
        declared = getattr(module, inputs, None), getattr(module, outputs, None)
        if declared in ((columns, rows), (rows, columns)):
            return declared != (columns, rows)
    outputs_first = leaf.startswith("down")
    return rows != columns and (columns if outputs_first else rows) == hidden
