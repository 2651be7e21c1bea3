"""What every recovery method starts from: a compressed base that is whole, a dtype, a matching vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import pocketllm
from pocketllm.calibrate.autocast import fast_dtype
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import check_not_nested, output_error
from pocketllm.format.workspace import Workspace, locked
from pocketllm.recover.log import Done, RunLog, finished
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import need_tokenizer, read_config, read_vocabulary
from pocketllm.text.vocabulary import check_positions, check_vocabularies


@dataclass(frozen=True)
class Base:
    """A compressed model to start from.

    identity: as the function of that name. tokenizer: its own.
    """

    folder: Path
    report: dict[str, Any]
    tokenizer: Any
    identity: str
    trust_remote_code: bool = False

    def load(self, mode: str, device: Any) -> Any:
        """The model in float32, verified."""
        model, _ = pocketllm.load(
            self.folder, mode=mode, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        )
        return model.to(device)


def open_base(folder: Path, output: Path | None, trust_remote_code: bool = False) -> Base:
    """Look at the base without loading its weights.

    Raises:
        FormatError: not a compressed model, or damaged. OutputError: the output is the base itself, or in it.
        SourceError: no tokenizer, or it cannot be read.
    """
    if output is not None:
        check_not_nested(output, folder)
    report = ckpt.read_report(folder)
    ckpt.verify(folder)
    tokenizer = need_tokenizer(folder, trust_remote_code)
    return Base(folder, report, tokenizer, identity(report), trust_remote_code)


def identity(report: Mapping[str, Any]) -> str:
    """Of a compressed model, by its report: changes with any bit of it."""
    return hashlib.sha256(repr(sorted(report["files"].items())).encode()).hexdigest()[:16]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where the machine computes in it at full speed."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return fast_dtype(device)


def check_context(base: Base, context: int) -> None:
    """The model has as many positions as a window has tokens.

    Raises:
        ConfigError: it has fewer.
    """
    check_positions(read_config(base.folder, base.trust_remote_code), context, str(base.folder))


def check_teacher(teacher: Path, base: Base) -> None:
    """The teacher is a dense model that speaks of the same tokens.

    Raises:
        ConfigError: it is compressed itself, or has another vocabulary; names both. SourceError: no model.
    """
    ckpt.check_dense(teacher, f"the teacher {teacher}", "with --teacher")
    trust = base.trust_remote_code
    open_dense(teacher, trust)  # its errors are clearer, and it refuses pickles
    check_vocabularies(
        read_vocabulary(base.folder, str(base.folder), trust),
        read_vocabulary(teacher, f"the teacher {teacher}", trust),
    )


@contextmanager
def started(
    output: Path, arguments: Mapping[str, Any], base: Base, dtype: torch.dtype, state: PartialState
) -> Iterator[tuple[Workspace, RunLog]]:
    """The folder of a run, which nobody else uses meanwhile, and the record of the run.

    Args:
        arguments: what its result depends on, beside the other ones given here.

    Raises:
        ResumeError: the folder holds a run with other arguments. OutputError: it is in use, or cannot be
            written.
    """
    everything = {
        "version": pocketllm.__version__,
        "base": base.identity,
        "device": state.device.type,
        "dtype": str(dtype),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        **arguments,
    }
    try:
        with state.main_process_first():
            work = Workspace.at(output, everything)
        with locked(work.folder, state.is_main_process):
            yield work, RunLog(work.folder / "log", state.is_main_process, everything, state.device.type)
    except OSError as error:
        raise output_error(output, error) from error


def publish(work: Workspace, log: RunLog, output: Path, state: PartialState) -> None:
    """The finished run's record and then its result go to their places; every process waits for that."""
    if state.is_main_process:
        log.publish(output)
        work.publish(output)
    state.wait_for_everyone()


def already_done(work: Workspace, output: Path, state: PartialState, kind: type[Done]) -> Done:
    """What an earlier run did that was killed after its result came into place; its folder goes."""
    done = finished(output, kind)
    state.wait_for_everyone()
    if state.is_main_process:
        work.drop()
    return done


def enable_checkpointing(model: Any) -> None:
    """Compute activations again on the way back; layers stay in evaluation mode (no dropout)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # of the wrapper alone, not of what it contains
