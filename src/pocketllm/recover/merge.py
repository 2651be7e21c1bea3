"""Merge an adapter into its base, as a dense model or compressed again with the settings of the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.compression.progress import Event, ProgressCallback
from pocketllm.config import CompressConfig
from pocketllm.errors import FormatError
from pocketllm.evaluate.perplexity import perplexity
from pocketllm.evaluate.results import folder_digest
from pocketllm.files import read_object
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import check_output, named_output
from pocketllm.format.workspace import remove_published
from pocketllm.recover.adapter import check_adapter, merged, need_peft
from pocketllm.recover.base_model import Base, check_context, open_base
from pocketllm.runtime.export import save_dense
from pocketllm.source.folder import load_dense
from pocketllm.source.hub import folder_of
from pocketllm.text.default_texts import named_default
from pocketllm.text.read import read_text
from pocketllm.text.windows import token_windows
from pocketllm.torch_state import in_default_torch_state

_RECORD_NAME = "pocketllm-merged.json"


@dataclass(frozen=True)
class MergeResult:
    """Result of a merge. dense: folder of the merged dense model. bytes_before: base and adapter together.

    perplexities: measured on `text`, if there is one, for the base alone, for base and adapter merged, and for
    the model that was compressed again.
    """

    output: str
    dense: str
    bytes_before: int
    bytes_dense: int
    bytes_on_disk: int
    text: str
    perplexities: dict[str, float]


@in_default_torch_state
def merge(
    folder: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    reencode: bool = False,
    text: str | Path | None = None,
    context: int = 512,
    windows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    progress: ProgressCallback = lambda event: None,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge an adapter into its base and write the result as one model.

    Args:
        folder: the compressed base, a folder or Hub id.
        adapter: folder of an adapter in PEFT's format, trained on the base.
        output: folder to create: the dense model, or with `reencode` the compressed one; then `OUTPUT-dense` is the
            dense one (the teacher of a later distillation).
        reencode: compress the merged model again, with the settings of the base. An interrupted run resumes when
            it is called again.
        text: file to measure perplexities on, before and after; with `reencode` the default is documentation that
            ships with Python.
        context, windows: as in `pocketllm eval`.
        dtype: of the dense weights.

    Raises:
        FormatError, ConfigError, OutputError, LoadError: as `merged` and `compress`.
        FormatError: the record of an earlier merge is damaged.
        ConfigError: the text or the positions of the model are too few for the windows; nothing is written.
        SourceError: the text cannot be read, or the base has no tokenizer.
        ExtraError: no PEFT.
    """
    folder, adapter, output = folder_of(folder), Path(adapter), named_output(output)
    need_peft()
    check_adapter(adapter, folder)
    base = open_base(folder, output, trust_remote_code)
    name, words = _text(text, reencode, base.tokenizer)
    if words:  # checked before the long work
        check_context(base, context)
        token_windows(base.tokenizer, words, context, windows)
    dense = output.with_name(output.name + "-dense") if reencode else output
    facts = {"base": base.identity, "adapter": folder_digest(adapter), "dtype": str(dtype)}
    config = _settings(base) if reencode else None
    if config is not None:
        check_output(output, marker=None)
    if config is not None and _is_merged(dense, facts):
        remove_published(dense)
    else:
        check_output(dense, marker=None)
        model = merged(base, adapter, device).to(dtype)
        save_dense(model, base.tokenizer, dense, {_RECORD_NAME: facts} if reencode else {})
    if config is not None:
        pocketllm.compress(dense, config, output, progress=progress, device=device)
    folders = {"base": folder, "with adapter": dense, **({"re-encoded": output} if reencode else {})}
    found = _perplexities(base, folders, words, (context, windows), device, progress) if words else {}
    progress(Event("merge", 1.0, str(output)))
    return MergeResult(
        output=str(output),
        dense=str(dense),
        bytes_before=ckpt.folder_bytes(folder) + ckpt.folder_bytes(adapter),
        bytes_dense=ckpt.folder_bytes(dense),
        bytes_on_disk=ckpt.folder_bytes(output),
        text=name,
        perplexities=found,
    )


def _perplexities(
    base: Base,
    folders: dict[str, Path],
    text: str,
    size: tuple[int, int | None],
    device: str,
    progress: ProgressCallback,
) -> dict[str, float]:
    """Perplexity of the model in each folder, by title. size: tokens of a window, and number of windows."""
    found: dict[str, float] = {}
    for title, place in folders.items():
        progress(Event("perplexity", len(found) / len(folders), title))
        model = _load(place, base, device)
        found[title] = perplexity(model, base.tokenizer, text, *size).perplexity
        del model
    return found


def _settings(base: Base) -> CompressConfig:
    """The settings that the base was compressed with."""
    try:
        return CompressConfig.from_dict(base.report["config"])
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{base.folder}: its report does not say how it was compressed ({error})"
        ) from error


def _is_merged(dense: Path, facts: dict[str, str]) -> bool:
    """Whether an earlier run has merged the same adapter into the same base.

    Raises:
        FormatError: its record is damaged.
    """
    record = dense / _RECORD_NAME
    try:
        return record.is_file() and read_object(record) == facts
    except (OSError, ValueError) as error:
        raise FormatError(f"{record}: damaged ({error}); delete {dense} to merge again") from error


def _text(text: str | Path | None, reencode: bool, tokenizer: Any) -> tuple[str, str]:
    """(name, text) to measure on; both empty for none."""
    if text is not None:
        return str(text), read_text(text, tokenizer)
    return named_default(held_out=True) if reencode else ("", "")


def _load(folder: Path, base: Base, device: str) -> Any:
    """Load a model in float32, compressed or dense."""
    if (folder / ckpt.REPORT_NAME).is_file():
        return open_base(folder, None, base.trust_remote_code).load("dense", device)
    return load_dense(folder, torch.float32, base.trust_remote_code).to(device)
