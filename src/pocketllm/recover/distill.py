"""Distillation into the compressed form: no index changes, no byte is added.

Codebooks, decoders, row scales, norms, biases and matrices that are stored dense are tuned end to end so that
the compressed model's next-token distribution matches the dense model's: minimize KL(teacher || student),
averaged over positions, on any text. Afterwards everything is rounded as it is stored, and validated in that
form.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from pocketllm.compression.pipeline import Event, ProgressCallback
from pocketllm.config import DistillConfig
from pocketllm.errors import ConfigError, SourceError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.report import rounded
from pocketllm.format.rewrite import rewrite, stored_sizes
from pocketllm.format.workspace import Workspace, check_not_nested
from pocketllm.recover.distillation import Distillation, training_windows
from pocketllm.recover.log import check_places
from pocketllm.recover.loop import Loop, Progress, step_event
from pocketllm.recover.setting import (
    Base,
    check_context,
    check_teacher,
    compute_dtype,
    enable_checkpointing,
    open_base,
    publish,
    started,
)
from pocketllm.recover.teacher import CachedTeacher, LiveTeacher, Teacher, open_teacher
from pocketllm.recover.trainable import make_trainable, set_stored, stored_tensors
from pocketllm.source.dense_checkpoint import open_dense, resolve
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class Distilled:
    """What a distillation did.

    kl_*: mean KL(dense || compressed) in nats per token on the validation windows: before, and in the form that
    is stored. loss_best: lowest validation loss, the same divergence unless labels are part of it. kl_tokens:
    divergences are those over so many of the teacher's likeliest tokens and the
    rest taken together; 0: over all tokens. steps: taken. best_step: whose parameters are kept. seconds: of all steps
    and validations, those before a resumption included.
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
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Distilled:
    """Tune a compressed model towards the dense one it was made from.

    Args:
        folder: the compressed model; only read.
        output: folder to make: the same layout, the same number of payload bytes. A half-done one of the same
            arguments is continued. `OUTPUT.log` takes the record of the run (until then `OUTPUT.partial/log`).
        teacher: the dense model (folder, hub id, builtin:…); None takes the one named in the report.
        teacher_on_disk: read its blocks one after another whenever it is run, instead of holding it in memory.
        progress: called after every step.

    Raises:
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError.

    Example:
        >>> pocketllm.distill("smol-2bit", "smol-2bit-tuned", DistillConfig(texts=("my-texts/",)))
    """
    config, folder, output = config or DistillConfig(), Path(folder), Path(output)
    check_places(output, overwrite)
    base = open_base(folder, output, trust_remote_code)
    name = teacher or str(base.report["model"])
    dense, windows = _inputs(base, config, name, progress)
    check_not_nested(output, dense)
    state = PartialState(cpu=device == "cpu")
    dtype = compute_dtype(config.loop.dtype, state.device)
    arguments = {
        "method": "distill",
        "teacher": name,
        "teacher_weights": open_dense(dense, trust_remote_code).fingerprint(),
        "text": hashlib.sha256(torch.cat(windows).numpy().tobytes()).hexdigest()[:16],
        **config.to_dict(),
    }
    with started(output, arguments, base, dtype, state) as (work, log):
        on_disk = work.folder / "teacher" if teacher_on_disk else None
        live = partial(open_teacher, dense, dtype, state.device, trust_remote_code, on_disk)
        source = _teacher(live, work, windows, config.teacher_top_k, state, progress)
        student = _student(base, config, state.device)
        task = Distillation(student, source, windows, config, dtype)
        loop = Loop(task, config.loop, config.steps, work, log, state)
        # Of the base, before a run that goes on is restored; without labels it is the first validation loss.
        before = task.divergence() if config.label_weight else None
        at = loop.run(lambda done: progress(step_event(done)))
        stored = stored_tensors(student, {key: size[0] for key, size in stored_sizes(folder)[0].items()})
        set_stored(student, stored)
        kl = at.history[0][1] if before is None else before, task.divergence()
        facts = _facts(config, base.identity, name, at, kl)
        if state.is_main_process:
            rewrite(folder, stored, work.folder / "final", facts)
        state.wait_for_everyone()
        done = Distilled(
            output=str(output),
            bytes_on_disk=ckpt.folder_bytes(work.folder / "final"),
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
        legend = _legend(done, folder, name, config.label_weight)
        log.finish({**vars(done), **legend, "recover": facts}, at.history)
        publish(work, log, output, state)
    progress(Event("train", 1.0, str(output)))
    return done


def _inputs(
    base: Base, config: DistillConfig, teacher: str, progress: ProgressCallback = lambda event: None
) -> tuple[Path, tuple[Tensor, Tensor]]:
    """The teacher's folder, and (training, validation) windows; everything is looked at that can be wrong.

    Raises:
        SourceError, ConfigError: see `check_teacher` and `training_windows`; the teacher is not there.
    """
    check_context(base, config.context)
    try:
        dense = resolve(teacher, lambda message: progress(Event("fetch", 0.0, message)))
    except SourceError as error:
        raise SourceError(f"the teacher of {base.folder}: {error}; name it with --teacher") from error
    check_teacher(dense, base)
    vocabulary = len(base.tokenizer)
    if config.teacher_top_k > vocabulary:
        raise ConfigError(
            f"teacher_top_k: got {config.teacher_top_k}, the vocabulary has {vocabulary} tokens"
        )
    return dense, training_windows(base.tokenizer, config)


def _student(base: Base, config: DistillConfig, device: Any) -> Any:
    """The model in its trainable form."""
    student = base.load("packed", device)
    make_trainable(student, dense=config.lr_dense > 0)
    if config.loop.gradient_checkpointing:
        enable_checkpointing(student)
    return student


def _legend(done: Distilled, folder: Path, teacher: str, label_weight: float) -> dict[str, str]:
    """Title and axis of the curve."""
    axis = "loss with labels" if label_weight else "KL"
    which = f" over its {done.kl_tokens} likeliest tokens and the rest" if done.kl_tokens else ""
    figures = f"{done.kl_before:.4g} -> {done.kl_stored:.4g}"
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
        As `distill` before its first step; what concerns the output only if it is named.
    """
    folder = Path(folder)
    if output is not None:
        check_places(Path(output), overwrite)
    base = open_base(folder, None if output is None else Path(output), trust_remote_code)
    name = teacher or str(base.report["model"])
    _, (train, validation) = _inputs(base, config, name)
    trained = _trained(folder, config)
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


def _trained(folder: Path, config: DistillConfig) -> dict[str, int]:
    """Trained parameters by group."""
    rates = {
        "codebooks": config.lr_codebook,
        "decoders": config.lr_decoder,
        "row scales": config.lr_scale,
        "norms and biases": config.lr_norm,
        "dense matrices": config.lr_dense,
    }
    counts: dict[str, int] = {}
    for key, (_, shape) in stored_sizes(folder)[0].items():
        kind = _kind(key, shape)
        if kind is not None and rates[kind] > 0:
            counts[kind] = counts.get(kind, 0) + math.prod(shape)
    return counts


def _kind(key: str, shape: tuple[int, ...]) -> str | None:
    """The group that a stored tensor is trained in, as `Distillation.groups` calls it; None for indices."""
    for part in ("codebooks", "decoders"):
        if key.startswith(f"{ckpt.STORE}.{part}."):
            return part
    if key.endswith(".indices"):
        return None
    if key.endswith(".row_scale"):
        return "row scales"
    return "norms and biases" if len(shape) < 2 else "dense matrices"


def _teacher(
    live: Callable[[], Any],
    work: Workspace,
    windows: tuple[Tensor, Tensor],
    top_k: int,
    state: PartialState,
    progress: ProgressCallback,
) -> Teacher:
    """The dense model on every batch, or its k most likely tokens computed once. live: loads it."""
    if not top_k:
        return LiveTeacher(live())
    if state.is_main_process and not CachedTeacher.is_made(work.folder):
        CachedTeacher.make(
            work.folder,
            LiveTeacher(live()),
            torch.cat(windows),
            top_k,
            lambda share: progress(Event("teacher", share, f"{top_k} most likely tokens")),
        )
    state.wait_for_everyone()
    return CachedTeacher(work.folder)


def _facts(
    config: DistillConfig, base: str, teacher: str, at: Progress, kl: tuple[float, float]
) -> dict[str, Any]:
    """What the report says of it: nothing that depends on how long it took, or on a resumption."""
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
