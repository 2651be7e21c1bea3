"""The command `pocketllm`: parse, call the library, render."""

from __future__ import annotations

import json
import sys

INTERRUPTED = 130  # what typer makes of Ctrl-C
_ADVICE = "interrupted; rerun the command to resume compress, finetune or study"


def main() -> None:
    """Entry point; imports nothing heavy before the arguments are parsed."""
    try:
        from pocketllm.cli.app import run

        run()
    except KeyboardInterrupt:  # before typer has taken over
        print_interrupted()
        raise SystemExit(INTERRUPTED) from None


def print_interrupted() -> None:
    """Say that Ctrl-C ended the command, and how to resume."""
    print(_ADVICE, file=sys.stderr)
    print_json_error(KeyboardInterrupt.__name__, _ADVICE)


def print_json_error(kind: str, message: str) -> None:
    """The error as one JSON object on stdout, if the command line has --json."""
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": kind, "message": message}}))
