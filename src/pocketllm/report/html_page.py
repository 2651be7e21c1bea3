"""One HTML file about a compressed model: gather its contents, lay them out in sections, and write it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pocketllm
from pocketllm.errors import ConfigError
from pocketllm.files import real_path
from pocketllm.format import check_target, write_atomically
from pocketllm.recover import check_adapter
from pocketllm.report.codebook_usage import CodebookUsage, codebooks_section, count_usage
from pocketllm.report.evaluations import Evaluation
from pocketllm.report.model_facts import ModelFacts, mean, read_model, with_adapter
from pocketllm.report.perplexity_section import Subject, dense_figures, perplexity_section
from pocketllm.report.recipe import commands_of, recipe_section
from pocketllm.report.rendering import need_templates, render_page
from pocketllm.report.sections import (
    Section,
    bits_section,
    error_section,
    size_section,
    skipped_section,
    weights_section,
)
from pocketllm.report.weight_distributions import Weights, compare_weights
from pocketllm.source import folder_of, name_of, resolve_local
from pocketllm.torch_state import in_default_torch_state

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Page:
    """A written report.

    command: reproduces the model. adapter_command: reproduces its adapter; '' if unknown or if there is none.
    missing: settings without an option.
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


def only_read(models: Sequence[Path], adapters: Sequence[Path | None], against: str | None) -> list[Path]:
    """The input folders of a result, with the dense model's if it is named and on this machine. Provisional."""
    dense = None if against is None else resolve_local(against)
    return [path for path in (*models, *adapters, dense) if path is not None]


def check_html(output: Path, folders: Iterable[str | Path] = ()) -> None:
    """Check before any work that the output is an HTML file that can be written. Provisional.

    Args:
        folders: that it must not be in: the model's and its adapter's.

    Raises:
        ConfigError: another suffix. OutputError: as `check_target`.
        ExtraError: Jinja2 or matplotlib is not installed.
    """
    need_templates()
    check_target(output, folders)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{output}: wanted a name that ends in .html")


def default_output(folder: Path, adapter: Path | None = None) -> Path:
    """`smol-8x.html` next to the folder `smol-8x`, outside of what is counted. Provisional.

    With the adapter `tuned` it is `smol-8x-with-tuned.html`, so that the page of the base is kept. The page of a
    model in the Hub's cache is written to the current folder.
    """
    folder, name = real_path(folder), name_of(folder)
    place = folder.parent if name == folder.name else Path.cwd()
    return place / f"{name}{f'-with-{real_path(adapter).name}' if adapter else ''}.html"


@in_default_torch_state
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
        folder: the compressed model, a folder or Hub id. output: file to write; None takes `default_output`.
        adapter: trained on the model; its bytes are counted in every size.
        against: the dense model, as for `pocketllm.compress`; None looks for it where it was compressed
            from, on this machine only.
        evaluations: perplexities to show; see `read_evaluations`.
        check: compare every file with its checksum first. trust_remote_code: as for `pocketllm.compress`.
        progress: called with the stage (`check`, `indices`, `weights`, `write`), its finished share, a detail.

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
    folder, adapter = folder_of(folder), None if adapter is None else Path(adapter)
    target = default_output(folder, adapter) if output is None else Path(output)
    check_html(target, only_read([folder], [adapter], against))
    if adapter is not None:
        check_adapter(adapter, folder)  # before the checksums, which take longer
    progress("check", 0.0, str(folder))
    model = read_model(folder, check)
    progress("check", 1.0, str(folder))
    if adapter is not None:
        model = with_adapter(model, adapter)
    usages = count_usage(model, partial(progress, "indices"))
    progress("indices", 1.0, "")
    weights = compare_weights(model, against, trust_remote_code, partial(progress, "weights"))
    progress("write", 0.0, "charts")
    page = _write(target, model=model, usages=usages, weights=weights, evaluations=evaluations)
    progress("write", 1.0, str(target))
    return page


def _write(
    target: Path,
    *,
    model: ModelFacts,
    usages: Sequence[CodebookUsage],
    weights: Weights,
    evaluations: Sequence[Evaluation],
) -> Page:
    evaluations = list(dict.fromkeys(evaluations))
    command, training = commands_of(model)
    sections = [
        size_section(model),
        bits_section(model),
        error_section(model),
        codebooks_section(model, usages),
        weights_section(model, weights),
        _perplexity(model, weights, evaluations),
        recipe_section(model, command, training),
        skipped_section(model),
    ]
    shown = (e for e in evaluations if e.compressed and bool(e.adapter) == (model.adapter is not None))
    measured = next(shown, None)
    text = render_page(
        sections,
        model=model,
        nmse=mean(model.matrices, lambda m: m.nmse),
        measured=measured,
        dense=measured and dense_figures(evaluations).get(measured.setting),
        version=pocketllm.__version__,
    )
    data = text.encode()
    write_atomically(target, data)
    return Page(
        output=target,
        bytes=len(data),
        command=command.text,
        missing=(*command.missing, *training.missing),
        absent={section.name: section.absent for section in sections if section.absent},
        mismatch=weights.mismatch,
        adapter=str(model.adapter.folder) if model.adapter else "",
        adapter_command=training.text,
    )


def _perplexity(model: ModelFacts, weights: Weights, evaluations: Sequence[Evaluation]) -> Section:
    adapter = model.adapter
    subject = Subject(
        folder=model.folder,
        nbytes=model.report["bytes_on_disk"] - (adapter.bytes if adapter else 0),
        dense=(str(model.report["model"]), weights.source),  # the latter as named by --against
        adapter=adapter,
    )
    words = ["pocketllm", "report", name_of(model.folder)]
    words += ["--adapter", adapter.name] if adapter else []
    measure = f"{shlex.join(words)} --ppl TEXT.txt --context 1024 --windows 16"
    return perplexity_section(evaluations, measure, subject)
