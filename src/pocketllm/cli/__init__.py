"""The command `pocketllm`: parse, call the library, render."""

from __future__ import annotations

import json
import sys

INTERRUPTED = 130  # what typer makes of Ctrl-C
_ADVICE = "interrupted; compress and finetune, started again, go on where they were"


def main() -> None:
    """Entry point; imports nothing heavy before the arguments are parsed."""
    try:
        from pocketllm.cli.app import run

        run()
    except KeyboardInterrupt:  # before typer has taken over
        tell_interrupted()
        raise SystemExit(INTERRUPTED) from None


def tell_interrupted() -> None:
    """Say that Ctrl-C has ended it, and how to go on."""
    print(_ADVICE, file=sys.stderr)
    tell_json(KeyboardInterrupt.__name__, _ADVICE)


def tell_json(kind: str, message: str) -> None:
    """What went wrong as one JSON object on stdout, where the command line asks for that."""
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": kind, "message": message}}))
