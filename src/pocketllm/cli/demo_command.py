"""`pocketllm demo`: compress, recover, load back, compare with the dense model, run packed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketllm.cli.bench_command import speed_table
from pocketllm.cli.compress_command import NoCalibration, PresetName
from pocketllm.cli.model_loading import load_any
from pocketllm.cli.process import setup_process
from pocketllm.cli.render import Bars, Output, kinds_table, summary_table
from pocketllm.cli.shared_options import Json, Overwrite, Quiet, Threads
from pocketllm.cli.text_perplexity import EvalText, perplexity_table
from pocketllm.config import DEMO_RECOVERY, DEMO_SETTINGS, CompressConfig, CompressOptions, replaced
from pocketllm.errors import SourceError

app = typer.Typer()

Bpw = Annotated[
    float | None,
    typer.Option(help="Target: stored bits per weight of the compressed matrices, everything counted."),
]

# Where each stage begins and ends in the total time, as measured with the built-in model on two cores.
_PARTS = {
    "compress": (0.0, 0.63),
    "check": (0.0, 0.01),
    "measure": (0.01, 0.14),
    "fit": (0.14, 0.15),
    "encode": (0.15, 0.63),
    "teacher": (0.63, 0.68),
    "train": (0.68, 0.9),
    "perplexity": (0.9, 0.98),
    "bench": (0.98, 1.0),
}


@app.command(epilog="Example:\n\n  pocketllm demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the compressed model.")] = Path(
        "pocketllm-demo"
    ),
    model: Annotated[str, typer.Option(help="Model to compress.")] = "builtin:smollm2-135m",
    preset: PresetName = None,
    bpw: Bpw = None,
    no_calibration: NoCalibration = False,
    recover_steps: Annotated[
        int, typer.Option(min=0, help="Distillation steps after the compression; 0 skips it.")
    ] = DEMO_RECOVERY.steps,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The three primary colors are",
    context: Annotated[int, typer.Option(min=2, help="Tokens per measured window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Largest number of windows to measure.")] = 2,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress the built-in model, recover it, measure it against the dense one, and run it packed."""
    from pocketllm.evaluate import BenchRun

    show = Output(json, quiet)
    config = demo_config(preset, bpw, no_calibration)
    setup_process(threads=threads)
    with show.bars() as bars:
        run = Demo(model, config, output, recover_steps, overwrite, threads, TotalProgress(bars))
        text = run.read_text(context, windows)
        values = run.run(text, prompt)
    measured = {title: values[title] for title in run.titles}
    show.result(
        values,
        kinds_table(values["report"]),
        summary_table(values["report"], values["output"]),
        perplexity_table(text, measured),
        speed_table([BenchRun(**run) for run in values["speed"]]),
        f"> {values['text']}",
        f"\nTry next:\n  pocketllm generate {run.last} --chat\n  pocketllm eval {run.last} --against {model} "
        f"--ppl YOUR_TEXT\n  pocketllm compress YOUR_MODEL -o small --bpw 3 --dry-run",
    )


def demo_config(preset: str | None, bpw: float | None, no_calibration: bool) -> CompressConfig:
    """The settings of the compression: those of `compress`, with some that save time."""
    config = CompressOptions(preset=preset, bpw=bpw, no_calibration=no_calibration).config()
    if config.calibration is None:
        return config
    return replaced(config, DEMO_SETTINGS)


@dataclass
class TotalProgress:
    """One progress bar for all stages, with one estimate of the time left."""

    bars: Bars
    reached: float = 0.0

    def on_event(self, event: Any) -> None:
        """The progress callback of the library."""
        self.update(event.stage, event.share, event.detail)

    def update(self, stage: str, share: float, detail: str = "") -> None:
        """A stage has reached `share` (0 to 1) of its part of the whole."""
        begins, ends = _PARTS.get(stage.partition(" ")[0], (0.0, 0.0))
        self.reached = max(self.reached, begins + share * (ends - begins))
        self.bars.update("demo", self.reached, f"{stage}: {detail}" if detail else stage)


