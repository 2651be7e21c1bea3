"""`pocketllm report` and `compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.options import (
    Adapter,
    Context,
    Device,
    Dtype,
    Json,
    Ppl,
    Quiet,
    Threads,
    Trust,
    Windows,
    load_any,
    settle,
)
from pocketllm.cli.render import Bars, Output, size
from pocketllm.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from pocketllm.report import Comparison, Evaluation

app = typer.Typer()

Check = Annotated[bool, typer.Option(help="Verify every file's checksum first.")]
Against = Annotated[
    str | None, typer.Option(help="The dense model: folder, hub id or builtin:…; found by itself if local.")
]
Evaluations = Annotated[
    list[Path] | None, typer.Option(help="What 'pocketllm eval --json' printed, in a file; repeatable.")
]


@dataclasses.dataclass(frozen=True)
class _Measuring:
    """What --ppl asks for, and where it runs."""

    text: Path
    context: int
    windows: int
    dtype: str
    device: str
    trust: bool


@app.command(
    epilog="Examples:\n\n  pocketllm report smol-8x\n\n"
    "  pocketllm report smol-8x -o smol.html --against builtin:smollm2-135m\n\n"
    "  pocketllm report smol-8x --ppl wiki.test.raw --context 1024 --windows 16\n\n"
    "  pocketllm report smol-8x --evaluation smol.json --evaluation dense.json\n\n"
    "  pocketllm report smol-2bit --adapter smol-2bit-lora --ppl wiki.test.raw"
)
def report(
    folder: Annotated[Path, typer.Argument(help="A compressed model.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; FOLDER.html beside it by default.")
    ] = None,
    adapter: Adapter = None,
    against: Against = None,
    ppl: Ppl = None,
    context: Context = 1024,
    windows: Windows = 0,
    evaluation: Evaluations = None,
    check: Check = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write one HTML file about a compressed model: sizes, errors, codebooks, weights, perplexity."""
    show = Output(json, quiet)
    from pocketllm.recover.adapter import check_adapter
    from pocketllm.report import check_html, default_output, html_report, only_read, read_evaluations

    name = _model_of(folder, "report")
    if adapter is not None:
        check_adapter(adapter, folder)
    target = output or default_output(folder, adapter)
    check_html(target, only_read([folder], [adapter], against))
    _check_dense(against)
    evaluations = [found for path in evaluation or [] for found in read_evaluations(path)]
    settle(device, threads)
    with show.bars() as bars:
        if ppl is not None:
            how = _Measuring(ppl, context, windows, dtype, device, trust_remote_code)
            models = [(folder, adapter), (folder, None)] if adapter else [(folder, None)]
            evaluations += _measured(models, _dense(against, [name]), how, bars)
        page = html_report(
            folder,
            target,
            adapter=adapter,
            against=against,
            evaluations=evaluations,
            check=check,
            trust_remote_code=trust_remote_code,
            progress=bars.update,
        )
    values = {**dataclasses.asdict(page), "output": str(page.output)}
    values["evaluations"] = [dataclasses.asdict(e) for e in evaluations]
    lines = [f"{section}: {reason}" for section, reason in page.absent.items()]
    show.result(values, f"{page.output}: {size(page.bytes)}")
    for line in [*lines, *([page.mismatch] if page.mismatch else [])]:
        show.note(line)


@app.command(
    epilog="Examples:\n\n  pocketllm compare smol-8x smol-16x\n\n"
    "  pocketllm compare smol-* -o smol.png --ppl wiki.test.raw --windows 16\n\n"
    "  pocketllm compare smol-2bit smol-2bit-tuned --adapter smol-2bit-lora\n\n"
    "  pocketllm compare smol-8x smol-16x --json"
)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Compressed models.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture to write: NAME.png or .svg makes both.")
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="An adapter of one of them, repeatable: a row of base and adapter together."),
    ] = None,
    against: Against = None,
    ppl: Ppl = None,
    context: Context = 1024,
    windows: Windows = 0,
    evaluation: Evaluations = None,
    check: Check = True,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    trust_remote_code: Trust = False,
) -> None:
    """Several compressed models in one table, and in a picture: bytes, ratios, errors, perplexity."""
    show = Output(json, quiet)
    from pocketllm.report import (
        base_of,
        check_picture,
        compare as side_by_side,
        only_read,
        read_evaluations,
        save_picture,
    )

    if output is not None:
        check_picture(output, only_read(folders, adapter or [], against))
    names = [_model_of(folder, "compare") for folder in folders]
    adapters = adapter or []
    measured = [*((folder, None) for folder in folders), *((base_of(a, folders), a) for a in adapters)]
    evaluations = [found for path in evaluation or [] for found in read_evaluations(path)]
    settle(device, threads)
    with show.bars() as bars:
        if ppl is not None:
            how = _Measuring(ppl, context, windows, dtype, device, trust_remote_code)
            evaluations += _measured(measured, _dense(against, names), how, bars)
        found = side_by_side(
            folders, evaluations, check, lambda share, detail: bars.update("check", share, detail), adapters
        )
    pictures = [] if output is None else [str(path) for path in save_picture(found, output)]
    show.result({**found.to_dict(), "pictures": pictures}, _table(found), *pictures)
    for note in found.notes:
        show.note(note)


