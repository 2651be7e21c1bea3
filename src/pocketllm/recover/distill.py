"""Distillation into the compressed form: no index changes, no byte is added.

Codebooks, decoders, row scales, norms, biases and matrices that are stored dense are tuned end to end so that
the compressed model's next-token distribution matches the dense model's: minimize KL(teacher || student),
averaged over positions, on any text. Afterwards all values are rounded as they are stored, and validated in that
form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.compression.progress import Event, ProgressCallback
from pocketllm.config import DistillConfig
from pocketllm.errors import ConfigError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import check_not_nested, is_published, named_output
from pocketllm.format.report import rounded
from pocketllm.format.rewrite import rewrite, stored_sizes
from pocketllm.recover.base_model import Base, check_context, find_teacher, open_base
from pocketllm.recover.distill_task import Distillation, load_student, planned_parameters, training_windows
from pocketllm.recover.loop import Loop, Progress, step_event
from pocketllm.recover.run_log import Run, check_places, open_run
from pocketllm.recover.teacher import TeacherCache, make_teacher, open_teacher
from pocketllm.recover.trainable import set_stored, stored_tensors
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.hub import folder_of
from pocketllm.text.windows import token_digest
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class DistillResult:
    """Result of a distillation.

    kl_*: mean KL(dense || compressed) in nats per token on the validation windows, before and in the stored
    form. loss_best: lowest validation loss; the same divergence unless labels are part of the loss.
    kl_tokens: number of the teacher's most likely tokens over which divergences are taken, all others counting
    as one; 0 means all tokens. steps: taken. best_step: the step whose parameters are kept. seconds: duration of
    all steps and validations, including those before a resumption.
    """

    output: str
    bytes_on_disk: int
    steps: int
    best_step: int
    stopped_early: bool
    kl_before: float
    loss_best: float
    kl_stored: float
    kl_tokens: int
    trained_parameters: dict[str, int]
    training_windows: int
    validation_windows: int
    seconds: float


@in_default_torch_state
def distill(
    folder: str | Path,
    output: str | Path,
    config: DistillConfig | None = None,
    *,
    teacher: str | None = None,
    teacher_on_disk: bool = False,
    teacher_cache: str | Path | None = None,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> DistillResult:
    """Tune a compressed model towards the dense one it was made from.

    Args:
        folder: the compressed model (folder or Hub id), which is not modified.
        output: folder to create, with the same layout and the same number of payload bytes. An unfinished run with
            the same arguments is resumed. The log of the run is written to `OUTPUT.log` (until the run is
            finished: `OUTPUT.partial/log`).
        teacher: the dense model (folder, Hub id, builtin:…); None takes the one named in the report.
        teacher_on_disk: read the teacher's blocks one after another whenever it runs, instead of holding it in
            memory.
        teacher_cache: folder where the teacher's most likely tokens (`teacher_top_k`) are kept for other students
            of the same teacher on the same text.
        progress: called after every step.

    Raises:
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError.

    Example:
        >>> pocketllm.distill("smol-2bit", "smol-2bit-tuned", DistillConfig(texts=("my-texts/",)))
    """
    config, folder, output = config or DistillConfig(), folder_of(folder), named_output(output)
    check_places(output, overwrite)
    base = open_base(Path(folder), output, trust_remote_code)
    name = teacher or str(base.report["model"])
    if teacher_cache is not None and not config.teacher_top_k:
        raise ConfigError("--teacher-cache: needs the number of tokens to keep, as in --set teacher_top_k=64")
    dense, windows = _inputs(base, config, name, progress)
    check_not_nested(output, dense)
    taught = {
        "teacher_weights": open_dense(dense, trust_remote_code).fingerprint(),
        "text": token_digest(torch.cat(windows)),
    }
    arguments = {"method": "distill", "teacher": name, **taught, **config.to_dict()}
    with open_run(output, base, arguments, config.loop, device, overwrite) as run:
        if is_published(output):  # by an earlier run that was killed afterwards
            return run.recall(DistillResult)
        cache = None if teacher_cache is None else _cache(Path(teacher_cache), run, windows, config, taught)
        load = _loader(run, base, dense, teacher_on_disk)
        source = make_teacher(load, run, windows, config.teacher_top_k, progress, cache)
        task = Distillation(load_student(base, config, run.state.device), source, windows, config, run.dtype)
        result = _train_and_store(run, base, name, task, progress)
    progress(Event("train", 1.0, str(output)))
    return result


def _loader(run: Run, base: Base, dense: Path, on_disk: bool) -> Callable[[], Any]:
    """Loads the teacher of a run from the folder `dense`."""
    return partial(
        open_teacher,
        dense,
        dtype=run.dtype,
        device=run.state.device,
        trust_remote_code=base.trust_remote_code,
        scratch=run.work.folder / "teacher" if on_disk else None,
    )


def _cache(
    folder: Path, run: Run, windows: tuple[Tensor, Tensor], config: DistillConfig, taught: dict[str, Any]
) -> TeacherCache:
    """The cache in a folder, with all that the teacher's tokens depend on."""
    facts = {
        **taught,
        "windows": [len(part) for part in windows],
        "context": config.context,
        "teacher_top_k": config.teacher_top_k,
        "device": run.state.device.type,
        "dtype": str(run.dtype),
    }
    return TeacherCache(folder, facts)


