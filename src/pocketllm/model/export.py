"""Write a compressed model as an ordinary dense one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pocketllm.errors import OutputError
from pocketllm.model.checkpoint import folder_bytes
from pocketllm.model.workspace import system_errors


def export(folder: Path, output: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> int:
    """Decode a compressed model into a dense safetensors checkpoint under the names tools expect.

    Args:
        folder: the compressed model. output: folder to make; must not exist or be empty.
        dtype: of the dense weights.

    Returns:
        Bytes written.

    Raises:
        OutputError: the output exists or cannot be written.
        FormatError: the compressed model is damaged.
    """
    from pocketllm.integrations.transformers import load

    check_empty(output)
    model, tokenizer = load(folder, mode="dense", dtype=dtype, trust_remote_code=trust_remote_code)
    return save_dense(model, tokenizer, output)


def check_empty(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        OutputError: it exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output}: exists; choose another output folder")


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
    temporary = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with system_errors(output):
            model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder_bytes(output)
