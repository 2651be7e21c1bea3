"""`pocketllm export`."""

from __future__ import annotations

import typer

from pocketllm.cli.model_loading import dtype_of
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Output, size
from pocketllm.cli.shared_options import Compressed, DenseDtype, Json, Quiet, To, Trust

app = typer.Typer()


@app.command(epilog="Example:\n\n  pocketllm export smol-8x --to smol-dense --dtype bfloat16")
def export(
    folder: Compressed,
    to: To,
    dtype: DenseDtype = "bfloat16",
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