def _model_of(folder: Path, command: str) -> str:
    """The model that a folder was compressed from. command: that was given the folder.

    Raises:
        FormatError: it holds an adapter, or no compressed model.
    """
    from pocketllm.format.checkpoint import read_report
    from pocketllm.recover.adapter import SETTINGS_NAME

    if (folder / SETTINGS_NAME).is_file():
        raise FormatError(
            f"{folder}: an adapter; name the compressed model it was trained on "
            f"('pocketllm {command} MODEL --adapter {folder}' shows both)"
        )
    return str(read_report(folder)["model"])


def _check_dense(dense: str | None) -> None:
    """Raises ConfigError where the model to measure beside is a compressed one."""
    from pocketllm.format.checkpoint import check_dense
    from pocketllm.source.dense_checkpoint import resolve

    if dense is not None:
        check_dense(resolve(dense), dense, "with --against")


def _dense(against: str | None, names: Sequence[str]) -> str | None:
    """The dense model to measure beside: the one named, else the one that all were made from, if local."""
    from pocketllm.source.dense_checkpoint import resolve_local

    if against is not None:
        return against
    return names[0] if len(set(names)) == 1 and resolve_local(names[0]) is not None else None


def _measured(
    models: Sequence[tuple[Path, Path | None]], dense: str | None, how: _Measuring, bars: Bars
) -> list[Evaluation]:
    """Perplexity of the compressed models, some with an adapter, and of the dense one.

    Raises:
        ConfigError, SourceError: as `perplexity` and `read_text`. ExtraError: an adapter, but no PEFT.
    """
    from pocketllm.evaluate.perplexity import perplexity
    from pocketllm.recover.adapter import need_peft
    from pocketllm.report import Evaluation
    from pocketllm.text.read import read_text

    if any(adapter for _, adapter in models):
        need_peft()
    if how.windows < 0:
        raise ConfigError(f"--windows: got {how.windows}, wanted 0 (all) or more")
    _check_dense(dense)
    text = read_text(how.text)
    found = []
    named = [(str(folder), adapter) for folder, adapter in models]
    for model, adapter in [*named, *([(dense, None)] if dense is not None else [])]:
        loaded, tokenizer, facts = load_any(model, "dense", how.dtype, how.device, how.trust, adapter)

        def told(share: float, model: str = model, adapter: Path | None = adapter) -> None:
            stage = f"eval {Path(model).name}{f' + {adapter.name}' if adapter else ''}"
            bars.update(stage, share, model)

        result = perplexity(loaded, tokenizer, text, how.context, how.windows or None, told)
        values: Mapping[str, Any] = {**dataclasses.asdict(result), **facts, "model": model}
        found.append(Evaluation.from_dict({**values, "text": str(how.text), "dtype": str(loaded.dtype)}))
        del loaded
    return found


def _table(found: Comparison) -> Any:
    from rich.table import Table

    table = Table(title="compressed models; means are weighted by size")
    headers = ["model", "bytes on disk", "smaller, bf16 / fp32", "bpw", "nmse", "nmse, blocks", "proxy error"]
    measured = found.setting is not None
    for header in [*headers, *(["perplexity"] if measured else [])]:
        table.add_column(header, justify="left" if header == "model" else "right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for m in found.models:
        row = [
            m.name,
            size(m.bytes_on_disk),
            f"{m.ratio_files_bf16:.2f}x / {m.ratio_files_fp32:.2f}x",
            f"{m.bpw_matrices:.3f}",
            number(m.nmse, ".4f"),
            number(m.nmse_blocks, ".4f"),
            number(m.proxy_error, ".5f"),
        ]
        table.add_row(*row, *([number(m.perplexity, ".3f")] if measured else []))
    if found.dense_perplexity is not None:
        table.add_row("dense", *[""] * (len(headers) - 1), number(found.dense_perplexity, ".3f"))
    if found.setting is not None:
        setting = found.setting
        table.caption = (
            f"perplexity on {setting['text']}, context {setting['context']}, {setting['windows']} windows"
        )
    return table
