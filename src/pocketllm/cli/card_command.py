"""`pocketllm card` and `pocketllm push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketllm.cli.process import setup_process
from pocketllm.cli.publishing import push_folder
from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Evaluations, Json, Private, Quiet

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="Folder of a compressed model.")]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Hub id of the dense model, if the report names a folder."),
]


@app.command(
    epilog="Examples:\n\n  pocketllm card smol-8x --evaluation eval.json\n\n"
    "  pocketllm card smol-8x --base-model HuggingFaceTB/SmolLM2-135M-Instruct"
)
def card(
    folder: Folder,
    evaluation: Evaluations = None,
    base_model: BaseModel = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite the model card (README.md) of a compressed model, with measured values."""
    from pocketllm.format import write_card
    from pocketllm.report import read_figures

    show = Output(json, quiet)
    figures = [figure for path in evaluation or [] for figure in read_figures(path, folder)]
    path = write_card(folder, figures, base_model)
    show.result({"card": str(path), "figures": [figure.what for figure in figures]}, str(path))


@app.command(
    epilog="Examples:\n\n  pocketllm push smol-8x OWNER/NAME\n\n  pocketllm push smol-8x OWNER/NAME --private"
)
def push(
    folder: Folder,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Id on the Hub; created if missing.")
    ],
    private: Private = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a compressed model to the Hugging Face Hub."""
    show = Output(json, quiet)
    setup_process()
    with show.bars() as bars:
        address = push_folder(bars, folder, repository, private)
    show.result({"repository": repository, "commit": address}, address)
