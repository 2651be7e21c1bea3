"""Check that a model in memory is the compressed one, so that the right model is measured."""

from __future__ import annotations

from typing import Any

import torch

from pocketllm.errors import LoadError
from pocketllm.torch_state import in_default_torch_state

_DECODED_AGAIN = 8


@in_default_torch_state
def verify_compressed(model: Any, sample: int = _DECODED_AGAIN) -> int:
    """Check that every matrix in a model's layout is compressed in memory; returns their number.

    Args:
        model: as returned by `pocketllm.load`, in either mode.
        sample: number of matrices, evenly spread, that are decoded again and compared with the weights that the
            layers use.

    Raises:
        LoadError: the model or a matrix is not compressed, or a layer uses another weight.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if not hasattr(quantizer, "packed"):
        raise LoadError("the model was not loaded by pocketllm; load it with pocketllm.load")
    packed = quantizer.packed(model)
    named = list(quantizer.quantization_config.layout().matrices)
    missing = [name for name in named if name not in packed]
    if missing:
        raise LoadError(f"{missing[0]}: is not compressed in memory ({len(missing)} of {len(named)})")
    for name in named[:: max(1, len(named) // sample)]:
        parent, _, leaf = name.rpartition(".")
        weight = getattr(model.get_submodule(parent), leaf)
        if not torch.equal(packed[name]().to(weight.device, weight.dtype), weight):
            raise LoadError(
                f"{name}: the layer does not compute with the compressed weight; it was changed after "
                "loading, load the model again"
            )
    return len(named)
