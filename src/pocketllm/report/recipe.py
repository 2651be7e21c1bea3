"""The section about how a model was made: settings, versions, and the commands that reproduce it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pocketllm.config import Command, adapter_command, command_for, flat
from pocketllm.report.model_facts import AdapterFacts, ModelFacts
from pocketllm.report.sections import Section
from pocketllm.report.tables import Columns, Table, short
from pocketllm.source import name_of

_PEFT_SETTINGS = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules")

FIT: Columns[Mapping[str, Any]] = {
    "codec": lambda fit: str(fit["codec"]),
    "nmse at the start": lambda fit: _number(fit["start"]),
    "nmse after training": lambda fit: _number(fit["final"]),
    "codewords revived": lambda fit: _number(fit["revived"]),
}


def commands_of(model: ModelFacts) -> tuple[Command, Command]:
    """The commands that compress the model and train its adapter; empty if unknown."""
    name = name_of(model.folder)
    compress = command_for(str(model.report["model"]), name, model.report["config"])
    adapter = model.adapter
    if adapter is None or adapter.record is None:
        return compress, Command()
    return compress, adapter_command(name, adapter.name, adapter.record)


def recipe_section(model: ModelFacts, command: Command, training: Command) -> Section:
    """Settings, versions, results of the fit, and the commands that reproduce the model.

    Args:
        command: that compresses the model. training: that trains its adapter.
    """
    report, recover = model.report, model.report.get("recover")
    fits = list(_fits(report.get("fits") or []))
    tables = [Table.pairs("Settings", flat(report["config"]))]
    if isinstance(report.get("gguf"), Mapping):
        tables.append(Table.pairs("Dense model, read from a GGUF file", flat(report["gguf"])))
    if fits:
        tables.append(Table.of("Training of the codecs, on their samples", FIT, fits))
    if isinstance(recover, Mapping):
        tables.append(Table.pairs("Fine-tuning", flat(recover)))
    if model.adapter is not None:
        tables.append(Table.pairs(f"Adapter {model.adapter.name}", _training(model.adapter)))
    if report.get("versions"):
        tables.append(Table.pairs("Versions", report["versions"], ("package", "version")))
    values = {
        "model": model,
        "fine_tuned": isinstance(recover, Mapping),
        "command": command,
        "training": training,
    }
    return Section("recipe", "How it was made", tables=tables, values=values)


def _training(adapter: AdapterFacts) -> Mapping[str, Any]:
    """How an adapter was trained; if unknown, the settings that PEFT stored with it."""
    if adapter.record is None:
        return {key: adapter.settings[key] for key in _PEFT_SETTINGS if key in adapter.settings}
    return flat({key: value for key, value in adapter.record.items() if key != "base_identity"})


def _fits(fits: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """nmse of every codec's sample before and after training."""
    for fit in fits:
        start, final = fit.get("start_nmse"), fit.get("final_nmse")
        if isinstance(start, Mapping) and isinstance(final, Mapping):
            for key, value in start.items():
                yield {"codec": key, "start": value, "final": final.get(key), "revived": fit.get("revived")}


def _number(value: Any) -> str:
    return short(float(value)) if isinstance(value, int | float) else "–"
