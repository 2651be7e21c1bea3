"""The models that `report` and `compare` show: their dense models, and their perplexity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketllm.cli.model_loading import load_any
from pocketllm.cli.render import Bars
from pocketllm.cli.shared_options import count
from pocketllm.errors import FormatError

if TYPE_CHECKING:
    from pocketllm.report import Evaluation


def model_of(folder: Path, command: str) -> str:
    """The dense model that a folder was compressed from. command: name of the current command, for the message.

    Raises:
        FormatError: it contains an adapter, or no compressed model.
    """
    from pocketllm.format import read_report
    from pocketllm.recover.adapter import SETTINGS_NAME

    if (folder / SETTINGS_NAME).is_file():
        raise FormatError(
            f"{folder}: an adapter; name the compressed model it was trained on "
            f"('pocketllm {command} MODEL --adapter {folder}' shows both)"
        )
    return str(read_report(folder)["model"])


def check_against(dense: str | None) -> None:
    """Raises ConfigError if the model named as the dense one is compressed."""
    from pocketllm.format import check_dense
    from pocketllm.source import resolve

    if dense is not None:
        check_dense(resolve(dense), dense, "with --against")


def dense_of(against: str | None, names: Sequence[str]) -> str | None:
    """The dense model to measure: the one named, otherwise the one that all were made from, if it is local."""
    from pocketllm.source import resolve_local

    if against is not None:
        return against
    return names[0] if len(set(names)) == 1 and resolve_local(names[0]) is not None else None


@dataclass(frozen=True)
class Measuring:
    """The measurement requested by --ppl, and where it runs. windows: 0 takes all."""

    text: Path
    context: int
    windows: int
    dtype: str
    device: str
    trust_remote_code: bool

    def evaluations(
        self, models: Sequence[tuple[Path, Path | None]], dense: str | None, bars: Bars
    ) -> list[Evaluation]:
        """Perplexity of compressed models, some with an adapter, and of the dense one.

        Raises:
            ConfigError, SourceError: as `perplexity` and `text_for`. ExtraError: an adapter, but no PEFT.
        """
        from pocketllm.recover.adapter import need_peft
        from pocketllm.source import text_for

        if any(adapter for _, adapter in models):
            need_peft()
        windows = count("--windows", self.windows)
        check_against(dense)
        text = text_for(self.text, models[0][0], self.trust_remote_code)
        named = [(str(folder), adapter) for folder, adapter in models]
        named += [] if dense is None else [(dense, None)]
        return [self._evaluation(model, adapter, text, windows, bars) for model, adapter in named]

    def _evaluation(
        self, model: str, adapter: Path | None, text: str, windows: int | None, bars: Bars
    ) -> Evaluation:
        from pocketllm import perplexity
        from pocketllm.report import Evaluation

        loaded, tokenizer, facts = load_any(
            model, "dense", self.dtype, self.device, self.trust_remote_code, adapter
        )

        def on_progress(share: float) -> None:
            stage = f"eval {Path(model).name}{f' + {adapter.name}' if adapter else ''}"
            bars.update(stage, share, model)

        result = perplexity(loaded, tokenizer, text, self.context, windows, on_progress)
        named = {"model": model, "text": str(self.text), "dtype": str(loaded.dtype)}
        return Evaluation.from_dict({**dataclasses.asdict(result), **facts, **named})
