"""`pocketllm info`."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketllm.cli.render import Output, kinds_table, skipped_table, summary_table, with_warnings
from pocketllm.cli.shared_options import Adapter, Compressed, Json, Quiet

app = typer.Typer()


@app.command(epilog="Example:\n\n  pocketllm info smol-8x --json")
def info(
    folder: Compressed,
    adapter: Adapter = None,
    check: Annotated[bool, typer.Option(help="Verify the checksum of every file.")] = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show sizes, ratios and errors of a compressed model, and verify its files."""
    from pocketllm.format import counting_adapter, folder_bytes, read_report, verify
    from pocketllm.format.report import RUN_FACTS
    from pocketllm.source import folder_of

    title, folder = str(folder), folder_of(folder)
    report = {**dict.fromkeys(RUN_FACTS), **read_report(folder)}
    if check:
        verify(folder)
    title += " (checksums OK)" if check else ""
    if adapter is not None:
        from pocketllm.recover import check_adapter

        check_adapter(adapter, folder)
        report = {**counting_adapter(report, folder_bytes(adapter)), "adapter": str(adapter)}
        title += f" with adapter {adapter}"
    Output(json, quiet).result(
        with_warnings(report), summary_table(report, title), kinds_table(report), skipped_table(report)
    )
