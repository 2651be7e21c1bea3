"""The parts of a report about how a model was made, and what was left as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pocketllm.config.checks import flat
from pocketllm.report.charts import Table, short
from pocketllm.report.collect import ModelFacts
from pocketllm.report.sections import Section


def skipped_section(model: ModelFacts) -> Section:
    """What was left dense or not stored, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for entry in model.report["skipped"]:
        reasons[str(entry.get("reason", "not said"))].append(str(entry["name"]))
    rows = [(reason, names[0], str(len(names))) for reason, names in reasons.items()]
    table = Table("Not compressed, by reason", ("reason", "for example", "tensors"), rows, words=2)
    if not rows:
        return Section("dense", "Not compressed", ["Every tensor is compressed."])
    return Section("dense", "Not compressed", tables=[table])


def making_section(model: ModelFacts, command: str, missing: Sequence[str]) -> Section:
    """Settings, versions, how the fit went, and the command to make it again."""
    report = model.report
    paragraphs = [f"Made from {report['model']}."]
    if command and missing:
        paragraphs.append(
            f"Settings that no option sets, and that the command below leaves out: {', '.join(missing)}. In "
            "Python, pocketllm.CompressConfig.from_dict(report['config']) sets them all, where report is the "
            "content of pocketllm.json."
        )
    if isinstance(report.get("recover"), Mapping):
        paragraphs.append(
            "It was fine-tuned after it was compressed, which the command below leaves out. "
            "Stored errors are those before the fine-tuning."
        )
    paragraphs.append(
        "The command that makes it again:"
        if command
        else "This version of pocketllm-codec does not know its settings; update it to see the command that "
        "makes the model again."
    )
    versions = [(str(k), str(v)) for k, v in (report.get("versions") or {}).items()]
    settings = [(key, str(value)) for key, value in flat(report["config"]).items()]
    tables = [Table("Settings", ("setting", "value"), settings, words=2), *_fits(report.get("fits") or [])]
    if isinstance(report.get("recover"), Mapping):
        recover = [(key, str(value)) for key, value in flat(report["recover"]).items()]
        tables.append(Table("Fine-tuning", ("setting", "value"), recover, words=2))
    if versions:
        tables.append(Table("Versions", ("package", "version"), versions, words=2))
    return Section("making", "How it was made", paragraphs, tables=tables, code=command)


def _fits(fits: Sequence[Mapping[str, Any]]) -> list[Table]:
    """nmse of every codec's sample before and after training."""
    rows = []
    for fit in fits:
        start, final = fit.get("start_nmse"), fit.get("final_nmse")
        if not isinstance(start, Mapping) or not isinstance(final, Mapping):
            continue
        for key in start:
            rows.append((str(key), _text(start[key]), _text(final.get(key)), _text(fit.get("revived"))))
    headers = ("codec", "nmse at the start", "nmse after training", "codewords revived")
    return [Table("Training of the codecs, on their samples", headers, rows)] if rows else []


def _text(value: Any) -> str:
    return short(float(value)) if isinstance(value, int | float) else "–"
