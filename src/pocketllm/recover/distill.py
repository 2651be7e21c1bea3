"""Distillation into the compressed form: no index changes, no byte is added.

Codebooks, decoders, row scales, norms and biases are tuned end to end so that the compressed model's
next-token distribution matches the dense model's: minimize KL(teacher || student), averaged over positions,
on any text. Afterwards everything is rounded as it is stored, and validated in that form.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

import pocketllm
from pocketllm.config import DistillConfig
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.compress import Event, ProgressCallback
from pocketllm.model.rewrite import rewrite, stored_sizes
from pocketllm.model.source import resolve
from pocketllm.model.workspace import Workspace, check_output, locked, output_error
from pocketllm.recover.divergence import Target, head_divergence, logits_divergence
from pocketllm.recover.log import RunLog
from pocketllm.recover.loop import Group, Loop, Progress, told_event
from pocketllm.recover.readout import Readout
from pocketllm.recover.setting import check_vocabulary, compute_dtype, enable_checkpointing, open_base
from pocketllm.recover.teacher import CachedTeacher, LiveTeacher, Teacher, open_teacher
from pocketllm.recover.text import split, windows_of
from pocketllm.recover.trainable import TrainableMatrix, make_trainable, set_stored, stored_tensors


@dataclass(frozen=True)
class Distilled:
    """What a distillation did.

    kl_*: mean KL(dense || compressed) in nats per token on the validation windows: before, at the best step,
    and in the form that is stored. steps: taken. best_step: whose parameters are kept.
    """

    output: str
    bytes_on_disk: int
    steps: int
    best_step: int
    stopped_early: bool
    kl_before: float
    kl_best: float
    kl_stored: float
    trained_parameters: dict[str, int]
    training_windows: int
    validation_windows: int
    seconds: float


class Distillation:
    """The task that the loop trains: a compressed model beside its teacher.

    Args:
        student: in its trainable form. windows: [training, context] and [validation, context] token ids.
    """

    def __init__(
        self,
        student: Any,
        teacher: Teacher,
        windows: tuple[Tensor, Tensor],
        config: DistillConfig,
        dtype: torch.dtype,
    ) -> None:
        self.student, self.teacher, self.config, self.dtype = student, teacher, config, dtype
        self.train, self.validation = windows
        self.items = len(self.train)
        self.readout = Readout.of(student)
        self._targets: dict[int, Target] = {}

    def groups(self) -> list[Group]:
        """Codebooks, decoders, row scales, and vectors (norms, biases)."""
        store, config = getattr(self.student, ckpt.STORE), self.config
        gains = [m.gain for m in self.student.modules() if isinstance(m, TrainableMatrix)]
        coded = {id(p) for p in [*store.parameters(), *gains]}
        vectors = [p for p in self.student.parameters() if p.requires_grad and id(p) not in coded]
        codebooks = [c for c in store.codebooks if c.requires_grad]
        return [
            *(Group("codebooks", config.lr_codebook * _rms(c), [c]) for c in codebooks),
            Group("decoders", config.lr_decoder, [*store.ups, *store.downs]),
            Group("row scales", config.lr_scale, [gain for gain in gains if gain.requires_grad]),
            Group("norms and biases", config.lr_norm, vectors),
        ]

    def weight(self, numbers: Tensor) -> float:
        """Positions."""
        return float(len(numbers) * self.train.shape[1])

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Gradient of scale * summed divergence of these training windows."""
        ids = self.train[numbers].to(self.student.device)
        loss = self._divergence(ids, self.teacher.target(numbers, ids), scale)
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean divergence per position on the validation windows."""
        total, size = 0.0, self.config.loop.micro_batch or self.config.loop.batch_size
        for begin in range(0, len(self.validation), size):
            ids = self.validation[begin : begin + size].to(self.student.device)
            numbers = torch.arange(begin, begin + len(ids)) + len(self.train)
            target = self._targets.get(begin) or self.teacher.target(numbers, ids)
            if self.readout.is_plain:  # such targets hold hidden states at most
                self._targets[begin] = target
            total += float(self._divergence(ids, target, 1.0))
        return total / self.validation.numel()

    def _divergence(self, ids: Tensor, target: Target, scale: float) -> Tensor:
        getattr(self.student, ckpt.STORE).refresh()
        kind = ids.device.type
        with torch.autocast(kind, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if not self.readout.is_plain:
                return logits_divergence(self.readout.logits(ids), target, scale)
            hidden = self.readout.hidden(ids)
            weight, bias = self.readout.head()
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        return head_divergence(hidden, weight, bias, target, self.dtype, scale)


def _rms(codebook: Tensor) -> float:
    """Typical size of a codebook's numbers: about 1 where rows have scales."""
    return float(codebook.detach().square().mean().sqrt())


