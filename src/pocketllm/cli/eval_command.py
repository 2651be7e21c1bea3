"""`pocketllm eval`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.model_loading import dtype_of, load_any
from pocketllm.cli.option_groups import RunOptions, with_groups
from pocketllm.cli.removed_options import SettingsCommand
from pocketllm.cli.shared_options import (
    Adapter,
    Context,
    Dtype,
    Mode,
    PplTexts,
    Runnable,
    Windows,
    count,
    set_option,
)
from pocketllm.config import EvalConfig, eval_config
from pocketllm.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from pocketllm.evaluate import Model, TaskOptions

app = typer.Typer()

Against = Annotated[
    str | None, typer.Option(help="Dense model to compare with; with --ppl also KL divergence from it.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="lm-eval tasks, separated by commas; `paper`: the paper's five; `local`: all tasks in --data."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with local task files, see docs/evaluation.md. Default: $POCKETLLM_DATA, and the Hub for "
        "missing files."
    ),
]


@app.command(
    name="eval",
    cls=SettingsCommand,
    epilog="Examples:\n\n  pocketllm eval smol-8x --ppl wiki.test.raw --context 1024 --windows 16\n\n"
    "  pocketllm eval smol-8x --against builtin:smollm2-135m --ppl wiki.test.raw --ppl c4.txt\n\n"
    "  pocketllm eval smol-8x --against builtin:smollm2-135m --tasks piqa,arc_easy --data ./data --limit 400\n\n"
    "  pocketllm eval smol-8x --tasks paper --set batch_tokens=4096",
)
@with_groups
def evaluate(
    model: Runnable,
    *,
    adapter: Adapter = None,
    ppl: PplTexts = None,
    against: Against = None,
    tasks: Tasks = None,
    data: Data = None,
    limit: Annotated[int, typer.Option(help="Number of documents of each task; 0 takes all.")] = 0,
    context: Context = EvalConfig.context,
    windows: Windows = 0,
    settings: Annotated[list[str] | None, set_option("eval")] = None,
    cache: Annotated[bool, typer.Option(help="Reuse earlier results of tasks, and store new ones.")] = True,
    mode: Mode = "dense",
    dtype: Dtype = "auto",
    run: RunOptions,
) -> None:
    """Measure perplexity, KL divergence from a dense model, and zero-shot tasks of a compressed or dense model."""
    from pocketllm import measure
    from pocketllm.cli.eval_tables import eval_tables
    from pocketllm.source import text_for

    config = eval_config(context, count("--windows", windows), count("--limit", limit), tuple(settings or ()))
    if not ppl and tasks is None:
        raise ConfigError("nothing to measure: give --ppl FILE, --tasks NAMES or both")
    show = run.output()
    texts = {str(file): text_for(file, model, run.trust_remote_code) for file in ppl or ()}
    options = task_options(tasks, data, cache)
    run.setup()
    subjects = _Subjects(dtype, run.device, run.trust_remote_code)
    other = None if against is None else subjects.named(against, "dense")
    with show.bars() as bars:
        values = measure(subjects.named(model, mode, adapter), other, texts, options, config, bars.update)
    values["dtype"] = str(dtype_of(dtype, run.device))
    show.result(values, *eval_tables(values))


@dataclass(frozen=True)
class _Subjects:
    """The models to measure, and how they run."""

    dtype: str
    device: str
    trust_remote_code: bool

    def named(self, name: str, mode: str, adapter: Path | None = None) -> Model:
        """A model as the user named it."""
        from pocketllm.evaluate import Model
        from pocketllm.source import resolve

        def load() -> tuple[Any, Any]:
            return load_any(str(folder), mode, self.dtype, self.device, self.trust_remote_code)[:2]

        folder = resolve(name)
        return Model(
            name,
            folder,
            setting=f"{dtype_of(self.dtype, self.device)}, {mode}, {self.device}",
            load=load,
            adapter=None if adapter is None else _adapter(adapter, folder),
            trust_remote_code=self.trust_remote_code,
        )


def _adapter(adapter: Path, base: Path) -> Any:
    from pocketllm.evaluate import Adapter as MeasuredAdapter
    from pocketllm.recover import attach_adapter, check_adapter

    check_adapter(adapter, base)
    return MeasuredAdapter(adapter, lambda model: attach_adapter(model, base, adapter))


def task_options(tasks: str | None, data: Path | None, cache: bool) -> TaskOptions | None:
    """The tasks to run, and the location of their data; None if no tasks were requested.

    Raises:
        SourceError: no such folder. Others as `task_names`.
    """
    from pocketllm.evaluate import TaskOptions, task_names
    from pocketllm.evaluate.tasks import check_installed

    if tasks is None:
        if data is not None:
            data_folder(data)
        return None
    folder = data_folder(data)
    check_installed()
    names = task_names([name for name in re.split(r"[,\s]+", tasks) if name], folder)
    return TaskOptions(tuple(names), folder, hub=data is None, cache=cache)


def data_folder(given: Path | None) -> Path | None:
    """Folder of local task files: --data, otherwise POCKETLLM_DATA if it is set.

    Raises:
        SourceError: no such folder.
    """
    named = os.environ.get("POCKETLLM_DATA")
    folder = given or (Path(named) if named else None)
    if folder is not None and not folder.is_dir():
        raise SourceError(f"{'--data' if given else 'POCKETLLM_DATA'}: {folder} is not a folder")
    return folder
