"""LoRA on a compressed base: the paper's recovery. The base is frozen, an adapter is trained beside it.

Through PEFT, and saved in its form: `PeftModel.from_pretrained(pocketllm.load(DIR)[0], ADAPTER)` runs it. The
adapter is stored in bfloat16; its bytes come on top of the base and are counted in every size.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from pocketllm.compression.pipeline import Event, ProgressCallback
from pocketllm.config import LoraTuneConfig
from pocketllm.files import write_json
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.report import rounded
from pocketllm.format.workspace import system_errors
from pocketllm.recover.adaptation import (
    Adaptation,
    items_digest,
    number_of_steps,
    training_items,
    with_adapter,
)
from pocketllm.recover.adapter import RECORD_NAME, SETTINGS_NAME, need_peft
from pocketllm.recover.log import check_places
from pocketllm.recover.loop import Loop, step_event
from pocketllm.recover.setting import Base, check_context, compute_dtype, open_base, publish, started
from pocketllm.source.folder import copy_file_mode
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class Adapted:
    """What a LoRA run did.

    loss_*: mean negative log likelihood of the validation items' scored tokens, in nats: before, at the best
    step, and as stored. bytes_on_disk: base and adapter together. seconds: of all steps and validations,
    those before a resumption included.
    """

    output: str
    base_bytes: int
    adapter_bytes: int
    bytes_on_disk: int
    steps: int
    best_step: int
    stopped_early: bool
    loss_before: float
    loss_best: float
    loss_stored: float
    trained_parameters: int
    training_items: int
    validation_items: int
    seconds: float


@in_default_torch_state
def lora(
    folder: str | Path,
    output: str | Path,
    config: LoraTuneConfig | None = None,
    *,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Adapted:
    """Train an adapter on a compressed model.

    Args:
        folder: the compressed model; only read.
        output: folder to make, in PEFT's form. A half-done one of the same arguments is continued.
        progress: called after every step.

    Raises:
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError; ExtraError: no PEFT.

    Example:
        >>> pocketllm.lora("smol-2bit", "smol-adapter", LoraTuneConfig(texts=("alpaca.json",)))
    """
    config, folder, output = config or LoraTuneConfig(), Path(folder), Path(output)
    need_peft()
    check_places(output, overwrite, RECORD_NAME, "an adapter")
    base = open_base(folder, output, trust_remote_code)
    check_context(base, config.context)
    items = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(items[0]))
    state = PartialState(cpu=device == "cpu")
    dtype = compute_dtype(config.loop.dtype, state.device)
    arguments = {"method": "lora", "text": items_digest(items), **config.to_dict()}
    with started(output, arguments, base, dtype, state) as (work, log):
        model, adapted = with_adapter(base, config, state.device)
        task = Adaptation(model, items, config, dtype)
        loop = Loop(task, config.loop, steps, work, log, state)
        at = loop.run(lambda done: progress(step_event(done)))
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter.copy_(parameter.bfloat16())
        loss_stored = task.validate()
        facts = _record(base, config, at.step, at.best_step, at.history[0][1], loss_stored)
        if state.is_main_process:
            _save(adapted, loop.parameters, work.folder / "final", facts)
        state.wait_for_everyone()
        sizes = int(base.report["bytes_on_disk"]), ckpt.folder_bytes(work.folder / "final")
        done = Adapted(
            output=str(output),
            base_bytes=sizes[0],
            adapter_bytes=sizes[1],
            bytes_on_disk=sum(sizes),
            steps=at.step,
            best_step=at.best_step,
            stopped_early=at.stopped_early,
            loss_before=at.history[0][1],
            loss_best=at.best_loss,
            loss_stored=loss_stored,
            trained_parameters=sum(p.numel() for p in loop.parameters),
            training_items=len(items[0]),
            validation_items=len(items[1]),
            seconds=round(at.seconds, 3),
        )
        figures = f"{done.loss_before:.4g} -> {loss_stored:.4g}"
        legend = {
            "title": f"LoRA on {folder.name}: loss {figures} nats per token",
            "loss_name": "loss (nats per token)",
        }
        log.finish({**vars(done), **legend, "recover": facts}, at.history)
        publish(work, log, output, state)
    progress(Event("train", 1.0, str(output)))
    return done


@in_default_torch_state
def dry_run_lora(
    folder: str | Path,
    config: LoraTuneConfig,
    trust_remote_code: bool = False,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `lora` would do: steps, tokens, trained parameters, bytes; nothing is trained.

    adapter_bytes: as they will lie on disk, but for the digits of the losses in the record.

    Raises:
        As `lora` before its first step; what concerns the output only if it is named.
    """
    need_peft()
    if output is not None:
        check_places(Path(output), overwrite, RECORD_NAME, "an adapter")
    base = open_base(Path(folder), None if output is None else Path(output), trust_remote_code)
    check_context(base, config.context)
    train, validation = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(train))
    model, adapted = with_adapter(base, config, "cpu")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter_bytes = _planned_bytes(adapted, _record(base, config, steps, steps, math.pi, math.pi))
    base_bytes = int(base.report["bytes_on_disk"])
    return {
        "steps": steps,
        "training_items": len(train),
        "validation_items": len(validation),
        "tokens": round(sum(i.weight for i in train) / len(train) * steps * config.loop.batch_size),
        "trained_parameters": parameters,
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "bytes_on_disk": base_bytes + adapter_bytes,
    }


def _record(
    base: Base, config: LoraTuneConfig, steps: int, best_step: int, before: float, after: float
) -> dict[str, Any]:
    """What lies beside the adapter: its base, and how it was trained. before, after: losses."""
    return {
        "base": str(base.folder),
        "base_identity": base.identity,
        "base_model": base.report["model"],
        "steps": steps,
        "best_step": best_step,
        "loss_before": rounded(before),
        "loss_after": rounded(after),
        "config": config.to_dict(),
    }


def _planned_bytes(adapted: Any, facts: dict[str, Any]) -> int:
    """Bytes of the adapter's folder: the small files are written for a moment, weights are counted."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    sizes = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    with tempfile.TemporaryDirectory() as place:
        _save(adapted, [], Path(place) / "final", facts, state={})
        small = sum(path.stat().st_size for path in (Path(place) / "final").glob("*.json"))
    return small + sum(ckpt.safetensors_bytes(sizes).values())


def _save(
    adapted: Any,
    parameters: list[torch.nn.Parameter],
    final: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """PEFT's own files, in bfloat16, and our record of the base beside them. state: instead of the model's."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    shutil.rmtree(final, ignore_errors=True)
    with system_errors(final):
        adapted.save_pretrained(final, save_embedding_layers=False, state_dict=state)
    copy_file_mode(final, SETTINGS_NAME)
    (final / "README.md").unlink(missing_ok=True)
    settings = json.loads((final / SETTINGS_NAME).read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):  # in an order that changes from run to run
        settings["target_modules"].sort()
    write_json(final / SETTINGS_NAME, settings)
    write_json(final / RECORD_NAME, facts)
