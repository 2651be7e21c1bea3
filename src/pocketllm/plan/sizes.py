"""Exact bytes of a compressed model before it exists, and its report.

The sizes of all tensors, config.json and the report do not depend on the result of the fit: checksums have a fixed
width, and the report is padded to the width of its longest possible numbers. A dry run therefore prints the exact
bytes on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pocketllm.format.model_card import card_text
from pocketllm.format.report import NO_USE, RUN_FACTS, Report, is_linear_weight_of_a_block, rounded
from pocketllm.format.weight_files import safetensors_bytes
from pocketllm.machine import versions
from pocketllm.plan.matrices import Plan
from pocketllm.plan.matrix_statistics import MatrixStatistics, matrix_report, not_run, predicted
from pocketllm.plan.stored_form import StoredForm
from pocketllm.source.dense_checkpoint import DenseCheckpoint


@dataclass(frozen=True)
class PlannedModel:
    """A plan over a dense source with the exact bytes of its files. model: the name the user gave."""

    source: DenseCheckpoint
    plan: Plan
    model: str

    @cached_property
    def form(self) -> StoredForm:
        """What will be stored."""
        return StoredForm(self.source, self.plan)

    @cached_property
    def file_bytes(self) -> dict[str, int]:
        """Exact size of every file except the report and the model card."""
        sizes = safetensors_bytes(self.form.tensors)
        sizes["config.json"] = len(self.form.config_text(self.form.no_checksums()).encode())
        return {**sizes, **{name: path.stat().st_size for name, path in self.form.copied_files.items()}}

    @cached_property
    def card(self) -> str:
        """The model card."""
        files = {name: {"bytes": size} for name, size in self.file_bytes.items()}
        report = self.report(
            not_run(self.plan), bytes_on_disk=0, report_bytes=0
        )  # no size with it is on the card
        return card_text({**report.to_dict(), "files": files}, self.form.dense_card)

    @cached_property
    def bytes_on_disk(self) -> tuple[int, int]:
        """(all files, the report alone), exact."""
        files = {name: {"bytes": size, "sha256": "0" * 64} for name, size in self.file_bytes.items()}
        rest, report = sum(self.file_bytes.values()) + len(self.card.encode()), 0
        while True:  # the report counts its own bytes
            text = self.report_text(self.report(predicted(self.plan), rest + report, report), files)
            if len(text.encode()) <= report:
                return rest + report, report
            report = len(text.encode())

    def report(
        self, found: MatrixStatistics, bytes_on_disk: int | None = None, report_bytes: int | None = None
    ) -> Report:
        """Sizes, ratios and errors."""
        if bytes_on_disk is None or report_bytes is None:
            bytes_on_disk, report_bytes = self.bytes_on_disk
        plan, bits, encoded = self.plan, self.plan.bits_by_part(), self.plan.weights
        dense_bytes = self.form.dense_bytes
        every = encoded + sum(torch.Size(d.shape).numel() for d in plan.dense)
        other = sum(path.stat().st_size for path in self.form.copied_files.values())
        payload = sum(value // 8 for value in bits.values()) + dense_bytes
        per_matrix = plan.matrix_bits()
        return Report(
            model=self.model,
            bytes_on_disk=bytes_on_disk,
            ratio_files_bf16=rounded((2 * every + other) / max(1, bytes_on_disk)),
            ratio_files_fp32=rounded((4 * every + other) / max(1, bytes_on_disk)),
            ratio_matrices_bf16=rounded(16 * encoded / sum(bits.values())),
            ratio_matrices_fp32=rounded(32 * encoded / sum(bits.values())),
            bpw_blocks=rounded(self._bpw_blocks(per_matrix)),
            bpw_matrices=rounded(plan.bpw),
            bpw_all=rounded((sum(bits.values()) + 8 * dense_bytes) / every),
            bytes_by_part={
                **{part: value // 8 for part, value in bits.items()},
                "dense": dense_bytes,
                "other_files": other,
                "headers": bytes_on_disk - payload - other,
            },
            dense_model_bytes_bf16=2 * every,
            matrices=tuple(matrix_report(plan, m, per_matrix[m.name], found) for m in plan.matrices),
            skipped=tuple(self._skipped()),
            codebook_scope=plan.codebook_scope,
            config=plan.config.to_dict(),
            fits=found.fits,
            versions=versions(),
            left_out=self.form.left_out or None,
            gguf=self.source.gguf,
        )

    def _bpw_blocks(self, per_matrix: Mapping[str, float]) -> float:
        """Stored bits per linear weight of the blocks; per_matrix: of the compressed ones."""
        bits, weights = 0.0, 0
        for matrix in self.plan.matrices:
            if matrix.in_blocks:
                bits, weights = bits + per_matrix[matrix.name], weights + matrix.weights
        for dense in self.plan.dense:
            if is_linear_weight_of_a_block(dense.name, dense.shape):
                count = math.prod(dense.shape)
                bits, weights = bits + 8 * self.form.dense_dtype(dense).itemsize * count, weights + count
        return bits / weights if weights else 0.0

    def _skipped(self) -> Iterator[dict[str, Any]]:
        yield from (asdict(dense) for dense in self.plan.dense)
        for name, target in self.source.tied.items():
            yield {"name": name, "shape": [], "reason": f"tied to {target}, stored once"}
        for name in self.source.unused:
            yield {"name": name, "shape": [], "reason": NO_USE}

    def report_text(self, report: Report, files: Mapping[str, Any]) -> str:
        body = {"format_version": self.form.format_version, **report.to_dict(), "files": files}
        for name in RUN_FACTS:  # stored bytes must not depend on the duration of the run or on a resumption
            del body[name]
        for name in ("left_out", "gguf"):
            if not body[name]:
                del body[name]
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n"

    def dry_report(self) -> Report:
        """The report of a run that has not happened: errors are predictions, the rest is unknown."""
        return replace(self.report(not_run(self.plan)), is_plan=True)
