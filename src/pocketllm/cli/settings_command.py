"""`pocketllm settings`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Json, Quiet
from pocketllm.config import (
    COMPRESS_OPTIONS,
    DEFAULT_PRESET,
    EVAL_OPTIONS,
    FINETUNE_METHODS,
    FINETUNE_OPTIONS,
    EvalConfig,
    Setting,
    compress_settings,
    finetune_settings,
    settings_of,
    text_of,
)
from pocketllm.errors import ConfigError

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n  pocketllm settings\n\n  pocketllm settings compress --preset paper-16x\n\n"
    "  pocketllm settings finetune --json"
)
def settings(
    command: Annotated[
        str | None, typer.Argument(help="compress, finetune or eval. The default is all three.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Preset whose values are the defaults of compress.")
    ] = DEFAULT_PRESET,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the keys of --set KEY=VALUE with type, default and help, and settings that have their own option."""
    found = listing(preset)
    if command is not None:
        found = {title: rows for title, rows in found.items() if title.split()[0] == command}
        if not found:
            raise ConfigError(f"got {command!r}, wanted compress, finetune or eval")
    show = Output(json, quiet)
    show.result(found, *(_table(title, rows) for title, rows in found.items()))


def listing(preset: str = DEFAULT_PRESET) -> dict[str, list[dict[str, Any]]]:
    """The settings of each command, and of each method of finetune: key, type, default, option, help.

    Raises:
        ConfigError: unknown preset.
    """
    found = {"compress": _rows(compress_settings(preset), COMPRESS_OPTIONS)}
    for method in FINETUNE_METHODS:
        found[f"finetune --method {method}"] = _rows(finetune_settings(method), FINETUNE_OPTIONS)
    return {**found, "eval": _rows(settings_of(EvalConfig()), EVAL_OPTIONS)}


def _rows(found: Mapping[str, Setting], options: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "key": one.key,
            "type": one.kind,
            "default": one.default,
            "option": options.get(one.key),
            "help": one.help,
        }
        for one in found.values()
    ]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title}: --set KEY=VALUE")
    for header in ("key", "type", "default", "help"):
        table.add_column(header, overflow="fold", no_wrap=header == "key")
    for row in rows:
        key = row["key"] if row["option"] is None else f"{row['option']} ({row['key']})"
        table.add_row(key, row["type"], text_of(row["default"]), row["help"])
    return table
