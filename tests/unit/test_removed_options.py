"""Command lines of the time before `--set`, their equivalents, and the settings that both stand for."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm import cli
from pocketllm.cli.removed_options import REMOVED
from pocketllm.config import (
    FINETUNE_METHODS,
    CalibrationConfig,
    DistillConfig,
    EvalConfig,
    as_options,
    compress_settings,
    finetune_as_options,
    finetune_settings,
    flat,
    preset,
    settings_of,
)
from tests.commands import Run

# before, now: options; start: the preset or method that they start from; changes: settings that differ from it.
LINES = json.loads((Path(__file__).parents[1] / "old_command_lines.json").read_text(encoding="utf-8"))
COMPRESS = [line for line in LINES if line["command"] == "compress"]
FINETUNE = [line for line in LINES if line["command"] == "finetune"]


class CaughtError(Exception):
    """Carries the settings out of a command."""


def caught(model: Any, config: Any, *more: Any, **how: Any) -> None:
    raise CaughtError(config)


def configured(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[DistillConfig]]:
    """The settings that a dry run works with, and those of the recovery that it checks."""
    recoveries: list[DistillConfig] = []
    monkeypatch.setattr(pocketllm, "dry_run", caught, raising=False)
    monkeypatch.setattr(
        "pocketllm.recover.check_recovery", lambda model, config, trust: recoveries.append(config)
    )
    monkeypatch.setattr("pocketllm.recover.dry_run_distill", caught)
    monkeypatch.setattr("pocketllm.recover.dry_run_lora", caught)
    monkeypatch.setattr(sys, "argv", ["pocketllm", *command, "--dry-run"])
    with pytest.raises(CaughtError) as found:
        cli.main()
    return found.value.args[0], recoveries


@pytest.mark.parametrize("line", COMPRESS, ids=lambda line: line["now"])
def test_compress_lines_mean_what_they_did(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line["now"])
    config, recoveries = configured(["compress", "m", "-o", "out", *words], monkeypatch)
    wanted = preset(line["start"]).to_dict()
    if "--no-calibration" in words:
        wanted["calibration"] = None
    elif wanted["calibration"] is None and "calibration." in " ".join(line["changes"]):
        wanted["calibration"] = {**vars(CalibrationConfig()), "texts": []}
        for stored_if_used in ("compensate", "compensate_rate"):
            del wanted["calibration"][stored_if_used]
    found = config.to_dict()
    if "--recover" in words:
        wanted["recover"] = DistillConfig().to_dict()
        found["recover"] = recoveries[0].to_dict()
    assert flat(found) == {**flat(wanted), **line["changes"]}
    assert configured(["compress", "m", "-o", "out", *as_options(config)], monkeypatch)[0] == config


@pytest.mark.parametrize("line", FINETUNE, ids=lambda line: line["now"])
def test_finetune_lines_mean_what_they_did(line: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = configured(["finetune", "f", "-o", "out", *shlex.split(line["now"])], monkeypatch)
    assert flat(config.to_dict()) == {**flat(FINETUNE_METHODS[line["start"]].to_dict()), **line["changes"]}
    options = finetune_as_options(config)
    assert configured(["finetune", "f", "-o", "out", *options], monkeypatch)[0] == config


CHANGED = [line for line in LINES if line["before"] != line["now"]]


@pytest.mark.parametrize("line", CHANGED, ids=lambda line: line["before"])
def test_lines_with_removed_options_are_refused(line: dict[str, Any], run: Run) -> None:
    """The message names words of the new line."""
    code, out, err = run(line["command"], "m", "-o", "out", *shlex.split(line["before"]))
    option, _, instead = err.removeprefix("error: ").strip().partition(": use ")
    assert code == 2 and not out and option in line["before"].split()
    assert instead.partition(" (")[0] in line["now"]


@pytest.mark.parametrize(
    ("command", "option", "instead"),
    [(command, *entry) for command, options in REMOVED.items() for entry in options.items()],
)
def test_every_removed_option_is_refused(command: str, option: str, instead: str, run: Run) -> None:
    takes_value = "{}" in instead
    forms = [([option, "3"], "3"), ([f"{option}=3"], "3"), ([option], "VALUE")]
    for words, value in forms if takes_value else [([option], "")]:
        code, out, err = run(command, "m", *words)
        assert code == 2 and not out
        assert err == f"error: {option}: use {instead.replace('{}', value)}\n"


@pytest.mark.parametrize("command", REMOVED)
def test_what_replaces_a_removed_option_is_a_key(command: str) -> None:
    """And every value that the table names is one that the key takes."""
    known = {
        "compress": compress_settings(),
        "finetune": finetune_settings("lora") | finetune_settings("distill"),
        "eval": settings_of(EvalConfig()),
    }[command]
    for instead in REMOVED[command].values():
        for words in instead.replace(")", "").split("--set ")[1:]:
            key, _, value = words.split()[0].partition("=")
            assert key in known
            if value != "{}":
                known[key].parse(value)


def test_values_are_quoted_in_what_to_use_instead(run: Run) -> None:
    assert "--set targets='a b'\n" in run("finetune", "m", "--targets", "a b")[2]
