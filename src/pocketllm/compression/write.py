"""Assemble a compressed checkpoint from the finished units in the workspace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.codebook import codebook_perplexity, codebook_utilization
from pocketllm.compression.matrix_encoder import codebook_unit, matrix_unit
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.mapped_pages import drop_files
from pocketllm.format.model_card import CARD_NAME
from pocketllm.format.report import Report, rounded
from pocketllm.format.weight_files import write_safetensors
from pocketllm.format.workspace import Workspace
from pocketllm.plan.matrices import Plan
from pocketllm.plan.matrix_statistics import MatrixStatistics
from pocketllm.plan.sizes import PlannedModel
from pocketllm.plan.stored_form import StoredForm

_LARGE = 1 << 20  # bytes of a dense tensor whose pages are dropped when it is written


def write(planned: PlannedModel, work: Workspace) -> Report:
    """Assemble the checkpoint in the folder `final` of the workspace."""
    form, final = planned.form, work.folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    crcs: dict[str, str] = {}
    write_safetensors(final, form.tensors, _tensors(form, work, crcs))
    (final / "config.json").write_text(form.config_text(crcs), encoding="utf-8")
    for name, path in form.copied_files.items():
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, final / name)
    (final / CARD_NAME).write_text(planned.card, encoding="utf-8")
    report = planned.report(measured(planned.plan, work))
    files = ckpt.file_facts(final, list(planned.file_bytes))
    _, room = planned.bytes_on_disk
    text = planned.report_text(report, files).encode()
    assert len(text) <= room, (len(text), room)
    (final / ckpt.REPORT_NAME).write_bytes(text[:-1] + b" " * (room - len(text)) + b"\n")
    assert ckpt.folder_bytes(final) == report.bytes_on_disk
    return report


def _tensors(form: StoredForm, work: Workspace, crcs: dict[str, str]) -> Iterator[Tensor]:
    """The tensors in the order of `StoredForm.tensors`; also fills `crcs`."""
    plan, refined = form.plan, work.refined()
    for dense in plan.dense:
        value = refined.get(f"vector|{dense.name}", form.source.read(dense.name))
        yield value.to(form.dense_dtype(dense))
        if value.nbytes > _LARGE:
            drop_files(form.source.files)
    for matrix in plan.matrices:
        tensors, _ = work.load(matrix_unit(plan, matrix))
        stored = [tensors["indices"]]
        if "row_scale" in tensors:
            stored.append(refined.get(f"row_scale|{matrix.name}", tensors["row_scale"]))
        crcs[matrix.name] = ckpt.checksum(*stored)
        yield from stored
    units = [work.load(codebook_unit(number))[0] for number in range(len(plan.groups()))]
    for number, unit in enumerate(units):
        crcs[f"codebook {number}"] = ckpt.checksum(unit["codebook"])
        if form.codebooks_are_stored:
            yield unit["codebook"]
    decoder = 0
    for unit, group in zip(units, plan.groups().values(), strict=True):
        users = {plan.decoder_key(m): m.name for m in group}
        for position, name in enumerate(users.values()):
            up, down = (
                refined.get(f"{part}|{name}", unit[f"decoder.{position}.{part}"]) for part in ("up", "down")
            )
            crcs[f"decoder {decoder}"] = ckpt.checksum(up, down)
            decoder += 1
            yield up
            yield down


def measured(plan: Plan, work: Workspace) -> MatrixStatistics:
    """The statistics of a finished run."""
    nmse, proxy, use, perplexity, tokens, unseen, fits = {}, {}, {}, {}, {}, {}, []
    for number, group in enumerate(plan.groups().values()):
        fits.append(_rounded_tree(work.load(codebook_unit(number))[1]))
        found = [_counts_and_facts(work, matrix_unit(plan, m)) for m in group]
        counts = torch.stack([each for each, _ in found]).sum(dim=0)
        for matrix, (_, facts) in zip(group, found, strict=True):
            nmse[matrix.name] = rounded(facts["nmse"])
            proxy[matrix.name] = rounded(facts["proxy_error"]) if "proxy_error" in facts else None
            tokens[matrix.name] = facts.get("input_tokens")
            unseen[matrix.name] = facts.get("unseen_experts")
            use[matrix.name] = rounded(codebook_utilization(counts))
            perplexity[matrix.name] = rounded(codebook_perplexity(counts))
    return MatrixStatistics(nmse, proxy, use, perplexity, tokens, unseen, tuple(fits))


def _counts_and_facts(work: Workspace, unit: str) -> tuple[Tensor, dict[str, Any]]:
    """How often a matrix uses each codeword, and what else is known of it, without its indices."""
    tensors, facts = work.load(unit)
    return tensors["counts"].long(), facts


def _rounded_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded_tree(item) for item in value]
    return rounded(value) if isinstance(value, float) else value
