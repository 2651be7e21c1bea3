"""Options that several commands take together, as one parameter of the command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from pocketllm.cli.evaluated_models import Measuring, dense_of
from pocketllm.cli.model_loading import load_any
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Bars, Output
from pocketllm.cli.shared_options import (
    Adapter,
    Against,
    Check,
    Context,
    Device,
    Dtype,
    Evaluations,
    Json,
    Mode,
    Ppl,
    Quiet,
    Threads,
    Trust,
    Windows,
)
from pocketllm.config.settings import help_of
from pocketllm.ranks import launched

if TYPE_CHECKING:
    from pocketllm.report import Evaluation


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of a command whose type is a dataclass by an option for each field."""
    hints, groups = get_type_hints(command, include_extras=True), dict[str, Any]()
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            options += _options_of(groups[name])
        else:
            options.append(_option(name, parameter.default, hints[name]))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        command(**values)

    flat.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    """An option for each field of a dataclass.

    A field that does not say how it is shown takes its help from the docstring, as `help_of`, and the other arguments
    of `typer.Option` from its metadata.
    """
    hints, helps = get_type_hints(group, include_extras=True), help_of(group)
    for field in dataclasses.fields(group):
        kind = hints[field.name]
        if get_origin(kind) is not Annotated:
            kind = Annotated[kind, typer.Option(help=helps[field.name], **field.metadata)]
        yield _option(field.name, field.default, kind)


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
        """The output of the command; of several processes, only the first shows progress."""
        return Output(self.json, self.quiet or launched()[0] > 0)

    def setup(self) -> None:
        """Set up the process for the device and threads."""
        setup_process(self.device, self.threads)


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded."""

    adapter: Adapter = None
    mode: Mode = "auto"
    dtype: Dtype = "auto"

    def load(self, model: str, run: RunOptions) -> tuple[Any, Any, dict[str, Any]]:
        """A compressed or dense model, its tokenizer, and facts; see `load_any`."""
        return load_any(model, self.mode, self.dtype, run.device, run.trust_remote_code, self.adapter)


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
