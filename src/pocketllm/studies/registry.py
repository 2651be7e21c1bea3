"""The names of the studies; a study's module is imported when it is wanted."""

from __future__ import annotations

import importlib

from pocketllm.errors import ConfigError
from pocketllm.studies.study import Study

STUDIES: dict[str, str] = {
    "rln": "reshaped layer norm against layer norm and none, in training",
    "overfit": "one matrix alone: what error is reached, what error is possible",
    "depth": "1, 3 and 5 blocks: is more worse, and is it optimization or capacity",
    "codebook": "codebook size and vector length at equal bits and at equal size",
    "utilization": "which codewords are used, by initialization; a collapse provoked",
    "sensitivity": "which parts of a model suffer most from compression, for the bytes they save",
    "decoder": "what the decoder buys at equal stored bits, before and after recovery",
    "overhead": "what decoding costs at load and at run time",
    "robustness": "8 to 20 times smaller: on several texts and tasks, where it becomes brittle",
}
"""Name -> what it asks, in a line. The module `pocketllm.studies.NAME` holds it as STUDY."""


def check_name(name: str) -> None:
    """Raises ConfigError naming the known studies where `name` is none."""
    if name not in STUDIES:
        raise ConfigError(f"unknown study {name!r}; known: {', '.join(STUDIES)}")


def load(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none.
    """
    check_name(name)
    found: Study = importlib.import_module(f"pocketllm.studies.{name}").STUDY
    return found
