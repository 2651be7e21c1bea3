"""Commands in README.md, the docs and `--help` have options and settings that exist; redirections are cut off."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pocketllm.cli.app import app
from pocketllm.cli.removed_options import REMOVED
from pocketllm.cli.settings_command import listing
from pocketllm.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KEYS = {row["key"]: row["option"] for rows in listing().values() for row in rows}


def commands_in(text: str) -> list[list[str]]:
    """The words of every `pocketllm` command with arguments, in code blocks and in lines of text."""
    found = re.findall(r"(?:^|`| )pocketllm ([a-z]+ [^`\n>]+)", text, re.MULTILINE)
    words = [shlex.split(command, comments=True) for command in found if command.split()[0] in COMMANDS]
    return [command for command in words if "..." not in command and "--help" not in command]


def parse(words: list[str]) -> None:
    """Parses a command without running it."""
    command = COMMANDS[words[0]]
    context = command.make_context(words[0], words[1:])
    for setting in context.params.get("settings") or []:
        key = setting.partition("=")[0]
        assert key == "KEY" or (key in KEYS and KEYS[key] is None), f"--set {setting}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_parse(page: Path) -> None:
    for words in commands_in(page.read_text(encoding="utf-8")):
        parse(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_parse(name: str) -> None:
    examples = commands_in(COMMANDS[name].epilog or "")
    assert any(words[0] == name for words in examples) or name == "demo"
    for words in examples:
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_named_in_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for key in re.findall(r"--set ([a-z_.]+)=", text):
        assert key in KEYS and KEYS[key] is None
    for option in set(re.findall(r"`(--[a-z-]+)", text)):
        gone = any(option in options for options in REMOVED.values())
        assert not gone or any(option in parameter.opts for parameter in _parameters()), option


def _parameters() -> list[Any]:
    return [parameter for command in COMMANDS.values() for parameter in command.params]


def test_what_the_test_would_catch() -> None:
    with pytest.raises(ConfigError, match="--hidden: use --set"):
        parse(["compress", "m", "-o", "out", "--hidden", "3"])
    with pytest.raises(AssertionError, match="--set hidden=3"):
        parse(["compress", "m", "-o", "out", "--set", "hidden=3"])
