"""Several targets of `pocketllm compress` in one run: `--bpw 2,3,4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.publishing import with_measured_card
from pocketllm.cli.render import Bars, Output, summary_table, with_warnings
from pocketllm.cli.text_perplexity import EvalText, perplexity_table
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.ranks import launched

if TYPE_CHECKING:
    from pocketllm import Report


def parse_bpw(text: str) -> tuple[float, ...]:
    """The numbers of BITS[,BITS...].

    Raises:
        ConfigError: not of that form.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--bpw: got {text!r}, wanted a number, or several as in 2,3,4") from None


Targets = Annotated[
    str | None,
    typer.Option(
        "--bpw",
        metavar="BITS[,BITS...]",
        help="Target: stored bits per weight of the compressed matrices, everything counted; several (2,3,4) are "
        "measured once and written to OUTPUT/2, OUTPUT/3, ...",
    ),
]


def refuse(reason: str, options: Mapping[str, object]) -> None:
    """Refuse options that do not apply.

    Raises:
        ConfigError: one is given.
    """
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{' and '.join(given)}: {reason}")


@dataclass(frozen=True)
class Several:
    """The compression of a model to several targets.

    place: device, trust_remote_code and calibration_folder, as `pocketllm.compress` takes them.
    """

    model: str
    configs: Sequence[CompressConfig]
    output: Path
    text: EvalText | None
    place: dict[str, Any]
    overwrite: bool

    def plan(self, show: Output) -> None:
        """Show all plans."""
        import pocketllm
        from pocketllm.compression import target_names

        with show.bars() as bars:
            how = {**self.place, "progress": bars.on_event}
            reports = [pocketllm.dry_run(self.model, config, **how) for config in self.configs]
        self._show(show, dict(zip(target_names(self.configs), reports, strict=True)), {})

    def make(self, show: Output) -> None:
        """Compress to every target, measure and show the results."""
        from pocketllm.compression import compress_targets

        measured: dict[str, dict[str, Any]] = {}
        with show.bars() as bars:
            dense = self._measured(bars, "dense", self.model)

            def made(name: str, folder: Path) -> None:
                measured[name] = dense | self._measured(bars, "compressed", folder)

            how = {**self.place, "progress": bars.on_event, "overwrite": self.overwrite}
            reports = compress_targets(self.model, self.configs, self.output, made=made, **how)
        self._show(show, reports, measured)

    def _measured(self, bars: Bars, title: str, model: str | Path) -> dict[str, Any]:
        if self.text is None or launched()[0]:
            return {}
        device, trust = self.place["device"], self.place["trust_remote_code"]
        return {title: self.text.measure(title, model, bars.update, device, trust)}

    def _show(
        self, show: Output, reports: Mapping[str, Report], measured: Mapping[str, dict[str, Any]]
    ) -> None:
        if launched()[0]:  # the first of the processes launched together shows it
            return
        values, tables = [], []
        for name, report in reports.items():
            folder, figures = self.output / name, measured.get(name, {})
            described = with_measured_card(report, folder, self.text, figures)
            shown = with_warnings(described.to_dict())
            tables.append(summary_table(shown, f"{self.model} -> {folder}"))
            if figures and self.text is not None:
                tables.append(perplexity_table(self.text, figures))
                shown["measured"] = figures
            values.append({"output": str(folder), **shown})
        show.result({"targets": values}, *tables)
