"""`pocketllm info` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.options import Adapter, Json, Quiet, Trust, dtype_of, settle
from pocketllm.cli.render import Output, kinds_table, size, skipped_table, summary_table

app = typer.Typer()


@app.command(epilog="Example:\n\n  pocketllm info smol-8x --json")
def info(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    adapter: Adapter = None,
    check: Annotated[bool, typer.Option(help="Verify every file's checksum.")] = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sizes, ratios and errors of a compressed model, and whether its files are whole."""
    from pocketllm.format.checkpoint import folder_bytes, read_report, verify
    from pocketllm.format.report import RUN_FACTS, counting_adapter

    report = {**dict.fromkeys(RUN_FACTS), **read_report(folder)}
    if check:
        verify(folder)
    title = f"{folder}" + (" (all checksums good)" if check else "")
    if adapter is not None:
        from pocketllm.recover.adapter import check_adapter

        check_adapter(adapter, folder)
        report = {**counting_adapter(report, folder_bytes(adapter)), "adapter": str(adapter)}
        title += f" with adapter {adapter}"
    Output(json, quiet).result(
        report, summary_table(report, title), kinds_table(report), skipped_table(report)
    )


@app.command(epilog="Example:\n\n  pocketllm export smol-8x --to smol-dense --dtype bfloat16")
def export(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    to: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Decode into a dense safetensors model that any tool reads."""
    from pocketllm.runtime.export import export as decode

    show = Output(json, quiet)
    settle()
    nbytes = decode(folder, to, dtype_of(dtype), trust_remote_code)
    show.result({"output": str(to), "bytes_on_disk": nbytes, "dtype": dtype}, f"{to}: {size(nbytes)}")
