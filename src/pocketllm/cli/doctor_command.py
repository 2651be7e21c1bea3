"""`pocketllm doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer
from rich.table import Table

from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Json, Quiet

app = typer.Typer()


@app.command(epilog="Examples:\n\n  pocketllm doctor\n\n  pocketllm doctor --json")
def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Show what runs here: versions, processor, GPU, kernels, extras, cache, disk, start-up hook."""
    show = Output(json, quiet)
    from pocketllm.cli.process import setup_process
    from pocketllm.runtime.doctor import diagnose

    setup_process()
    found = diagnose()
    table = Table(title="What runs here", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(found):
        table.add_row(name, value)
    show.result(found, table)


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of every line of the table."""
    yield from found["versions"].items()
    memory = "" if found["memory_bytes"] is None else f", memory {_gb(found['memory_bytes'])}"
    yield "processor", f"{found['processor']}, cores {found['cores']}, threads {found['threads']}{memory}"
    features = found["features"]
    if features is not None:
        has = ", ".join(name for name, there in features.items() if there)
        lacks = ", ".join(name for name, there in features.items() if not there)
        yield "features", (has or "none") + (f" (not {lacks})" if lacks else "")
    gpus = [f"{gpu['name']}, {_gb(gpu['memory_bytes'])}" for gpu in found["gpus"]]
    yield "GPU", "; ".join(gpus) or "none"
    yield "compiler", found["compiler"] or "none"
    for name, state in found["kernels"].items():
        yield f"kernels: {name}", _state(state, "yes")
    for name, state in found["extras"].items():
        yield name, _state(state, state["version"])
    cache = found["cache"]
    yield "cache", f"{cache['folder']}, {_gb(cache['bytes'])}: {_state(cache, 'writable')}"
    yield "free disk", _gb(found["free_disk_bytes"])
    yield "start-up hook", _state(found["startup_hook"], "active")


def _state(state: Mapping[str, Any], good: str) -> str:
    return good if state["works"] else f"no: {state['reason']}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB"
