"""The page: sections put into the template, one file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pocketllm
from pocketllm.errors import ConfigError, ExtraError
from pocketllm.report import sections as parts
from pocketllm.report import svg
from pocketllm.report.charts import short
from pocketllm.report.collect import ModelFacts, mean, read_model
from pocketllm.report.command import command_for
from pocketllm.report.evaluations import Evaluation
from pocketllm.report.files import check_target, write_whole
from pocketllm.report.making import making_section, skipped_section
from pocketllm.report.measured import perplexity_section, weights_section
from pocketllm.report.sections import Section
from pocketllm.report.use import Use, count_use, use_section
from pocketllm.report.weights import Weights, compare_weights

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Page:
    """A written report.

    command: that compresses the model again; missing: settings that it cannot carry.
    absent: section -> why there is nothing to show. mismatch: why the dense model may be another one, or ''.
    """

    output: Path
    bytes: int
    command: str
    missing: tuple[str, ...]
    absent: dict[str, str]
    mismatch: str


def check_html(output: Path) -> None:
    """Refuse an output that is no HTML file or cannot be written, before the work that makes it.

    Raises:
        ConfigError: another suffix. OutputError: as `check_target`.
        ExtraError: Jinja2 or matplotlib is not installed.
    """
    _environment()
    check_target(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{output}: wanted a name that ends in .html")


def default_output(folder: Path) -> Path:
    """`smol-8x.html` beside the folder `smol-8x`; not inside, whose bytes are counted."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.html")


def html_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    against: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    check: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, share, detail: None,
) -> Page:
    """Write an HTML file about a compressed model.

    Args:
        folder: the compressed model.
        output: file to write; None takes the folder's name with `.html`, beside the folder.
        against: the dense model, as for `pocketllm.compress`; None looks for it where it was compressed
            from, on this machine only.
        evaluations: perplexities to show; see `read_evaluations`.
        check: compare every file with its checksum first.
        trust_remote_code: let transformers run code that the dense model's folder contains.
        progress: told the stage (`check`, `indices`, `weights`, `write`), the finished share of it, a detail.

    Returns:
        What was written, and what is absent from it.

    Raises:
        FormatError: not a compressed model, or damaged.
        SourceError: the model named by `against` is missing or another one.
        OutputError, ConfigError: the output cannot be written or is no .html file.
        ExtraError: Jinja2 or matplotlib is not installed.

    Example:
        >>> html_report("smol-8x", against="builtin:smollm2-135m").output
        PosixPath('smol-8x.html')
    """
    folder = Path(folder)
    target = default_output(folder) if output is None else Path(output)
    check_html(target)
    environment = _environment()
    progress("check", 0.0, str(folder))
    model = read_model(folder, check)
    progress("check", 1.0, str(folder))
    uses = count_use(model, lambda share, detail: progress("indices", share, detail))
    progress("indices", 1.0, "")
    weights = compare_weights(
        model, against, trust_remote_code, lambda share, detail: progress("weights", share, detail)
    )
    progress("write", 0.0, "charts")
    evaluations = list(dict.fromkeys(evaluations))
    command, missing = command_for(str(model.report["model"]), folder.resolve().name, model.report["config"])
    found = _sections(model, uses, weights, evaluations, command, missing)
    text = environment.get_template("page.html.j2").render(
        title=folder.resolve().name,
        facts=_facts(model, evaluations),
        sections=found,
        version=pocketllm.__version__,
    )
    data = text.encode()
    write_whole(target, data)
    progress("write", 1.0, str(target))
    absent = {section.name: section.absent for section in found if section.absent}
    return Page(target, len(data), command, missing, absent, weights.mismatch)


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


def _sections(
    model: ModelFacts,
    uses: Sequence[Use],
    weights: Weights,
    evaluations: Sequence[Evaluation],
    command: str,
    missing: Sequence[str],
) -> list[Section]:
    name = model.folder.resolve().name
    how = f"pocketllm report {shlex.quote(name)} --ppl TEXT.txt --context 1024 --windows 16"
    return [
        parts.size_section(model),
        parts.bits_section(model),
        parts.error_section(model),
        use_section(model, uses),
        weights_section(weights),
        perplexity_section(evaluations, how, model.report["bytes_on_disk"]),
        making_section(model, command, missing),
        skipped_section(model),
    ]


def _facts(model: ModelFacts, evaluations: Sequence[Evaluation]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: (label, value, note)."""
    report = model.report
    facts = [
        ("on disk", parts.megabytes(report["bytes_on_disk"]), "all files"),
        ("against bf16", f"{report['ratio_files_bf16']:.2f}× smaller", "whole folders"),
        ("against fp32", f"{report['ratio_files_fp32']:.2f}× smaller", "whole folders"),
        ("bits per weight", short(report["bpw_matrices"]), "compressed matrices"),
        ("nmse", short(mean(model.matrices, lambda m: m.nmse)), "mean over compressed weights"),
    ]
    for e in evaluations:
        if e.compressed:
            dense = next((d for d in evaluations if not d.compressed and d.setting == e.setting), None)
            note = f"dense: {short(dense.perplexity, 4)}" if dense else Path(e.text).name
            facts.append(("perplexity", short(e.perplexity, 4), note))
            break
    return facts