def distill(
    folder: str | Path,
    output: str | Path,
    config: DistillConfig | None = None,
    *,
    teacher: str | None = None,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Distilled:
    """Tune a compressed model towards the dense one it was made from.

    Args:
        folder: the compressed model; only read.
        output: folder to make: the same layout, the same number of payload bytes. A half-done one of the same
            arguments is continued. `OUTPUT.log` takes the record of the run.
        teacher: the dense model (folder, hub id, builtin:…); None takes the one named in the report.
        progress: called after every step.

    Raises:
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError.

    Example:
        >>> pocketllm.distill("smol-2bit", "smol-2bit-tuned", DistillConfig(texts=("my-texts/",)))
    """
    started = time.monotonic()
    config, folder, output = config or DistillConfig(), Path(folder), Path(output)
    check_output(output, overwrite)
    base = open_base(folder, output, trust_remote_code)
    state = PartialState(cpu=device == "cpu")
    name = teacher or str(base.report["model"])
    dense = resolve(name, lambda message: progress(Event("fetch", 0.0, message)))
    check_vocabulary(dense, base)
    dtype = compute_dtype(config.loop.dtype, state.device)
    windows = training_windows(base.tokenizer, config)
    arguments = {
        "method": "distill",
        "version": pocketllm.__version__,
        "base": base.identity,
        "teacher": name,
        "device": state.device.type,
        "dtype": str(dtype),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        "text": hashlib.sha256(torch.cat(windows).numpy().tobytes()).hexdigest()[:16],
        **config.to_dict(),
    }
    try:
        with state.main_process_first():
            work = Workspace.at(output, arguments)
        with locked(work.folder, state.is_main_process):
            log = RunLog(output, state.is_main_process)
            source = _teacher(dense, work, windows, config, dtype, state, progress, trust_remote_code)
            student = base.load("packed", state.device)
            make_trainable(student)
            if config.loop.gradient_checkpointing:
                enable_checkpointing(student)
            task = Distillation(student, source, windows, config, dtype)
            loop = Loop(task, config.loop, config.steps, work, log, state)
            at = loop.run(lambda told: progress(told_event(told)))
            stored = stored_tensors(student, {key: size[0] for key, size in stored_sizes(folder)[0].items()})
            set_stored(student, stored)
            kl_stored = task.validate()
            facts = _facts(config, base.identity, name, at, kl_stored)
            if state.is_main_process:
                rewrite(folder, stored, work.folder / "final", facts)
                work.publish(output)
            state.wait_for_everyone()
    except OSError as error:
        raise output_error(output, error) from error
    done = Distilled(
        output=str(output),
        bytes_on_disk=ckpt.folder_bytes(output),
        steps=at.step,
        best_step=at.best_step,
        stopped_early=at.stopped_early,
        kl_before=at.history[0][1],
        kl_best=at.best_loss,
        kl_stored=kl_stored,
        trained_parameters=loop.trained(),
        training_windows=len(windows[0]),
        validation_windows=len(windows[1]),
        seconds=time.monotonic() - started,
    )
    title = f"{folder.name}: KL to {Path(name).name} {done.kl_before:.4f} -> {kl_stored:.4f} nats per token"
    summary = {"title": title, "loss_name": "KL (nats per token)", "validation": at.history, "recover": facts}
    log.finish({**vars(done), **summary})
    progress(Event("train", 1.0, str(output)))
    return done


def dry_run_distill(
    folder: str | Path,
    config: DistillConfig,
    teacher: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What `distill` would do: steps, tokens, trained parameters, bytes; nothing is trained.

    Raises:
        As `distill` before its first step.
    """
    folder = Path(folder)
    base = open_base(folder, None, trust_remote_code)
    name = teacher or str(base.report["model"])
    check_vocabulary(resolve(name), base)
    train, validation = training_windows(base.tokenizer, config)
    sizes, _ = stored_sizes(folder)
    parts = {
        "codebooks": [f"{ckpt.STORE}.codebooks."],
        "decoders": [f"{ckpt.STORE}.decoders."],
        "row scales": [],
        "norms and biases": [],
    }
    trained = dict.fromkeys(parts, 0)
    for key, (_, shape) in sizes.items():
        kind = next((k for k, prefixes in parts.items() if any(key.startswith(p) for p in prefixes)), None)
        kind = kind or ("row scales" if key.endswith(".row_scale") else "norms and biases")
        if kind != "norms and biases" or (len(shape) < 2 and not key.endswith(".indices")):
            trained[kind] += torch.Size(shape).numel()
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


def training_windows(tokenizer: Any, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """(training, validation) windows of the texts.

    Raises:
        SourceError, ConfigError: as `windows_of` and `split`.
    """
    windows = windows_of(tokenizer, config.texts, config.context)
    if config.validation_text is None:
        return split(windows, config.validation_windows, config.loop.seed)
    return windows, windows_of(tokenizer, (config.validation_text,), config.context)[
        : config.validation_windows
    ]


def _teacher(
    dense: Path,
    work: Workspace,
    windows: tuple[Tensor, Tensor],
    config: DistillConfig,
    dtype: torch.dtype,
    state: PartialState,
    progress: ProgressCallback,
    trust_remote_code: bool,
) -> Teacher:
    """The dense model on every batch, or its k most likely tokens computed once."""
    if not config.teacher_top_k:
        return LiveTeacher(open_teacher(dense, dtype, state.device, trust_remote_code))
    if state.is_main_process and not CachedTeacher.is_made(work.folder):
        live = LiveTeacher(open_teacher(dense, dtype, state.device, trust_remote_code))
        CachedTeacher.make(
            work.folder,
            live,
            torch.cat(windows),
            config.teacher_top_k,
            lambda share: progress(Event("teacher", share, f"{config.teacher_top_k} most likely tokens")),
        )
    state.wait_for_everyone()
    return CachedTeacher(work.folder)


def _facts(config: DistillConfig, base: str, teacher: str, at: Progress, kl_stored: float) -> dict[str, Any]:
    """What the report says of it: nothing that depends on how long it took, or on a resumption."""
    return {
        "method": "distill",
        "teacher": teacher,
        "base": base,
        "steps": at.step,
        "best_step": at.best_step,
        "kl_before": float(f"{at.history[0][1]:.6g}"),
        "kl_after": float(f"{kl_stored:.6g}"),
        "config": config.to_dict(),
        "note": "nmse and proxy_error of the matrices are those from before",
    }
