"""Export a compressed model as an ordinary dense one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from pocketllm.errors import OutputError
from pocketllm.format.checkpoint import folder_bytes
from pocketllm.format.workspace import check_output, system_errors
from pocketllm.source.folder import copy_file_mode


def export(folder: Path, output: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Decode a compressed model into a dense safetensors checkpoint under the names tools expect.

    Args:
        folder: the compressed model. output: folder to create; must not exist or must be empty.
        dtype: of the dense weights.

    Returns:
        Bytes written.

    Raises:
        OutputError: the output exists or cannot be written.
        FormatError: the compressed model is damaged.
    """
    from pocketllm.runtime.transformers_plugin import load

    check_output(output, marker=None)
    model, tokenizer = load(folder, mode="dense", dtype=dtype, trust_remote_code=trust_remote_code)
    return save_dense(model, tokenizer, output)


def save_dense(model: Any, tokenizer: Any, output: Path) -> int:
    """Write a model that was loaded compressed, in mode `dense`, as an ordinary one.

    Returns:
        Bytes written.

    Raises:
        OutputError: the output cannot be written.
    """
    del model.hf_quantizer
    del model.config.quantization_config
    model._weight_conversions = None  # so that saving restores the names of the original checkpoint
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # A unique name, so that no other file next to the output is deleted.
        with tempfile.TemporaryDirectory(prefix=".pocketllm-", dir=output.parent) as place:
            whole = Path(place) / "model"  # within, since the place itself is closed to others
            with system_errors(output):
                model.save_pretrained(whole)
            copy_file_mode(whole, "config.json")
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            if output.is_dir():
                output.rmdir()
            whole.rename(output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space, or choose another folder"
        ) from error
    return folder_bytes(output)
