"""The command `pocketllm`. Each command parses its options, calls the library, and hands the result on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pocketllm.cli import (
    INTERRUPTED,
    compress,
    demo,
    evaluate,
    finetune,
    info,
    report,
    study,
    tell_interrupted,
    tell_json,
)
from pocketllm.config import TARGET_OPTIONS
from pocketllm.errors import ConfigError, PocketError

app = typer.Typer(
    name="pocketllm",
    help="Compress the weights of a language model 8 to 20 times, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (compress, info, evaluate, finetune, report, study, demo):
    app.registered_commands += group.app.registered_commands


def run() -> None:
    """Run the command line; exit code 0 good, 1 failed, 2 wrong use, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except PocketError as error:
        _fail(error)
    except (OSError, MemoryError, UnicodeError, RecursionError) as error:  # of the system, met in some file
        _fail(PocketError(str(error) or type(error).__name__))
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            tell_interrupted()
        wrong_use = stop.__context__  # typer has shown it already
        describe = getattr(wrong_use, "format_message", None)
        if describe is not None:
            tell_json(type(wrong_use).__name__, describe())
        raise


def _fail(error: PocketError) -> None:
    message = str(error)
    if isinstance(error, ConfigError):
        for setting, option in TARGET_OPTIONS.items():
            message = message.replace(setting, option)
    tell_json(type(error).__name__, message)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2 if isinstance(error, ConfigError) else 1)


def _version(shown: bool) -> None:
    if shown:
        import pocketllm

        print(f"pocketllm-codec {pocketllm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress the weights of a language model 8 to 20 times, and run the result."""
