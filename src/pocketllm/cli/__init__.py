"""The command `pocketllm`: parse, call the library, render."""

from __future__ import annotations


def main() -> None:
    """Entry point; imports nothing heavy before the arguments are parsed."""
    try:
        from pocketllm.cli.app import run

        run()
    except KeyboardInterrupt:  # before typer has taken over
        raise SystemExit(130) from None
