"""Merge an adapter into its base: a dense model, or one compressed again with the base's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.config import CompressConfig
from pocketllm.errors import FormatError
from pocketllm.evaluate.perplexity import perplexity, read_text
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.compress import Event, ProgressCallback
from pocketllm.model.export import check_empty, save_dense
from pocketllm.model.workspace import check_output
from pocketllm.recover.adapter import merged, need_peft
from pocketllm.recover.setting import open_base


@dataclass(frozen=True)
class Merged:
    """What a merge made. dense: the merged dense model. bytes_before: base and adapter together.

    perplexities: on the text that was given: of the base alone, of base and adapter (and so of the merged
    dense model), and of the model that was compressed again.
    """

    output: str
    dense: str
    bytes_before: int
    bytes_dense: int
    bytes_on_disk: int
    perplexities: dict[str, float]


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
        reencode: compress the merged model again, with the settings of the base.
        text: measure perplexities on it, before and after. context, windows: as in `pocketllm eval`.
        dtype: of the dense weights.

    Raises:
        FormatError, ConfigError, OutputError, LoadError: as `merged` and `compress`.
    """
    folder, adapter, output = Path(folder), Path(adapter), Path(output)
    need_peft()
    base = open_base(folder, output, trust_remote_code)
    dense = output.with_name(output.name + "-dense") if reencode else output
    check_empty(dense)
    if reencode:
        check_output(output, overwrite=False)
    found: dict[str, float] = {}

    def measure(name: str, model: Any) -> None:
        if text is not None:
            progress(Event("measure", 0.0, name))
            score = perplexity(model, base.tokenizer, read_text(text), context, windows)
            found[name] = score.perplexity

    if text is not None:
        measure("base", base.load("dense", device))
    model = merged(base, adapter, device)
    measure("with adapter", model)
    bytes_dense = save_dense(model.to(dtype), base.tokenizer, dense)
    del model
    if reencode:
        try:
            config = CompressConfig.from_dict(base.report["config"])
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder}: its report does not say how it was compressed ({error})") from error
        pocketllm.compress(dense, config, output, progress=progress, device=device)
        measure("re-encoded", open_base(output, None, trust_remote_code).load("dense", device))
    progress(Event("merge", 1.0, str(output)))
    return Merged(
        output=str(output),
        dense=str(dense),
        bytes_before=ckpt.folder_bytes(folder) + ckpt.folder_bytes(adapter),
        bytes_dense=bytes_dense,
        bytes_on_disk=ckpt.folder_bytes(output),
        perplexities=found,
    )
