"""Put a compressed checkpoint together from finished units, and count its bytes before it exists.

`Checkpoint` knows every tensor, the text of config.json and of the report. All of them have a size that does
not depend on what the fit finds (checksums have a fixed width, the report is padded to the width of its
longest possible numbers), so a dry run says exactly what will lie on disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pocketllm
from pocketllm.config import CodecConfig
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.facts import Measured, matrix_report, measured, not_run, predicted
from pocketllm.model.layout import CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.model.plan import KEPT_END, Dense, Matrix, Plan
from pocketllm.model.report import RUN_FACTS, Report, is_linear_weight_of_a_block, rounded, versions
from pocketllm.model.source import DenseCheckpoint
from pocketllm.model.units import codebook_unit, matrix_unit
from pocketllm.model.workspace import Workspace

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")
# config.json is written anew; the rest belongs to weights, to an adapter, or is a record of ours.
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json", "pocketllm*.json")


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model to write: a plan over a dense source. model: the name the user gave."""

    source: DenseCheckpoint
    plan: Plan
    model: str

    @cached_property
    def sizes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every stored tensor in writing order: dense ones, coded ones, codebooks, decoders."""
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for dense in self.plan.dense:
            sizes[dense.name] = self.dense_dtype(dense), dense.shape
        sizes.update(self.layout(self._no_crcs()).tensors())
        return sizes

    def dense_dtype(self, dense: Dense) -> torch.dtype:
        """In which a tensor that is left dense is stored: its own; kept embeddings in at most 16 bits."""
        own = self.source.dtype(dense.name)
        return torch.bfloat16 if dense.reason == KEPT_END and own.itemsize > 2 else own

    @property
    def dense_bytes(self) -> int:
        """Of all tensors that are left dense."""
        return sum(torch.Size(d.shape).numel() * self.dense_dtype(d).itemsize for d in self.plan.dense)

    @property
    def codebooks_are_stored(self) -> bool:
        """False where they are drawn from a seed."""
        return self.plan.config.codec.codebook_source == "fit"

    def _codebook_shape(self, group: list[Matrix]) -> tuple[int, int]:
        spec = self.plan.specs[group[0].name]
        return spec.codebook_size, spec.vector_len

    @cached_property
    def _decoders(self) -> dict[str, CodecConfig]:
        """Decoder key -> codec settings, group by group: the order of the store."""
        return {
            self.plan.decoder_key(m): self.plan.config.codec_for(self.plan.specs[m.name].vector_len)
            for group in self.plan.groups().values()
            for m in group
        }

    def copied_files(self) -> list[Path]:
        """Tokenizer, generation settings, licence: small files that belong to the model."""
        folder = self.source.folder
        found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not any(path.match(other) for other in _NOT_COPIED))

    def layout(self, crcs: Mapping[str, str]) -> Layout:
        """The stored form, given the checksum of each matrix, `codebook N` and `decoder N`."""
        groups = self.plan.groups()
        codebook_of = {m.name: n for n, group in enumerate(groups.values()) for m in group}
        decoder_of = {key: n for n, key in enumerate(self._decoders)}
        return Layout(
            {
                m.name: MatrixEntry(
                    m.shape,
                    m.transposed,
                    codebook_of[m.name],
                    decoder_of[self.plan.decoder_key(m)],
                    self.plan.specs[m.name].stride,
                    m.strip_rows,
                    self.plan.rotation(m),
                    crcs[m.name],
                )
                for m in self.plan.matrices
            },
            tuple(
                CodebookEntry(
                    *self._codebook_shape(group),
                    None if self.codebooks_are_stored else self.plan.config.seed,
                    crcs[f"codebook {n}"],
                )
                for n, group in enumerate(groups.values())
            ),
            tuple(
                DecoderEntry(codec, crcs[f"decoder {n}"]) for n, codec in enumerate(self._decoders.values())
            ),
        )

    def config_text(self, crcs: Mapping[str, str]) -> str:
        """The body of config.json."""
        config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {
            "quant_method": ckpt.STORE,
            "producer": f"pocketllm-codec {pocketllm.__version__}",
            "mode": "dense",
            **self.layout(crcs).to_dict(),
        }
        return json.dumps(config, ensure_ascii=False) + "\n"

    def _no_crcs(self) -> dict[str, str]:
        """Checksums of the right width for counting bytes."""
        names = [m.name for m in self.plan.matrices]
        names += [f"codebook {n}" for n in range(len(self.plan.groups()))]
        names += [f"decoder {n}" for n in range(len(self._decoders))]
        return dict.fromkeys(names, "0" * 8)

    @cached_property
    def file_bytes(self) -> dict[str, int]:
        """Exact size of every file but the report."""
        sizes = ckpt.safetensors_bytes(self.sizes)
        sizes["config.json"] = len(self.config_text(self._no_crcs()).encode())
        return {**sizes, **{path.name: path.stat().st_size for path in self.copied_files()}}

    @cached_property
    def bytes_on_disk(self) -> tuple[int, int]:
        """(all files, the report alone), exact."""
        files = {name: {"bytes": size, "sha256": "0" * 64} for name, size in self.file_bytes.items()}
        rest, report = sum(self.file_bytes.values()), 0
        while True:  # the report counts its own bytes
            text = self._report_text(self.report(predicted(self.plan), rest + report, report), files)
            if len(text.encode()) <= report:
                return rest + report, report
            report = len(text.encode())

    def report(
        self, found: Measured, bytes_on_disk: int | None = None, report_bytes: int | None = None
    ) -> Report:
        """Sizes, ratios and errors."""
        if bytes_on_disk is None or report_bytes is None:
            bytes_on_disk, report_bytes = self.bytes_on_disk
        plan, bits, coded = self.plan, self.plan.bits_by_part(), self.plan.weights
        dense_bytes = self.dense_bytes
        every = coded + sum(torch.Size(d.shape).numel() for d in plan.dense)
        other = sum(path.stat().st_size for path in self.copied_files())
        payload = sum(value // 8 for value in bits.values()) + dense_bytes
        per_matrix = plan.matrix_bits()
        return Report(
            model=self.model,
            bytes_on_disk=bytes_on_disk,
            ratio_files_bf16=rounded((2 * every + other) / max(1, bytes_on_disk)),
            ratio_files_fp32=rounded((4 * every + other) / max(1, bytes_on_disk)),
            ratio_matrices_bf16=rounded(16 * coded / sum(bits.values())),
            ratio_matrices_fp32=rounded(32 * coded / sum(bits.values())),
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
                bits, weights = bits + 8 * self.dense_dtype(dense).itemsize * count, weights + count
        return bits / weights if weights else 0.0

    def _skipped(self) -> Iterator[dict[str, Any]]:
        yield from (asdict(dense) for dense in self.plan.dense)
        for name, target in self.source.tied.items():
            yield {"name": name, "shape": [], "reason": f"tied to {target}, stored once"}
        for name in self.source.unused:
            yield {"name": name, "shape": [], "reason": "the model class has no use for it"}

    def _report_text(self, report: Report, files: Mapping[str, Any]) -> str:
        body = {"format_version": ckpt.FORMAT_VERSION, **report.to_dict(), "files": files}
        for name in RUN_FACTS:  # stored bytes must not depend on how long the run took, or on a resumption
            del body[name]
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n"

    def write(self, work: Workspace) -> Report:
        """Put the checkpoint together in `final` of the workspace."""
        final = work.folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        crcs: dict[str, str] = {}
        ckpt.write_safetensors(final, self.sizes, self._tensors(work, crcs))
        (final / "config.json").write_text(self.config_text(crcs), encoding="utf-8")
        for path in self.copied_files():
            shutil.copyfile(path, final / path.name)
        report = self.report(measured(self.plan, work))
        files = ckpt.file_facts(final, list(self.file_bytes))
        _, room = self.bytes_on_disk
        text = self._report_text(report, files).encode()
        assert len(text) <= room, (len(text), room)
        (final / ckpt.REPORT_NAME).write_bytes(text[:-1] + b" " * (room - len(text)) + b"\n")
        assert ckpt.folder_bytes(final) == report.bytes_on_disk
        return report

    def _tensors(self, work: Workspace, crcs: dict[str, str]) -> Iterator[Tensor]:
        """The tensors in the order of `sizes`; fills `crcs` on the way."""
        refined = work.refined()
        for dense in self.plan.dense:
            value = refined.get(f"vector|{dense.name}", self.source.read(dense.name))
            yield value.to(self.dense_dtype(dense))
        for matrix in self.plan.matrices:
            tensors, _ = work.load(matrix_unit(self.plan, matrix))
            stored = [tensors["indices"]]
            if "row_scale" in tensors:
                stored.append(refined.get(f"row_scale|{matrix.name}", tensors["row_scale"]))
            crcs[matrix.name] = ckpt.checksum(*stored)
            yield from stored
        units = [work.load(codebook_unit(number))[0] for number in range(len(self.plan.groups()))]
        for number, unit in enumerate(units):
            crcs[f"codebook {number}"] = ckpt.checksum(unit["codebook"])
            if self.codebooks_are_stored:
                yield unit["codebook"]
        decoder = 0
        for unit, group in zip(units, self.plan.groups().values(), strict=True):
            users = {self.plan.decoder_key(m): m.name for m in group}
            for position, name in enumerate(users.values()):
                up, down = (
                    refined.get(f"{part}|{name}", unit[f"decoder.{position}.{part}"])
                    for part in ("up", "down")
                )
                crcs[f"decoder {decoder}"] = ckpt.checksum(up, down)
                decoder += 1
                yield up
                yield down


def dry_report(checkpoint: Checkpoint) -> Report:
    """The report of a run that has not happened: errors are predictions, the rest is unknown."""
    return replace(checkpoint.report(not_run(checkpoint.plan)), is_plan=True)
