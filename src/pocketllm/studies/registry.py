"""The names of the studies; a study is assembled from its modules and its template on request."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pocketllm.errors import ConfigError
from pocketllm.studies.definition import Results, Study, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDIES: dict[str, str] = {
    "rln": "reshaped layer norm against layer norm and none, in training",
    "overfit": "a single matrix: the error reached and the least error possible",
    "depth": "1, 3 and 5 blocks: are more blocks worse, and is the cause optimization or capacity",
    "codebook": "codebook size and vector length at equal bits and at equal size",
    "utilization": "codebook usage by initialization, and a provoked collapse",
    "sensitivity": "which parts of a model suffer most from compression, for the bytes they save",
    "decoder": "what the decoder buys at equal stored bits, before and after recovery",
    "overhead": "what decoding costs at load and at run time",
    "robustness": "8 to 20 times smaller: several texts and tasks, and where quality breaks down",
}
"""Name -> its question in one line."""


def check_name(name: str) -> None:
    """Raises ConfigError, which lists the known studies, if `name` is not one of them."""
    if name not in STUDIES:
        raise ConfigError(f"unknown study {name!r}; known: {', '.join(STUDIES)}")


def load(name: str) -> Study:
    """The study of that name.

    Assembled from `measure/NAME_steps.py` (MEASUREMENT), `claims/NAME_claim.py` (`numbers` of the findings),
    `show/NAME_page.py` (`table_numbers`, `picture`) and `show/templates/NAME.md.j2` (the prose of all sections).

    Raises:
        ConfigError: there is none.
    """
    from pocketllm.studies.show.plot import draw
    from pocketllm.studies.show.prose import prose

    check_name(name)
    rooms = ("measure", "steps"), ("claims", "claim"), ("show", "page")
    steps, claim, page = (
        importlib.import_module(f"pocketllm.studies.{room}.{name}_{kind}") for room, kind in rooms
    )
    words = prose(name)

    def tables(results: Results) -> list[Table]:
        return words.tables(results=results, **page.table_numbers(results))

    def findings(results: Results) -> list[str]:
        values: Mapping[str, Any] = claim.numbers(results)
        return words.sentences("Findings", **values)

    def draw_picture(results: Results, figure: Figure) -> None:
        draw(page.picture(results), figure)

    return Study(
        name=name,
        title=STUDIES[name],
        claim=words.text("Claim"),
        method=words.text("Method"),
        left_out=words.text("Left out"),
        tables=tables,
        draw=draw_picture,
        findings=findings,
        **vars(steps.MEASUREMENT),
    )
