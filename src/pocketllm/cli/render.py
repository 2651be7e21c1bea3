"""Terminal output: progress bars and notes on stderr, tables or one JSON object on stdout."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pocketllm.errors import ConfigError
from pocketllm.format.report_warnings import warnings_of


def _console(stderr: bool) -> Console:
    """A console; wide enough for the tables if there is no terminal.

    Without markup: paths and names of models may hold brackets. What the stream cannot encode is escaped.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    console = Console(stderr=stderr, highlight=False, markup=False)
    return (
        console if console.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=140)
    )


@dataclass
class Output:
    """Output of a command. as_json: only one JSON object on stdout. quiet: no progress, no notes."""

    as_json: bool = False
    quiet: bool = False
    stdout: Console = field(default_factory=lambda: _console(stderr=False))
    stderr: Console = field(default_factory=lambda: _console(stderr=True))

    def __post_init__(self) -> None:
        logger = logging.getLogger("pocketllm")
        others = [handler for handler in logger.handlers if not isinstance(handler, _Notes)]
        logger.handlers = [*others, _Notes(self)]

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        if not self.quiet:
            self.stderr.print(text)

    def result(self, values: Mapping[str, Any], *tables: Table | str) -> None:
        """Print the command's result in the requested form."""
        if self.as_json:
            sys.stdout.write(_json_for(sys.stdout, values) + "\n")
        else:
            for table in tables:
                self.stdout.print(table)

    def stream(self, text: str) -> None:
        """Print text as it is generated: no line break is added, and it is visible at once."""
        self.stdout.out(text, end="")
        self.stdout.file.flush()

    def ask(self, text: str) -> None:
        """Print a prompt on stderr, if somebody is at the terminal to answer it."""
        if sys.stdin.isatty() and not self.quiet:
            self.stderr.out(text, end="")

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Progress bars with the time left, while a long step runs."""
        shown = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.stderr,
            disable=self.quiet or not self.stderr.is_terminal,
        )
        with shown:
            yield Bars(self, shown)


class _Notes(logging.Handler):
    """Shows the library's warnings as notes; terms of use are shown even if notes are not."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self.output = output

    def emit(self, record: logging.LogRecord) -> None:
        show = self.output.stderr.print if getattr(record, "shown_always", False) else self.output.note
        show(f"warning: {record.getMessage()}")


@dataclass
class Bars:
    """Progress of stages; lines instead of bars if stderr is not a terminal."""

    output: Output
    progress: Progress
    tasks: dict[str, TaskID] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[float, float]] = field(default_factory=dict)

    def on_event(self, event: Any) -> None:
        """The progress callback of the library: an event has stage, share and detail."""
        self.update(event.stage, event.share, event.detail)

    def update(self, stage: str, share: float, detail: str = "") -> None:
        """A stage has reached `share` (0 to 1)."""
        key = f"{stage} {detail}" if stage == "fit" else stage
        if self.progress.disable:
            tenth = int(share * 10)
            begun, from_share = self.first.setdefault(key, (time.monotonic(), share))
            if tenth > self.shown.get(key, -1):
                self.shown[key] = tenth
                left = ""
                if from_share < share < 1:
                    left = _left((time.monotonic() - begun) * (1 - share) / (share - from_share))
                self.output.note(f"{stage}: {share:4.0%} {detail}{left}")
            return
        if stage == "fit" and key not in self.tasks:
            for name in [name for name in self.tasks if name.startswith("fit ")]:
                self.progress.remove_task(self.tasks.pop(name))
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(stage, total=1.0, detail=detail)
        self.progress.update(self.tasks[key], completed=share, detail=detail)


def _left(seconds: float) -> str:
    """The remaining time in words; empty below a minute."""
    if seconds < 60:
        return ""
    minutes = round(seconds / 60)
    return f", {minutes} min left" if minutes < 90 else f", {minutes / 60:.1f} h left"


def _json_for(stream: Any, values: Mapping[str, Any]) -> str:
    """One line of JSON; characters that the stream cannot encode are escaped."""
    text = json.dumps(_finite(values), ensure_ascii=False)
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeError:
        return json.dumps(_finite(values))
    return text


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(nbytes: float) -> str:
    """Bytes in full and in MB (10^6)."""
    return f"{nbytes:,.0f} ({nbytes / 1e6:,.1f} MB)"


def number(value: float, error: float | None = None) -> str:
    """Five significant digits and no exponent, `± error` to the same place; integers in full."""
    if isinstance(value, int):
        return f"{value:,}"
    largest = max(abs(value), error or 0.0)
    digits = 4 - math.floor(math.log10(largest)) if 0 < largest < math.inf else 0
    shown = f"{value:,.{max(0, digits)}f}"
    return shown if error is None else f"{shown} ± {error:,.{max(0, digits)}f}"


