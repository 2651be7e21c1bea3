"""Export a compressed model as an ordinary dense one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pocketllm.errors import FormatError, OutputError, reason_of
from pocketllm.files import write_json
from pocketllm.format.checkpoint import folder_bytes
from pocketllm.format.kept import system_errors
from pocketllm.format.output import check_output, is_published, named_output
from pocketllm.format.workspace import Workspace, locked
from pocketllm.runtime.model_methods import stored_once
from pocketllm.source.folder import copy_file_mode
from pocketllm.torch_state import in_default_torch_state


@in_default_torch_state
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
    from pocketllm.runtime.load_model import load

    output = named_output(output)
    check_output(output, marker=None)
    model, tokenizer = load(folder, mode="dense", dtype=dtype, trust_remote_code=trust_remote_code)
    return save_dense(model, tokenizer, output)


def save_dense(
    model: Any, tokenizer: Any, output: Path, record: Mapping[str, Mapping[str, Any]] | None = None
) -> int:
    """Write a compressed model that was loaded in mode `dense` as an ordinary dense one.

    Args:
        record: JSON files to add to the folder, by name.

    Returns:
        Bytes written.

    Raises:
        OutputError: the output cannot be written.
    """
    del model.hf_quantizer
    del model.config.quantization_config
    model._weight_conversions = None  # so that saving restores the names of the original checkpoint
    try:
        work = Workspace.at(output, {"method": "export"})
        with locked(work.folder):
            try:
                if not is_published(output):  # by an earlier run that was killed afterwards
                    _save(model, tokenizer, work.folder / "final", record or {})
                    work.publish(output)
            finally:  # nothing of it can be resumed
                if work.folder.exists():
                    work.drop()
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror or error}); free some space, or choose another folder"
        ) from error
    return folder_bytes(output)


def _save(model: Any, tokenizer: Any, final: Path, record: Mapping[str, Mapping[str, Any]]) -> None:
    shutil.rmtree(final, ignore_errors=True)
    try:
        with system_errors(final):
            model.save_pretrained(final, state_dict=stored_once(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(final)
    except OSError:
        raise
    except Exception as error:  # transformers checks settings when it saves them
        raise FormatError(
            f"{model.name_or_path}: transformers cannot save the decoded model ({reason_of(error)}); correct its "
            "config.json or generation_config.json"
        ) from error
    copy_file_mode(final, "config.json")
    for name, facts in record.items():
        write_json(final / name, facts)
