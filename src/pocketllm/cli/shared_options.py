"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from pocketllm.config.checks import MOST_SEED
from pocketllm.errors import ConfigError

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 uses all cores.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model folder contains.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (float32 on a CPU).")]
Adapter = Annotated[
    Path | None, typer.Option(help="Adapter trained on the compressed model; its bytes are counted.")
]
Against = Annotated[
    str | None, typer.Option(help="Dense model: folder, Hub id or builtin:…; detected if it is local.")
]
Evaluations = Annotated[
    list[Path] | None, typer.Option(help="File with the output of 'pocketllm eval --json'; repeatable.")
]
Check = Annotated[bool, typer.Option(help="Verify the checksum of every file first.")]
Ppl = Annotated[Path | None, typer.Option(help="UTF-8 text file to measure perplexity on.")]
PplTexts = Annotated[
    list[Path] | None,
    typer.Option(
        "--ppl", help="UTF-8 text file to measure perplexity on; repeat for several, and their mean."
    ),
]
Context = Annotated[int, typer.Option(help="Tokens per window of the text.")]
Windows = Annotated[int, typer.Option(help="Number of windows of the text; 0 takes all.")]
Mode = Annotated[
    str, typer.Option(help="packed (run from the packed weights), dense (decode at load), or auto.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory that the process may take while it compresses, such as 4GB; the result is the same.",
    ),
]
Compensate = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help="Steps in which what is not yet encoded of a block is tuned to make up for the errors of what is.",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=BITS",
        help="Bits of the indices per weight of matrices by name, such as 'model.layers.0.*=4'; 16 leaves them dense; "
        "the last matching pattern applies; repeatable.",
    ),
]
KeepEmbeddings = Annotated[bool, typer.Option("--keep-embeddings", help="Leave embedding and head dense.")]
MeasuredIn = Annotated[
    Path | None,
    typer.Option(
        help="Folder for calibration measurements, reused for other targets of the same model and text."
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier run.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")]
To = Annotated[Path, typer.Option(help="Folder to create.")]
DenseDtype = Annotated[str, typer.Option(help="Type of the weights: bfloat16, float16 or float32.")]
Compressed = Annotated[Path, typer.Argument(help="Compressed model: folder or Hub id.")]
Runnable = Annotated[str, typer.Argument(help="Compressed or dense model: folder, Hub id, or builtin:….")]


def set_option(command: str) -> OptionInfo:
    """`--set KEY=VALUE` of a command."""
    text = f"Any other setting, as listed by 'pocketllm settings {command}'; repeatable."
    option: OptionInfo = typer.Option("--set", metavar="KEY=VALUE", help=text)
    return option


def count(name: str, number: int) -> int | None:
    """A number, or None if it is 0 (all).

    Raises:
        ConfigError: below 0.
    """
    if number < 0:
        raise ConfigError(f"{name}: got {number}, wanted 0 (all) or more")
    return number or None


def parse_overrides(options: list[str]) -> tuple[tuple[str, float], ...]:
    """(pattern, bits per weight) of each PATTERN=BITS.

    Raises:
        ConfigError: not of that form.
    """
    found = []
    for option in options:
        pattern, _, bits = option.rpartition("=")
        try:
            found.append((pattern, float(bits)))
        except ValueError:
            pattern = ""
        if not pattern:
            raise ConfigError(f"--override: got {option!r}, wanted PATTERN=BITS, as 'model.layers.0.*=4'")
    return tuple(found)
