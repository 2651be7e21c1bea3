"""The logits of a window, in parts if the vocabulary is so large that those of all positions would fill the memory.

The blocks run once. For every part the model is called again, its body replaced by one that gives the same hidden
states, so that head, scaling and soft-capping are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 26
"""Numbers; 256 MB in float32."""


def logit_parts(model: Any, ids: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of all positions of a window but the last.

    Args:
        model: transformers causal language model. ids: [1, context].

    Yields:
        (positions, their logits [positions, vocabulary]), in order. The parts depend on the context and the size of
        the vocabulary alone.
    """
    count = ids.shape[1] - 1
    at_once = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    body = getattr(model, "base_model", model)
    if (
        count <= at_once
        or body is model
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        yield slice(0, count), model(ids, use_cache=False).logits[0, :-1]
        return
    found = body(ids, use_cache=False)
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        yield part, _head(model, body, found, ids, torch.arange(part.start, part.stop, device=ids.device))


def _head(model: Any, body: Any, found: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of some positions for what the body of a model gave."""
    own = body.__dict__.get("forward")
    body.forward = lambda *arguments, **options: found
    try:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=positions).logits[0]
    finally:
        del body.forward
        if own is not None:
            body.forward = own
    return logits
