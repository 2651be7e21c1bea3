"""Merge an adapter into its base: a dense model, or one compressed again with the base's settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.compression.pipeline import Event, ProgressCallback
from pocketllm.config import CompressConfig
from pocketllm.errors import FormatError
from pocketllm.evaluate.perplexity import perplexity, read_text, token_windows
from pocketllm.evaluate.results import folder_digest
from pocketllm.files import write_json
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.workspace import check_output
from pocketllm.recover.adapter import check_adapter, merged, need_peft
from pocketllm.recover.setting import Base, check_context, open_base
from pocketllm.runtime.export import save_dense
from pocketllm.source.folder import load_dense
from pocketllm.text.read import default_text
from pocketllm.torch_state import in_default_torch_state

_RECORD_NAME = "pocketllm-merged.json"


@dataclass(frozen=True)
class Merged:
    """What a merge made. dense: the merged dense model. bytes_before: base and adapter together.

    perplexities: on `text`, if there is one: of the base alone, of base and adapter merged, and of the model
    that was compressed again.
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
) -> Merged:
    """Write what base and adapter compute together as one model.

    Args:
        folder: the compressed base. adapter: in PEFT's form, trained on it.
        output: folder to make: the dense model, or with `reencode` the compressed one, the dense one beside
            it as `OUTPUT-dense` (the teacher of a later distillation).
        reencode: compress the merged model again, with the settings of the base. Stopped and started again,
            it goes on where it was.
        text: measure perplexities on it, before and after; to re-encode, the default is documentation that
            comes with Python. context, windows: as in `pocketllm eval`.
        dtype: of the dense weights.

    Raises:
        FormatError, ConfigError, OutputError, LoadError: as `merged` and `compress`.
        FormatError: the record of an earlier merge is damaged. ConfigError: text or positions of the model
            are too short for the windows. Nothing is written then.
        SourceError: the text cannot be read, or the base has no tokenizer. ExtraError: no PEFT.
    """
    folder, adapter, output = Path(folder), Path(adapter), Path(output)
    need_peft()
    check_adapter(adapter, folder)
    base = open_base(folder, output, trust_remote_code)
    words, name = _text(text, reencode)
    if words:  # what is measured in the end is looked at before the long work
        check_context(base, context)
        token_windows(base.tokenizer, words, context, windows)
    dense = output.with_name(output.name + "-dense") if reencode else output
    facts = {"base": base.identity, "adapter": folder_digest(adapter), "dtype": str(dtype)}
    config = _settings(base) if reencode else None
    if reencode:
        check_output(output, marker=None)
    if not (reencode and _is_made(dense, facts)):
        check_output(dense, marker=None)
        save_dense(merged(base, adapter, device).to(dtype), base.tokenizer, dense)
        if reencode:
            write_json(dense / _RECORD_NAME, facts)
    if config is not None:
        pocketllm.compress(dense, config, output, progress=progress, device=device)
    found: dict[str, float] = {}
    for title in ("base", "with adapter", *(["re-encoded"] if reencode else [])) if words else ():
        progress(Event("perplexity", len(found) / (3 if reencode else 2), title))
        model = _loaded({"base": folder, "with adapter": dense, "re-encoded": output}[title], base, device)
        found[title] = perplexity(model, base.tokenizer, words, context, windows).perplexity
        del model
    progress(Event("merge", 1.0, str(output)))
    return Merged(
        output=str(output),
        dense=str(dense),
        bytes_before=ckpt.folder_bytes(folder) + ckpt.folder_bytes(adapter),
        bytes_dense=ckpt.folder_bytes(dense),
        bytes_on_disk=ckpt.folder_bytes(output),
        text=name,
        perplexities=found,
    )


def _settings(base: Base) -> CompressConfig:
    """What the base was compressed with."""
    try:
        return CompressConfig.from_dict(base.report["config"])
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{base.folder}: its report does not say how it was compressed ({error})"
        ) from error


def _is_made(dense: Path, facts: dict[str, str]) -> bool:
    """Whether an earlier run has merged the same adapter.

    Raises:
        FormatError: its record is damaged.
    """
    record = dense / _RECORD_NAME
    try:
        return record.is_file() and json.loads(record.read_text(encoding="utf-8")) == facts
    except ValueError as error:
        raise FormatError(f"{record}: damaged ({error}); delete {dense} to merge anew") from error


def _text(text: str | Path | None, reencode: bool) -> tuple[str, str]:
    """(text, its name) to measure on; empty for none."""
    if text is not None:
        return read_text(text), str(text)
    return (
        (default_text(held_out=True), "Python's own documentation (held-out topics)")
        if reencode
        else ("", "")
    )


def _loaded(folder: Path, base: Base, device: str) -> Any:
    """A model in float32, compressed or dense."""
    if (folder / ckpt.REPORT_NAME).is_file():
        return open_base(folder, None, base.trust_remote_code).load("dense", device)
    return load_dense(folder, torch.float32, base.trust_remote_code).to(device)
