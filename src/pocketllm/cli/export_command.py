"""`pocketllm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.model_loading import dtype_of
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output, size
from pocketllm.cli.shared_options import Compressed, Json, Quiet, Trust

app = typer.Typer()


@app.command(epilog="Example:\n\n  pocketllm export smol-8x --to smol-dense --dtype bfloat16")
def export(
    folder: Compressed,
    to: Annotated[Path, typer.Option(help="Folder to create.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Decode a compressed model into a dense safetensors model that any tool can read."""
    from pocketllm import export as decode

    show = Output(json, quiet)
    setup_process()
    nbytes = decode(folder, to, dtype_of(dtype), trust_remote_code)
    show.result({"output": str(to), "bytes_on_disk": nbytes, "dtype": dtype}, f"{to}: {size(nbytes)}")
