"""The names of the studies; a study is assembled from its modules and its template on request."""

from __future__ import annotations

import importlib

from pocketllm.errors import ConfigError
from pocketllm.studies.definition import Study

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

    Assembled from `measure/NAME_steps.py` (MEASUREMENT), `claims/NAME_claim.py` (FINDINGS, `picture`, and what
    the tables compute) and `show/templates/NAME.md.j2` (the words of all sections).

    Raises:
        ConfigError: there is none.
    """
    from pocketllm.studies.show.prose import prose

    check_name(name)
    steps = importlib.import_module(f"pocketllm.studies.measure.{name}_steps")
    claim = importlib.import_module(f"pocketllm.studies.claims.{name}_claim")
    return Study(name, STUDIES[name], prose(name), steps.MEASUREMENT, claim.FINDINGS, claim.picture, claim)