def _train_and_store(
    run: Run, base: Base, teacher: str, task: Distillation, progress: ProgressCallback
) -> DistillResult:
    """Train the student, round it as it is stored, write it, and finish the run."""
    config, student = task.config, task.student
    loop = Loop(task, config.loop, config.steps, work=run.work, log=run.log, state=run.state)
    # Measured on the base, before a resumed run is restored; without labels it is the first validation loss.
    before = task.divergence() if config.label_weight else None
    at = loop.run(lambda done: progress(step_event(done)))
    sizes, _ = stored_sizes(base.folder)
    stored = stored_tensors(student, {key: size[0] for key, size in sizes.items()})
    set_stored(student, stored)
    kl = at.history[0][1] if before is None else before, task.divergence()
    facts = _facts(config, base.identity, teacher, at, kl)
    final = run.write(lambda place: rewrite(base.folder, stored, place, facts))
    result = _result(run.output, final, loop, config, (task.train, task.validation), kl)
    legend = _legend(result, base.folder, teacher, config.label_weight)
    run.finish({**vars(result), **legend, "recover": facts}, at.history)
    return result


def _inputs(
    base: Base, config: DistillConfig, teacher: str, progress: ProgressCallback = lambda event: None
) -> tuple[Path, tuple[Tensor, Tensor]]:
    """The teacher's folder, and (training, validation) windows; all inputs are checked.

    Raises:
        SourceError, ConfigError: as `find_teacher` and `training_windows`.
    """
    check_context(base, config.context)
    dense = find_teacher(teacher, base, lambda message: progress(Event("fetch", 0.0, message)))
    vocabulary = len(base.tokenizer)
    if config.teacher_top_k > vocabulary:
        raise ConfigError(
            f"teacher_top_k: got {config.teacher_top_k}, the vocabulary has {vocabulary} tokens"
        )
    return dense, training_windows(base.tokenizer, config)


def _facts(
    config: DistillConfig, base: str, teacher: str, at: Progress, kl: tuple[float, float]
) -> dict[str, Any]:
    """The report's section on the distillation: nothing that depends on durations or on a resumption."""
    return {
        "method": "distill",
        "teacher": teacher,
        "base": base,
        "steps": at.step,
        "best_step": at.best_step,
        "kl_before": rounded(kl[0]),
        "kl_after": rounded(kl[1]),
        "config": config.to_dict(),
        "note": "nmse and proxy_error of the matrices are those from before",
    }


def _result(
    output: Path,
    final: Path,
    loop: Loop,
    config: DistillConfig,
    windows: tuple[Tensor, Tensor],
    kl: tuple[float, float],
) -> DistillResult:
    """The result of a finished loop. final: folder it was written to. kl: before and as stored."""
    at = loop.at
    return DistillResult(
        output=str(output),
        bytes_on_disk=ckpt.folder_bytes(final),
        steps=at.step,
        best_step=at.best_step,
        stopped_early=at.stopped_early,
        kl_before=kl[0],
        loss_best=at.best_loss,
        kl_stored=kl[1],
        kl_tokens=config.teacher_top_k,
        trained_parameters=loop.trained(),
        training_windows=len(windows[0]),
        validation_windows=len(windows[1]),
        seconds=round(at.seconds, 3),
    )


def _legend(result: DistillResult, folder: Path, teacher: str, label_weight: float) -> dict[str, str]:
    """Title and axis label of the curve."""
    axis = "loss with labels" if label_weight else "KL"
    which = f" over its {result.kl_tokens} likeliest tokens and the rest" if result.kl_tokens else ""
    figures = f"{result.kl_before:.4g} -> {result.kl_stored:.4g}"
    title = f"{folder.name}: KL to {Path(teacher).name}{which} {figures} nats per token"
    return {"title": title, "loss_name": f"{axis}{which} (nats per token)"}


@in_default_torch_state
def dry_run_distill(
    folder: str | Path,
    config: DistillConfig,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `distill` would do: steps, tokens, trained parameters, bytes; nothing is trained.

    Raises:
        As `distill` before its first step; the output is checked only if it is given.
    """
    folder = folder_of(folder)
    if output is not None:
        check_places(named_output(output), overwrite)
    base = open_base(folder, None if output is None else named_output(output), trust_remote_code)
    name = teacher or str(base.report["model"])
    _, (train, validation) = _inputs(base, config, name)
    trained = planned_parameters(stored_sizes(folder)[0], config)
    if not trained:
        raise ConfigError("nothing to train: every learning rate is 0; raise one")
    return {
        "teacher": name,
        "steps": config.steps,
        "tokens_per_step": config.loop.batch_size * config.context,
        "tokens": config.steps * config.loop.batch_size * config.context,
        "training_windows": len(train),
        "epochs": round(config.steps * config.loop.batch_size / len(train), 2),
        "validation_windows": len(validation),
        "trained_parameters": trained,
        "bytes_on_disk": int(base.report["bytes_on_disk"]),
        "bytes_added_to_weights": 0,
    }
