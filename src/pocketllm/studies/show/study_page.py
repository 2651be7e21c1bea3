"""The presentation of a study's results: a page in Markdown and a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketllm.report import drawing, png_and_svg
from pocketllm.studies.definition import Study, Table
from pocketllm.studies.show.plot import GREY, INK


def write(study: Study, result: Mapping[str, Any], folder: Path) -> None:
    """Write NAME.md, NAME.png and NAME.svg of a result into a folder."""
    (folder / f"{study.name}.md").write_text(markdown(study, result), encoding="utf-8")
    for form, data in zip(("png", "svg"), pictures(study, result), strict=True):
        (folder / f"{study.name}.{form}").write_bytes(data)


def markdown(study: Study, result: Mapping[str, Any]) -> str:
    """The page: claim, method, findings, picture, tables, and how to reproduce them."""
    results, name = result["results"], study.name
    parts = [
        f"# {name}: {study.title}",
        f"**The paper's claim.** {study.words.text('Claim')}",
        f"**Measured.** {_method(study, result)}",
        "## Findings",
        "\n".join(f"- {sentence}" for sentence in study.findings(results)),
        f"![{study.title}]({name}.png)",
        "## Figures",
        *(_table(table) for table in study.tables(results)),
        "## Made by",
        _made_by(result),
    ]
    return "\n\n".join(parts) + "\n"


def _method(study: Study, result: Mapping[str, Any]) -> str:
    method, left_out = study.words.text("Method"), study.words.text("Left out")
    if not (result["config"]["quick"] and left_out):
        return method
    return f"{method} **This is the small version:** {left_out}"


def _table(table: Table) -> str:
    lines = [[_escaped(cell) for cell in line] for line in (table.header, *table.rows)]
    lines.insert(1, ["---"] * len(table.header))
    cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"### {table.title}", cells, *([table.note] if table.note else [])])


def _escaped(cell: str) -> str:
    """A cell as Markdown that shows just these characters."""
    return re.sub(r"([\\`*_|])", r"\\\1", cell)


_INPUTS = {"texts": "measured on", "calibration": "calibrated on", "tasks": "tasks:"}


def _made_by(result: Mapping[str, Any]) -> str:
    config, machine = result["config"], result["machine"]
    texts = "".join(
        f"; {words} {', '.join(config[key])}" for key, words in _INPUTS.items() if config.get(key)
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    size = "the small version (`--quick`)" if config["quick"] else "the full version"
    return (
        f"`{result['command']}`\n\n{config['model']}, {size}, seed {result['seed']}{texts}; "
        f"{result['seconds']:.0f} seconds on {where}; {versions}. All numbers are in `result.json`."
    )


def pictures(study: Study, result: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The picture as (PNG, SVG).

    Raises:
        ExtraError: matplotlib is not installed.
    """
    with drawing(INK, GREY):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.5), layout="constrained", facecolor="white")
        study.draw(result["results"], figure)
        return png_and_svg(figure, dpi=110)