def parse_size(text: str, option: str = "--size") -> int:
    """Bytes of '30000000', '30MB' (10^6) or '30MiB' (2^20).

    Args:
        option: that they are the value of, for the error.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"{option}: got {text!r}, wanted bytes, such as 30000000, 30MB or 30MiB")
    return int(float(found[1]) * units[found[2].lower()])


def with_warnings(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as `--json` shows it."""
    return {**report, "warnings": warnings_of(report)}


def summary_table(report: Mapping[str, Any], title: str) -> Table:
    """Sizes and ratios of a compressed model."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("bytes on disk, all files", size(report["bytes_on_disk"]))
    table.add_row(
        "smaller than bf16 / fp32, all files",
        f"{report['ratio_files_bf16']:.2f}x / {report['ratio_files_fp32']:.2f}x",
    )
    table.add_row(
        "smaller than bf16 / fp32, compressed matrices",
        f"{report['ratio_matrices_bf16']:.2f}x / {report['ratio_matrices_fp32']:.2f}x",
    )
    table.add_row("bits per weight: matrices", f"{report['bpw_matrices']:.3f}")
    table.add_row("bits per weight: blocks' linear weights", f"{report['bpw_blocks']:.3f}")
    table.add_row("bits per weight: every parameter", f"{report['bpw_all']:.3f}")
    for part, nbytes in report["bytes_by_part"].items():
        share = nbytes / report["bytes_on_disk"]
        table.add_row(f"  {part.replace('_', ' ')}", f"{size(nbytes)}  {share:6.1%}")
    table.add_row("left dense or not stored", f"{len(report['skipped'])} tensors")
    if report.get("gguf"):
        gguf = report["gguf"]
        table.add_row("errors are relative to", f"{gguf['name']} weights of {gguf['file']}, dequantized")
    if report.get("left_out"):
        left = "\n".join(f"{name}: {reason}" for name, reason in report["left_out"].items())
        table.add_row("files left out", left)
    if report.get("recover"):
        table.add_row(f"recovered by {report['recover']['method']}", _recovered(report["recover"]))
    if report.get("seconds"):
        table.add_row("seconds", f"{report['seconds']:.0f}")
    for kind in ("peak_memory_bytes", "peak_gpu_memory_bytes"):
        if report.get(kind):
            name = kind.removesuffix("_bytes").replace("_", " ")
            table.add_row(f"{name}, predicted" if report.get("is_plan") else name, size(report[kind]))
    for text in warnings_of(report):
        table.add_row("warning", text, style="yellow")
    return table


def _recovered(facts: Mapping[str, Any]) -> str:
    change = f"{number(facts['kl_before'])} -> {number(facts['kl_after'])}"
    return f"{facts['steps']} steps, KL to the dense model {change} nats per token"


def kinds_table(report: Mapping[str, Any]) -> Table:
    """Codec and error per kind of matrix."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for matrix in report["matrices"]:
        kinds[matrix["kind"]].append(matrix)
    nmse = "nmse (predicted)" if report.get("is_plan") else "nmse"
    table = Table(title="compressed matrices")
    for header in ("kind", "matrices", "weights", "d", "K", "bpw", nmse, "proxy error", "utilization"):
        table.add_column(header, justify="left" if header == "kind" else "right")
    for kind, matrices in kinds.items():
        weights = [math.prod(m["shape"]) for m in matrices]

        def mean(key: str, form: str, of: list[Mapping[str, Any]] = matrices, w: list[int] = weights) -> str:
            values = [m.get(key) for m in of]
            known = [value for value in values if value is not None and value == value]
            if len(known) < len(values):
                return ""
            return format(sum(value * n for value, n in zip(known, w, strict=True)) / sum(w), form)

        table.add_row(
            kind,
            str(len(matrices)),
            f"{sum(weights):,}",
            _values(matrices, "vector_len"),
            _values(matrices, "codebook_size"),
            mean("bpw", ".3f"),
            mean("nmse", ".4f"),
            mean("proxy_error", ".5f"),
            mean("codebook_utilization", ".2%"),
        )
    return table


def skipped_table(report: Mapping[str, Any]) -> Table:
    """Tensors that are not compressed, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for entry in report["skipped"]:
        reasons[entry["reason"]].append(entry["name"])
    table = Table(title="not compressed")
    table.add_column("reason")
    table.add_column("tensors", justify="right")
    table.add_column("for example", overflow="fold")
    for reason, names in reasons.items():
        table.add_row(reason, str(len(names)), names[0])
    return table


def _values(matrices: list[Mapping[str, Any]], key: str) -> str:
    return ", ".join(str(value) for value in sorted({m[key] for m in matrices}))
