"""The command `pocketllm`. Each command parses its options, calls the library, and hands the result on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pocketllm.cli import compress, demo, evaluate, finetune, info, report, study
from pocketllm.errors import ConfigError, PocketError

_INTERRUPTED = 130  # what typer makes of Ctrl-C

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
    as_json = "--json" in sys.argv
    try:
        app(standalone_mode=True)
    except PocketError as error:
        _fail(error, as_json)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print("interrupted; compress and finetune, started again, go on where they were", file=sys.stderr)
        raise


def _fail(error: PocketError, as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    print(f"error: {error}", file=sys.stderr)
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
