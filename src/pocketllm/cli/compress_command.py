"""`pocketllm compress`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.option_groups import RunOptions, with_groups
from pocketllm.cli.publishing import push_folder, with_measured_card
from pocketllm.cli.removed_options import SettingsCommand
from pocketllm.cli.render import (
    Bars,
    Output,
    kinds_table,
    parse_size,
    skipped_table,
    summary_table,
    with_warnings,
)
from pocketllm.cli.shared_options import (
    Compensate,
    Context,
    KeepEmbeddings,
    MaxMemory,
    MeasuredIn,
    OutputFolder,
    Override,
    Overwrite,
    Ppl,
    Private,
    Seed,
    Windows,
    count,
    parse_overrides,
    set_option,
)
from pocketllm.cli.target_list import Several, Targets, parse_bpw, refuse
from pocketllm.cli.text_perplexity import EvalText, perplexity_table, read_eval_text
from pocketllm.config import PRESETS, CompressConfig, CompressOptions, DistillConfig, EvalConfig
from pocketllm.errors import ConfigError
from pocketllm.ranks import launched

if TYPE_CHECKING:
    from pocketllm import Report

app = typer.Typer()

_PRESETS = "\n\n".join(f"  {name}: {entry.summary}" for name, entry in PRESETS.items())
DenseModel = Annotated[
    str,
    typer.Argument(
        help="Folder, GGUF file, Hub id (OWNER/NAME[@REVISION]), builtin:smollm2-135m or builtin:gemma-3-270m."
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="Named configuration; listed at the end of 'pocketllm compress --help'."),
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Target: size of the bf16 checkpoint divided by that of the output folder."),
]
Size = Annotated[str | None, typer.Option(help="Target: bytes of the output folder, such as 30MB or 30MiB.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration text: file, folder, or OWNER/NAME[:CONFIG[:SPLIT]] on the Hub; repeatable."
    ),
]
NoCalibration = Annotated[
    bool, typer.Option("--no-calibration", help="Minimize the error of the weights alone; needs no text.")
]
Recover = Annotated[
    str | None,
    typer.Option(help="distill: recover accuracy after the compression, as `pocketllm finetune` does."),
]
RecoverText = Annotated[
    list[str] | None,
    typer.Option(help="Text for the recovery; repeatable. The default is the calibration text."),
]
Push = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Upload the result to the Hugging Face Hub under this id."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and exact sizes; fit nothing.")]


@dataclass(frozen=True)
class RecipeOptions:
    """What to make; see `CompressOptions`."""

    preset: PresetName = None
    bpw: Targets = None
    ratio: Ratio = None
    size: Size = None
    calibration: Calibration = None
    no_calibration: NoCalibration = False
    override: Override = None
    keep_embeddings: KeepEmbeddings = False
    settings: Annotated[list[str] | None, set_option("compress")] = None
    seed: Seed = 0
    max_memory: MaxMemory = None
    compensate: Compensate = None

    def parsed(self) -> list[CompressOptions]:
        """The options with their values parsed, for every target.

        Raises:
            ConfigError: a size or override that cannot be read.
        """
        bpw = [None] if self.bpw is None else list(parse_bpw(self.bpw))
        first = CompressOptions(
            preset=self.preset,
            bpw=bpw[0],
            ratio=self.ratio,
            size=None if self.size is None else parse_size(self.size),
            calibration=tuple(self.calibration or ()),
            no_calibration=self.no_calibration,
            keep_embeddings=self.keep_embeddings,
            overrides=parse_overrides(self.override or []),
            seed=self.seed,
            max_memory=None if self.max_memory is None else parse_size(self.max_memory, "--max-memory"),
            compensate=self.compensate,
            settings=tuple(self.settings or ()),
        )
        return [first, *(replace(first, bpw=more) for more in bpw[1:])]


@app.command(
    cls=SettingsCommand,
    epilog="Examples:\n\n  pocketllm compress builtin:smollm2-135m -o smol-8x --preset calibrated-8x\n\n"
    "  pocketllm compress ./model-Q8_0.gguf -o small --bpw 3\n\n"
    "  pocketllm compress ./my-model -o small --bpw 3 --dry-run\n\n"
    "  pocketllm compress ./my-model -o several --bpw 2,3,4\n\n"
    "  pocketllm compress ./my-model -o small --size 60MB --calibration my-texts/\n\n"
    "  pocketllm compress ./my-model -o small --ratio 6 --override '*.v_proj.weight=5'\n\n"
    "  pocketllm compress ./my-model -o small --set calibration.tokens=65536 --set dense_first=1\n\n"
    "  pocketllm compress owner/name -o small --preset paper-16x --set codec.hidden=32 --json\n\n"
    "  pocketllm compress ./my-model -o small --bpw 2.5 --recover distill --recover-text my-texts/ --ppl test.txt\n\n"
    "  pocketllm compress owner/name -o small --ppl test.txt --push me/name-small"
    f"\n\nPresets:\n\n{_PRESETS}",
)
@with_groups
def compress(
    model: DenseModel,
    output: OutputFolder,
    *,
    recipe: RecipeOptions,
    calibration_cache: MeasuredIn = None,
    recover: Recover = None,
    recover_text: RecoverText = None,
    ppl: Ppl = None,
    context: Context = EvalConfig.context,
    windows: Windows = 0,
    push: Push = None,
    private: Private = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    run: RunOptions,
) -> None:
    """Compress a model: plan, fit, encode, write. Rerun the command to resume.

    --recover also recovers accuracy; --ppl measures the dense model and every result.
    """
    show, trust, is_first = run.output(), run.trust_remote_code, launched()[0] == 0
    options = recipe.parsed()
    configs, number = [each.config() for each in options], count("--windows", windows)
    for note in filter(None, (options[0].note(), options[0].text_note())):
        show.note(note)
    recovery = recovery_of(options[0], recover, recover_text or [])
    if len(configs) > 1:
        refuse("applies to one target; give one to --bpw", {"--recover": recover, "--push": push})
    if launched()[1] > 1:
        refuse("runs in one process; compress first, then launch pocketllm finetune", {"--recover": recover})
    if recipe.max_memory is not None:
        later = {"--recover": recover, "--ppl": ppl}
        refuse("--max-memory applies to compressing only; run pocketllm eval or finetune later", later)
    run.setup()
    text = None if ppl is None else read_eval_text(ppl, model, context, number, trust)
    place = _Place(device=run.device, trust_remote_code=trust, calibration_folder=calibration_cache)
    if len(configs) > 1:
        several = Several(model, configs, output, text=text, place=vars(place), overwrite=overwrite)
        return several.plan(show) if dry_run else several.make(show)
    job = _Job(model, configs[0], output, recovery=recovery, text=text, place=place)
    if push is not None:
        from pocketllm.format import check_push

        check_push(push)
    with show.bars() as bars:
        report, measured = (job.plan(bars), {}) if dry_run else job.make(bars, overwrite)
        if not is_first:
            return
        report = with_measured_card(report, output, text, measured)
        commit = None if push is None or dry_run else push_folder(bars, output, push, private)
    _show(show, with_warnings({**report.to_dict(), "commit": commit}), measured, job)


@dataclass(frozen=True)
class _Place:
    """Where and how the compression runs, as the keywords of `pocketllm.compress`."""

    device: str
    trust_remote_code: bool
    calibration_folder: Path | None


@dataclass(frozen=True)
class _Job:
    """The compression to run, and the text on which every result is measured."""

    model: str
    config: CompressConfig
    output: Path
    recovery: DistillConfig | None
    text: EvalText | None
    place: _Place

    def plan(self, bars: Bars) -> Report:
        """The plan and exact sizes."""
        import pocketllm
        from pocketllm.recover import check_recovery

        if self.recovery is not None:
            check_recovery(self.model, self.recovery, self.place.trust_remote_code)
        return pocketllm.dry_run(self.model, self.config, **self._how(bars))

    def make(self, bars: Bars, overwrite: bool) -> tuple[Report, dict[str, Any]]:
        """The report of the compressed or recovered model, and measurements by title."""
        import pocketllm
        from pocketllm.recover import compress_and_distill

        found: dict[str, Any] = {}

        def measure(title: str, model: str | Path) -> None:
            if self.text is not None and launched()[0] == 0:
                found[title] = self.text.measure(
                    title, model, bars.update, self.place.device, self.place.trust_remote_code
                )

        measure("dense", self.model)
        how = {**self._how(bars), "overwrite": overwrite}
        if self.recovery is None:
            report = pocketllm.compress(self.model, self.config, self.output, **how)
            measure("compressed", self.output)
            return report, found
        report, _ = compress_and_distill(
            self.model, self.config, self.recovery, self.output, made=measure, **how
        )
        return report, found

    def _how(self, bars: Bars) -> dict[str, Any]:
        return {**vars(self.place), "progress": bars.on_event}


def _show(show: Output, report: dict[str, Any], measured: dict[str, Any], job: _Job) -> None:
    if report.get("is_plan"):
        title = f"plan for {job.model} (nothing was fitted)"
        show.result(report, summary_table(report, title), kinds_table(report), skipped_table(report))
        return
    if job.recovery is not None:
        from pocketllm.format import read_report

        report["recover"] = read_report(job.output)["recover"]
    tables = [kinds_table(report), summary_table(report, f"{job.model} -> {job.output}")]
    if job.text is not None:
        report["measured"] = measured
        tables.append(perplexity_table(job.text, measured))
    show.result(report, *tables)


def recovery_of(options: CompressOptions, method: str | None, texts: list[str]) -> DistillConfig | None:
    """The settings of the recovery; None without one.

    Raises:
        ConfigError: another method than distill, or settings or texts of a recovery without --recover.
    """
    if method is None:
        given = [*(["--recover-text"] if texts else []), *options.recovery_keys]
        if given:
            raise ConfigError(f"{', '.join(given)}: needs --recover distill")
        return None
    if method != "distill":
        raise ConfigError(f"--recover: got {method!r}, wanted distill (for lora use pocketllm finetune)")
    return options.recovery(tuple(texts))
