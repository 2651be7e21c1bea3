"""The page: sections put into the template, one file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pocketllm
from pocketllm.errors import ConfigError, ExtraError
from pocketllm.recover import check_adapter
from pocketllm.report import sections as parts, svg
from pocketllm.report.charts import short
from pocketllm.report.collect import ModelFacts, mean, read_model, with_adapter
from pocketllm.report.command import Command, adapter_command, command_for
from pocketllm.report.evaluations import Evaluation
from pocketllm.report.files import check_target, only_read, write_whole
from pocketllm.report.making import making_section, skipped_section
from pocketllm.report.measured import Subject, dense_figures, perplexity_section, weights_section
from pocketllm.report.sections import Section
from pocketllm.report.use import Use, count_use, use_section
from pocketllm.report.weights import Weights, compare_weights

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Page:
    """A written report.

    command: that compresses the model again; adapter_command: that trains its adapter again, '' where that is not
    known or there is none; missing: settings that they cannot carry.
    absent: section -> why there is nothing to show. mismatch: why the dense model may be another one, or ''.
    """

    output: Path
    bytes: int
    command: str
    missing: tuple[str, ...]
    absent: dict[str, str]
    mismatch: str
    adapter: str = ""
    adapter_command: str = ""


def check_html(output: Path, folders: Iterable[str | Path] = ()) -> None:
    """Refuse an output that is no HTML file or cannot be written, before the work that makes it.

    Args:
        folders: that it must not lie in: the model's and its adapter's.

    Raises:
        ConfigError: another suffix. OutputError: as `check_target`.
        ExtraError: Jinja2 or matplotlib is not installed.
    """
    _environment()
    check_target(output, folders)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{output}: wanted a name that ends in .html")


def default_output(folder: Path, adapter: Path | None = None) -> Path:
    """`smol-8x.html` beside the folder `smol-8x`; not inside, whose bytes are counted.

    With the adapter `tuned` it is `smol-8x-with-tuned.html`, so that the page of the base stays.
    """
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}{f'-with-{adapter.resolve().name}' if adapter else ''}.html")


def html_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    against: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    check: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, share, detail: None,
) -> Page:
    """Write an HTML file about a compressed model, or about one and its adapter together.

    Args:
        folder: the compressed model.
        output: file to write; None takes the folder's name with `.html`, beside the folder.
        adapter: trained on the model; its bytes are counted in every size.
        against: the dense model, as for `pocketllm.compress`; None looks for it where it was compressed
            from, on this machine only.
        evaluations: perplexities to show; see `read_evaluations`.
        check: compare every file with its checksum first.
        trust_remote_code: let transformers run code that the dense model's folder contains.
        progress: told the stage (`check`, `indices`, `weights`, `write`), the finished share of it, a detail.

    Returns:
        What was written, and what is absent from it.

    Raises:
        FormatError: not a compressed model, or damaged; or no adapter.
        SourceError: the model named by `against` is missing or another one.
        OutputError, ConfigError: the output cannot be written, lies in a model or is no .html file; an adapter
            of another model.
        ExtraError: Jinja2 or matplotlib is not installed.

    Example:
        >>> html_report("smol-8x", against="builtin:smollm2-135m").output
        PosixPath('smol-8x.html')
    """
    folder, adapter = Path(folder), None if adapter is None else Path(adapter)
    target = default_output(folder, adapter) if output is None else Path(output)
    check_html(target, only_read([folder], [adapter], against))
    model = _model(folder, adapter, check, progress)
    uses = count_use(model, lambda share, detail: progress("indices", share, detail))
    progress("indices", 1.0, "")
    weights = compare_weights(
        model, against, trust_remote_code, lambda share, detail: progress("weights", share, detail)
    )
    progress("write", 0.0, "charts")
    content = _Content(model, uses, weights, list(dict.fromkeys(evaluations)), *_commands(model))
    page = _write(content, target)
    progress("write", 1.0, str(target))
    return page


@dataclass(frozen=True)
class _Content:
    """All that a page shows. command: that compresses the model; training: that trains its adapter."""

    model: ModelFacts
    uses: Sequence[Use]
    weights: Weights
    evaluations: Sequence[Evaluation]
    command: Command
    training: Command | None


def _model(folder: Path, adapter: Path | None, check: bool, progress: Progress) -> ModelFacts:
    """The model, and its adapter; whether they belong together is looked at before checksums are."""
    if adapter is not None:
        check_adapter(adapter, folder)
    progress("check", 0.0, str(folder))
    model = read_model(folder, check)
    progress("check", 1.0, str(folder))
    return model if adapter is None else with_adapter(model, adapter)


def _commands(model: ModelFacts) -> tuple[Command, Command | None]:
    """That compresses the model; that trains its adapter, None where there is none or it came from elsewhere."""
    name = model.folder.resolve().name
    command = command_for(str(model.report["model"]), name, model.report["config"])
    if model.adapter is None or model.adapter.record is None:
        return command, None
    return command, adapter_command(name, model.adapter.name, model.adapter.record)


def _write(content: _Content, target: Path) -> Page:
    model, training = content.model, content.training or Command()
    found = _sections(content)
    text = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=model.name,
            adapter=model.adapter,
            facts=_facts(model, content.evaluations),
            sections=found,
            version=pocketllm.__version__,
        )
    )
    data = text.encode()
    write_whole(target, data)
    return Page(
        output=target,
        bytes=len(data),
        command=content.command.text,
        missing=(*content.command.missing, *training.missing),
        absent={section.name: section.absent for section in found if section.absent},
        mismatch=content.weights.mismatch,
        adapter=str(model.adapter.folder) if model.adapter else "",
        adapter_command=training.text,
    )


def _environment() -> Any:
    """The template engine; everything it puts in is escaped.

    Raises:
        ExtraError: Jinja2 or matplotlib is not installed.
    """
    svg.need_matplotlib()
    try:
        import jinja2
    except ImportError as error:
        raise ExtraError(
            "a report needs Jinja2; install it with: pip install 'pocketllm-codec[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment


def _sections(content: _Content) -> list[Section]:
    model = content.model
    base_bytes = model.report["bytes_on_disk"] - (model.adapter.bytes if model.adapter else 0)
    dense = (str(model.report["model"]), content.weights.source)  # the latter as named by --against
    subject = Subject(model.folder, base_bytes, dense, model.adapter)
    words = ["pocketllm", "report", model.folder.resolve().name]
    words += ["--adapter", model.adapter.name] if model.adapter else []
    how = f"{shlex.join(words)} --ppl TEXT.txt --context 1024 --windows 16"
    return [
        parts.size_section(model),
        parts.bits_section(model),
        parts.error_section(model),
        use_section(model, content.uses),
        weights_section(model, content.weights),
        perplexity_section(content.evaluations, how, subject),
        making_section(model, content.command, content.training),
        skipped_section(model),
    ]


def _facts(model: ModelFacts, evaluations: Sequence[Evaluation]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: (label, value, note)."""
    report = model.report
    also = ", adapter included" if model.adapter else ""
    facts = [
        ("on disk", parts.megabytes(report["bytes_on_disk"]), f"all files{also}"),
        ("against bf16", f"{report['ratio_files_bf16']:.2f}× smaller", "whole folders"),
        ("against fp32", f"{report['ratio_files_fp32']:.2f}× smaller", "whole folders"),
        ("bits per weight", short(report["bpw_matrices"]), f"compressed matrices{also}"),
        (
            "nmse",
            short(mean(model.matrices, lambda m: m.nmse)),
            f"mean over compressed weights{' of the base' if model.adapter else ''}",
        ),
    ]
    wanted = model.adapter is not None
    e = next((e for e in evaluations if e.compressed and bool(e.adapter) == wanted), None)
    if e is not None:
        dense = dense_figures(evaluations).get(e.setting)
        note = f"dense: {short(dense, 4)}" if dense is not None else Path(e.text).name
        facts.append(("perplexity", short(e.perplexity, 4), note))
    return facts
