"""The command `pocketllm`. Each command parses its options, calls the library, and renders the result."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from pocketllm.cli import (
    INTERRUPTED,
    bench_command,
    card_command,
    compare_command,
    compress_command,
    demo_command,
    doctor_command,
    eval_command,
    export_command,
    finetune_command,
    generate_command,
    info_command,
    merge_command,
    print_interrupted,
    print_json_error,
    report_command,
    sample_command,
    serve_command,
    settings_command,
    study_command,
)
from pocketllm.config import TARGET_OPTIONS
from pocketllm.errors import ConfigError, PocketError
from pocketllm.ranks import REPORTED, launched

app = typer.Typer(
    name="pocketllm",
    help="Compress the weights of a language model 4 to 10 times (relative to bf16), and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    compress_command,
    settings_command,
    info_command,
    eval_command,
    generate_command,
    sample_command,
    serve_command,
    bench_command,
    export_command,
    finetune_command,
    merge_command,
    report_command,
    compare_command,
    card_command,
    study_command,
    demo_command,
    doctor_command,
):
    app.registered_commands += group.app.registered_commands


SHARED_COMMANDS = ("compress", "finetune")
"""Commands whose work processes launched by torchrun share."""


def run() -> None:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except PocketError as error:
        _fail(error)
    except (OSError, MemoryError, UnicodeError, RecursionError) as error:  # of the system, met in some file
        _fail(PocketError(str(error) or type(error).__name__), error)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print_interrupted()
        usage_error = stop.__context__  # typer has printed it already
        describe = getattr(usage_error, "format_message", None)
        if describe is not None:
            print_json_error(type(usage_error).__name__, describe())
        raise


def _fail(error: PocketError, cause: BaseException | None = None) -> None:
    is_usage, notes = isinstance(error, ConfigError), getattr(cause or error, "__notes__", ())
    if REPORTED in notes or (is_usage and launched()[0]):  # another process that runs this command shows it
        raise SystemExit(2 if is_usage else 1)
    message = str(error)
    if is_usage:
        for setting, option in TARGET_OPTIONS.items():
            message = re.sub(rf"(?<!--set ){setting}\b", option, message)
    print_json_error(type(error).__name__, message)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2 if is_usage else 1)


def _version(shown: bool) -> None:
    if shown:
        import pocketllm

        print(f"pocketllm-codec {pocketllm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress the weights of a language model 4 to 10 times (relative to bf16), and run the result."""
    command = context.invoked_subcommand
    if command not in SHARED_COMMANDS and (processes := launched()[1]) > 1:
        raise ConfigError(
            f"{command}: runs in one process, got {processes} (WORLD_SIZE); start it without torchrun"
        )
