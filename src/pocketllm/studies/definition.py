"""The definition of a study: independent steps that measure, and findings declared from their results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pocketllm.source import DenseCheckpoint
    from pocketllm.studies.show.plot import Picture
    from pocketllm.studies.show.prose import Prose
    from pocketllm.studies.verdicts import Verdict

Results = Mapping[str, Mapping[str, Any]]
"""Step key -> the values it returned, as they come back from JSON; a number that was not finite is None."""

Values = Mapping[str, Any]
"""Name -> a number, or whatever else the words of a finding need."""

Progress = Callable[[float], None]
"""Called with the finished share, 0 to 1."""


def portion(progress: Progress, begin: float, end: float) -> Progress:
    """The progress of a part that starts and ends at these shares of the total."""
    return lambda share: progress(begin * (1 - share) + end * share)


@dataclass(frozen=True)
class Text:
    """A text that models are measured on. name: as results call it."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Setup:
    """The inputs of a study.

    model: folder, hub id or `builtin:smollm2-135m`. quick: a small version that ends in three minutes.
    seed: of every random choice. device: `cpu` or `cuda`.
    texts: files to measure perplexity on; None takes the default one (`evaluation_text`).
    work: a scratch folder for intermediate models, kept until the study is finished.
    several: whether the default is texts of several kinds (`evaluation_texts`).
    """

    model: str
    quick: bool
    seed: int
    device: str
    texts: tuple[str, ...] | None
    work: Path
    several: bool = False

    def evaluation_texts(self) -> list[Text]:
        """The texts to measure on, never none; no two have the same name.

        Raises:
            SourceError: a file cannot be read.
        """
        from pocketllm.source import text_for
        from pocketllm.text import evaluation_text, evaluation_texts

        if not self.texts:
            found = evaluation_texts() if self.several else [evaluation_text()]
            return [Text(*each) for each in found]
        names = [Path(path).name for path in self.texts]
        named = [
            name if names.count(name) == 1 else path for name, path in zip(names, self.texts, strict=True)
        ]
        return [Text(name, text_for(path, self.model)) for name, path in zip(named, self.texts, strict=True)]

    def source(self) -> DenseCheckpoint:
        """The model's dense checkpoint, opened.

        Raises:
            SourceError: it is missing or in a form that is not read. ConfigError: it is already compressed.
        """
        from pocketllm.format import check_dense
        from pocketllm.source import open_dense, resolve

        folder = resolve(self.model)
        check_dense(folder, self.model)
        return open_dense(folder)


@dataclass(frozen=True)
class Step:
    """An independent unit of measurement.

    key: names it and its file; letters, digits and `._-`.
    run: measures and returns plain JSON values; reports its progress to the callback.
    """

    key: str
    run: Callable[[Progress], dict[str, Any]]

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[\w.-]+", self.key), self.key


@dataclass(frozen=True)
class Table:
    """A table as text. note: what its values are; printed below the table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """How a study measures.

    steps: in the order they run; an interrupted run resumes at any of them.
    on_text: whether it measures models on text; several_texts: on several kinds of it.
    inputs: what else its results depend on that is found on this machine, as `compressed_models.inputs` gives it.
    """

    steps: Callable[[Setup], list[Step]]
    on_text: bool = False
    several_texts: bool = False
    inputs: Callable[[Setup], dict[str, Any]] = lambda setup: {}


@dataclass(frozen=True)
class Finding:
    """A claim, the numbers that it is tested by, and the rule that judges them.

    claim: the heading of its words in the study's template.
    numbers: computed from the results, what the words need; a sentence for each that is yielded.
    verdict: from these numbers; the words know it as `verdict`. None where nothing is claimed.
    """

    claim: str
    numbers: Callable[[Results], Iterable[Values]]
    verdict: Callable[[Values], Verdict] | None = None

    def judged(self, results: Results) -> list[Values]:
        """The numbers of each sentence, with the verdict on them."""
        verdict = self.verdict
        return [
            values if verdict is None else {**values, "verdict": verdict(values)}
            for values in self.numbers(results)
        ]


@dataclass(frozen=True)
class Study:
    """A claim of the paper and how it is put to the test.

    title: one line, as `STUDIES` has it. words: its template, with the claim, the method in words, the wording
    of the findings, and the tables. declared: its findings; the first says whether the claim held.
    picture: what is drawn of the results. helpers: what the tables call `claim`.
    """

    name: str
    title: str
    words: Prose
    measurement: Measurement
    declared: Sequence[Finding]
    picture: Callable[[Results], Picture]
    helpers: Any = None

    def findings(self, results: Results) -> list[str]:
        """Plain sentences with numbers, computed from the results."""
        return [
            self.words.sentence(finding.claim, **values)
            for finding in self.declared
            for values in finding.judged(results)
        ]

    def tables(self, results: Results) -> list[Table]:
        """The tables of the page."""
        return self.words.tables(results=results, claim=self.helpers)

    def draw(self, results: Results, figure: Figure) -> None:
        """Draw into an empty matplotlib figure; sets its size."""
        from pocketllm.studies.show.plot import draw

        draw(self.picture(results), figure)
