"""Rewrite a compressed folder with new values in some tensors; shapes and indices are unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pocketllm.errors import FormatError, ShapeError
from pocketllm.files import files_below, read_object, safetensors_header
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.model_card import CARD_NAME, card_text, dense_card, stored_names
from pocketllm.format.report import rounded
from pocketllm.format.trust import weights_of
from pocketllm.format.weight_files import DTYPE_NAMES, write_safetensors

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def stored_sizes(folder: Path) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, Path]]:
    """Stored tensors in writing order: name -> (dtype, shape), and name -> file."""
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    files: dict[str, Path] = {}
    for path in weights_of(folder):
        header, _ = safetensors_header(path)
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            sizes[name], files[name] = (_DTYPES[facts["dtype"]], tuple(facts["shape"])), path
    return sizes, files


def rewrite(
    folder: Path, changed: Mapping[str, Tensor], final: Path, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Create `final`, a copy of a compressed folder in which some tensors have new values.

    Args:
        folder: the compressed model, which is not modified.
        changed: stored tensor name -> value, in the stored dtype and shape.
        final: folder to create; its parent must exist.
        section: stored in the report as `recover`.

    Returns:
        The report.

    Raises:
        ShapeError: a tensor that is not stored, or in another dtype or shape.
    """
    sizes, files = stored_sizes(folder)
    for name, value in changed.items():
        if sizes.get(name) != (value.dtype, tuple(value.shape)):
            raise ShapeError(
                f"{name}: got {value.dtype} {tuple(value.shape)}, wanted the stored form: "
                f"{sizes.get(name, 'no such tensor')}"
            )
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    tensors = _Tensors(files, changed)
    write_safetensors(final, sizes, (tensors[name] for name in sizes))
    report = ckpt.read_report(folder)
    for name, stored in stored_names(
        report["files"]
    ).items():  # early versions kept the dense model's card as it was
        if not name.endswith(".safetensors") and name != "config.json" and not (final / stored).exists():
            (final / stored).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, final / stored)
    layout = ckpt.read_layout(folder)
    config = read_object(folder / "config.json")
    config["quantization_config"].update(_checked(layout, tensors).to_dict())
    (final / "config.json").write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
    return _write_report(final, {**report, "recover": dict(section)})


class _Tensors:
    """Stored tensors, with the changed ones substituted."""

    def __init__(self, files: Mapping[str, Path], changed: Mapping[str, Tensor]) -> None:
        self.files, self.changed = files, changed
        self._handles: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.changed:
            return self.changed[name].detach().cpu()
        path = self.files[name]
        if path not in self._handles:
            self._handles[path] = safe_open(str(path), framework="pt").__enter__()
        return self._handles[path].get_tensor(name)

    def crc(self, *names: str) -> str:
        """Checksum of those of the tensors that are stored."""
        return ckpt.checksum(*(self[name] for name in names if name in self.files))


def _checked(layout: ckpt.Layout, tensors: _Tensors) -> ckpt.Layout:
    """The layout with the checksums of the new tensors."""
    return replace(
        layout,
        matrices={
            name: replace(entry, crc32=tensors.crc(f"{name}.indices", f"{name}.row_scale"))
            for name, entry in layout.matrices.items()
        },
        codebooks=tuple(
            entry
            if entry.seed is not None
            else replace(entry, crc32=tensors.crc(f"{ckpt.STORE}.codebooks.{n}.weight"))
            for n, entry in enumerate(layout.codebooks)
        ),
        decoders=tuple(
            replace(
                entry, crc32=tensors.crc(*(f"{ckpt.STORE}.decoders.{n}.{leaf}" for leaf in ("up", "down")))
            )
            for n, entry in enumerate(layout.decoders)
        ),
    )


def _write_report(final: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The model card, and the report, which counts its own bytes, beside the other files."""
    report = {**report, "files": ckpt.file_facts(final, files_below(final, FormatError))}
    card = card_text(report, dense_card(final, report)).encode()
    (final / CARD_NAME).write_bytes(card)
    (final / ckpt.REPORT_NAME).write_bytes(report_bytes(report, len(card)))
    return ckpt.read_report(final)


def report_bytes(report: dict[str, Any], card_bytes: int) -> bytes:
    """The text of a report whose sizes count all of its files, the model card and itself.

    Args:
        card_bytes: of the model card, which is not among `files`.
    """
    rest, room = sum(entry["bytes"] for entry in report["files"].values()) + card_bytes, 0
    for text in _texts(report, rest):
        if len(text) <= room:
            return text[:-1] + b" " * (room - len(text)) + b"\n"
        room = max(room, len(text))
    raise AssertionError("the texts grow until one fits")


def _texts(report: dict[str, Any], rest: int) -> Iterator[bytes]:
    """The report's text for its own growing length, until it fits."""
    length, before = 0, report["bytes_on_disk"]
    parts = report["bytes_by_part"]
    while True:
        total = rest + length
        now = {
            **report,
            "bytes_on_disk": total,
            "ratio_files_bf16": _scaled(report["ratio_files_bf16"], before, total),
            "ratio_files_fp32": _scaled(report["ratio_files_fp32"], before, total),
            "bytes_by_part": {**parts, "headers": parts["headers"] + total - before},
        }
        text = json.dumps(now, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        yield text
        length = max(length, len(text))


def _scaled(ratio: float, before: int, now: int) -> float:
    """A ratio to the bytes on disk, adjusted to other bytes, with six digits."""
    return rounded(ratio * before / max(1, now))