@dataclass(frozen=True)
class Demo:
    """The stages of the demo. recover_steps: 0 leaves recovery out."""

    model: str
    config: CompressConfig
    output: Path
    recover_steps: int
    overwrite: bool
    threads: int
    bars: TotalProgress

    @property
    def last(self) -> Path:
        """Folder of the final model."""
        return self._recovered_folder if self.recover_steps else self.output

    @property
    def _recovered_folder(self) -> Path:
        return self.output.with_name(self.output.name + "-recovered")

    @property
    def titles(self) -> list[str]:
        """The models that are measured."""
        return ["dense", "compressed", *(["recovered"] if self.recover_steps else [])]

    def read_text(self, context: int, windows: int) -> EvalText:
        """The text to measure on: all its windows, at most `windows`; read before anything is compressed.

        Raises:
            ConfigError: the text has no window. SourceError: no model, or no tokenizer.
        """
        from pocketllm.source import resolve
        from pocketllm.source.folder import read_tokenizer
        from pocketllm.text import evaluation_text, token_windows

        folder = resolve(self.model, lambda message: self.bars.update("fetch", 0.0, message))
        tokenizer = read_tokenizer(folder, trust_remote_code=False)
        if tokenizer is None:
            raise SourceError(f"{folder}: has no tokenizer, which the demo needs; add its files")
        name, text = evaluation_text()
        return EvalText(name, text, context, min(windows, len(token_windows(tokenizer, text, context))))

    def run(self, text: EvalText, prompt: str) -> dict[str, Any]:
        """Everything the demo shows, as plain values."""
        from pocketllm import generate
        from pocketllm.evaluate import BenchConfig, bench
        from pocketllm.format import read_report

        folders: dict[str, str | Path] = {"dense": self.model, "compressed": self._compressed()}
        if self.recover_steps:
            folders["recovered"] = self._recovered()
        measured = {}
        for number, (title, model) in enumerate(folders.items()):
            on_progress = partial(self._measured, number, len(folders))
            measured[title] = text.measure(title, model, on_progress)
        loaded, tokenizer, _ = load_any(str(self.last), "auto", "auto", "cpu", trust_remote_code=False)
        written = generate(loaded, tokenizer, prompt)
        short = BenchConfig(
            prompt_tokens=min(64, text.context), new_tokens=24, threads=self.threads, rounds=1
        )
        speed = bench([str(self.last)], ["auto"], short, self.model, partial(self.bars.update, "bench"))
        return {
            "text_name": text.name,
            "context": text.context,
            "output": str(self.last),
            **measured,
            "text": written.text,
            "tokens_per_second": written.tokens_per_second,
            "speed": [dataclasses.asdict(one) for one in speed],
            "report": read_report(self.last),
        }

    def _measured(self, number: int, count: int, stage: str, share: float, detail: str = "") -> None:
        """The progress of one of several evaluations."""
        self.bars.update("perplexity", (number + share) / count, detail or stage)

    def _compressed(self) -> Path:
        """The compressed model, created unless it already exists."""
        import pocketllm
        from pocketllm.compression.pipeline import is_made
        from pocketllm.format import verify
        from pocketllm.format.workspace import remove_published

        if is_made(self.output, self.model, self.config):
            verify(self.output)
            remove_published(self.output)
            self.bars.update("compress", 1.0, f"{self.output} exists already")
        else:
            pocketllm.compress(
                self.model, self.config, self.output, progress=self.bars.on_event, overwrite=self.overwrite
            )
        return self.output

    def _recovered(self) -> Path:
        """The recovered model in a folder next to it, created unless it already exists."""
        import pocketllm
        from pocketllm.format import REPORT_NAME, read_report, verify
        from pocketllm.format.workspace import remove_published
        from pocketllm.recover.base_model import identity

        output = self._recovered_folder
        recovery = dataclasses.replace(DEMO_RECOVERY, steps=self.recover_steps)
        if (output / REPORT_NAME).is_file():
            facts = read_report(output).get("recover", {})
            wanted = (identity(read_report(self.output)), recovery.to_dict())
            if (facts.get("base"), facts.get("config")) == wanted:
                verify(output)
                remove_published(output)
                self.bars.update("train", 1.0, f"{output} exists already")
                return output
        pocketllm.distill(
            self.output, output, recovery, teacher=self.model, overwrite=True, progress=self.bars.on_event
        )
        return output
