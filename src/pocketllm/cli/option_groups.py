"""Options that several commands take together, as one parameter of the command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pocketllm.cli.evaluated_models import Measuring, dense_of
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Bars, Output
from pocketllm.cli.shared_options import (
    Against,
    Check,
    Context,
    Device,
    Dtype,
    Evaluations,
    Json,
    Ppl,
    Quiet,
    Threads,
    Trust,
    Windows,
)

if TYPE_CHECKING:
    from pocketllm.report import Evaluation


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of a command whose type is a dataclass by an option for each field, after the others."""
    hints, groups = get_type_hints(command, include_extras=True), dict[str, Any]()
    options: list[inspect.Parameter] = []  # of the command itself, then of the groups
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
        else:
            options.append(_option(name, parameter.default, hints[name]))
    for kind in groups.values():
        own = get_type_hints(kind, include_extras=True)
        options += [_option(field.name, field.default, own[field.name]) for field in dataclasses.fields(kind)]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    flat.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a command computes, and what it prints."""

    device: Device = "cpu"
    threads: Threads = 0
    json: Json = False
    quiet: Quiet = False
    trust_remote_code: Trust = False

    def output(self) -> Output:
        """The output of the command."""
        return Output(self.json, self.quiet)

    def setup(self) -> None:
        """Set up the process for the device and threads."""
        setup_process(self.device, self.threads)


@dataclasses.dataclass(frozen=True)
class MeasureOptions:
    """Measurements that are shown with compressed models: made now, or read from files."""

    against: Against = None
    ppl: Ppl = None
    context: Context = 1024
    windows: Windows = 0
    evaluation: Evaluations = None
    check: Check = True
    dtype: Dtype = "auto"

    def read(self) -> list[Evaluation]:
        """The evaluations in the files that are named."""
        from pocketllm.report import read_evaluations

        return [found for path in self.evaluation or [] for found in read_evaluations(path)]

    def measure(
        self, models: list[tuple[Path, Path | None]], names: list[str], run: RunOptions, bars: Bars
    ) -> list[Evaluation]:
        """Perplexity of models with their adapters, and of the dense one; nothing without a text.

        Args:
            names: of the dense models that they were made from.
        """
        if self.ppl is None:
            return []
        measuring = Measuring(
            self.ppl, self.context, self.windows, self.dtype, run.device, run.trust_remote_code
        )
        return measuring.evaluations(models, dense_of(self.against, names), bars)
