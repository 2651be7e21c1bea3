"""Methods of transformers' models, adapted to packed parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pocketllm.errors import OutputError
from pocketllm.format.checkpoint import REPORT_NAME
from pocketllm.runtime.layers import make_dense, packed_matrices, stand_ins
from pocketllm.source.model_class import input_embedding, output_head, shared_modules


def initialize(model: Any) -> None:
    """Initialize what no file holds, as transformers does, except packed parameters."""
    with stand_ins(model):
        type(model).initialize_weights(model)


def tie(model: Any, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
    """Tie parameters as transformers does, except packed ones, which have been tied since loading."""
    packed = packed_matrices(model)
    if recompute_mapping:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    ties = model.all_tied_weights_keys or {}
    model.all_tied_weights_keys = {name: source for name, source in ties.items() if source not in packed}
    type(model).tie_weights(model, missing_keys=missing_keys, recompute_mapping=False)


def run_experts_one_by_one(model: Any) -> None:
    """Let fused experts that stay packed run by the loop of their class, which slices the chosen ones.

    What transformers takes by default multiplies with all of them at once, so they would be decoded.
    """
    fused = any(len(matrix.entry.shape) == 3 for matrix in packed_matrices(model).values())
    if fused and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def stored_once(model: Any, state: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The tensors to save of a model that holds modules under several names, each under the first of them.

    transformers refuses to save such a model.

    Args:
        state: the tensors by name; None takes the model's.

    Returns:
        `state` itself if no module has two names.
    """
    again = tuple(f"{path}." for path in shared_modules(model))
    if not again:
        return state
    tensors = model.state_dict() if state is None else state
    return {name: value for name, value in tensors.items() if not name.startswith(again)}


def resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any
) -> Any:
    """Resize embedding and head as transformers does; both are dense from then on."""
    embedding = input_embedding(model)
    assert embedding is not None
    rows = embedding.weight.shape[0]  # type: ignore[index]
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        make_dense(embedding, output_head(model))
    cls: Any = type(model)
    return cls.resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, **options)


def save(model: Any, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
    """`save_pretrained` of transformers, except over a model that pocketllm has written.

    Raises:
        OutputError: the report there would no longer match the files, so that nothing could load them.
    """
    if os.path.lexists(Path(save_directory) / REPORT_NAME):
        raise OutputError(
            f"{save_directory}: contains a model with a report ({REPORT_NAME}), which save_pretrained does not "
            "update, so that the folder could not be verified afterwards; save to another folder"
        )
    return type(model).save_pretrained(model, save_directory, *arguments, **options)
