"""The parts of a report about how a model was made, and what was left as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pocketllm.config import flat
from pocketllm.report.charts import Table, short
from pocketllm.report.collect import AdapterFacts, ModelFacts
from pocketllm.report.command import Command
from pocketllm.report.sections import Section

_PEFT_SETTINGS = (
    *("peft_type", "base_model_name_or_path"),
    *("r", "lora_alpha", "lora_dropout", "target_modules"),
)


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


def making_section(model: ModelFacts, command: Command, training: Command | None = None) -> Section:
    """Settings, versions, how the fit went, and the commands to make it again.

    Args:
        command: that compresses the model. training: that trains its adapter.
    """
    report = model.report
    versions = [(str(k), str(v)) for k, v in (report.get("versions") or {}).items()]
    settings = [(key, str(value)) for key, value in flat(report["config"]).items()]
    tables = [Table("Settings", ("setting", "value"), settings, words=2), *_fits(report.get("fits") or [])]
    if isinstance(report.get("recover"), Mapping):
        recover = [(key, str(value)) for key, value in flat(report["recover"]).items()]
        tables.append(Table("Fine-tuning", ("setting", "value"), recover, words=2))
    if model.adapter is not None:
        tables.append(_adapter_table(model.adapter))
    if versions:
        tables.append(Table("Versions", ("package", "version"), versions, words=2))
    commands = tuple(c.text for c in (command, training or Command()) if c.text)
    paragraphs = _paragraphs(model, command, training or Command())
    return Section("making", "How it was made", paragraphs, tables=tables, commands=commands)


def _paragraphs(model: ModelFacts, command: Command, training: Command) -> list[str]:
    report = model.report
    paragraphs = [f"Made from {report['model']}."]
    if command.text and command.missing:
        paragraphs.append(
            f"Settings that no option sets, and that the command below leaves out: {', '.join(command.missing)}. In "
            "Python, pocketllm.CompressConfig.from_dict(report['config']) sets them all, where report is the "
            "content of pocketllm.json."
        )
    if isinstance(report.get("recover"), Mapping):
        paragraphs.append(
            "It was fine-tuned after it was compressed, which the command below leaves out. "
            "Stored errors are those before the fine-tuning."
        )
    if model.adapter is not None:
        paragraphs += _adapter_paragraphs(model.adapter, training)
    if not command.text:
        paragraphs.append(
            "This version of pocketllm-codec does not know its settings; update it to see the command that "
            "makes the model again."
        )
    if command.text and training.text:
        paragraphs.append("The commands that make it again, the model and then the adapter:")
    elif command.text or training.text:
        paragraphs.append(f"The command that makes {'it' if command.text else 'the adapter'} again:")
    return paragraphs


def _adapter_paragraphs(adapter: AdapterFacts, training: Command) -> list[str]:
    if adapter.record is None:
        return [
            f"The adapter {adapter.name} was trained on it elsewhere: there is no pocketllm-adapter.json beside it "
            "that says how."
        ]
    found = [f"The adapter {adapter.name} was trained on it afterwards; nothing that is coded was changed."]
    if not training.text:
        found.append("This version of pocketllm-codec does not know the settings that it was trained with.")
    elif training.missing:
        found.append(
            f"Settings of the training that no option sets, and that its command leaves out: "
            f"{', '.join(training.missing)}."
        )
    return found


def _adapter_table(adapter: AdapterFacts) -> Table:
    """How it was trained; where that is not known, what PEFT says of it."""
    if adapter.record is None:
        rows = [(key, str(adapter.settings[key])) for key in _PEFT_SETTINGS if key in adapter.settings]
    else:
        facts = flat({key: value for key, value in adapter.record.items() if key != "base_identity"})
        rows = [(key, str(value)) for key, value in facts.items()]
    return Table(f"Adapter {adapter.name}", ("setting", "value"), rows, words=2)


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
