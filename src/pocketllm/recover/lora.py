"""LoRA on a compressed base, the paper's recovery: the base is frozen, an adapter is trained on top of it.

PEFT makes the adapter and saves it in its format: `PeftModel.from_pretrained(pocketllm.load(DIR)[0], ADAPTER)` runs
it. The adapter is stored in bfloat16; its bytes come on top of the base and are counted in every size.
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
from torch import Tensor

from pocketllm.compression.progress import Event, ProgressCallback
from pocketllm.config import LoraTuneConfig
from pocketllm.errors import ConfigError
from pocketllm.files import write_json
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.kept import system_errors
from pocketllm.format.output import is_published, named_output
from pocketllm.format.report import rounded
from pocketllm.format.weight_files import safetensors_bytes
from pocketllm.recover.adapter import RECORD_NAME, SETTINGS_NAME, need_peft
from pocketllm.recover.adapter_init import start_from_error
from pocketllm.recover.base_model import Base, check_context, find_teacher, open_base
from pocketllm.recover.loop import CHECKPOINT, Loop, step_event
from pocketllm.recover.lora_task import Item, LoraTask, number_of_steps, training_items, with_adapter
from pocketllm.recover.run_log import check_places, open_run
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense
from pocketllm.source.folder import copy_file_mode
from pocketllm.source.hub import folder_of
from pocketllm.text.windows import token_digest
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class LoraResult:
    """Result of a LoRA run.

    loss_*: mean negative log likelihood of the validation items' scored tokens, in nats: of the base alone, at the
    best step, and as stored. bytes_on_disk: base and adapter together. steps: taken. best_step: the step whose
    parameters are kept. seconds: duration of all steps and validations, including those before a resumption.
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
    teacher: str | None = None,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> LoraResult:
    """Train an adapter on a compressed model.

    Args:
        folder: the compressed model (folder or Hub id), which is not modified.
        output: folder to create, in PEFT's format. An unfinished run with the same arguments is resumed.
        teacher: the dense model (folder, Hub id, builtin:…), whose weights an adapter that starts from the
            compression error approximates; None takes the one named in the report.
        progress: called after every step.

    Raises:
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError; ExtraError: no PEFT.

    Example:
        >>> pocketllm.lora("smol-2bit", "smol-adapter", LoraTuneConfig(texts=("alpaca.json",)))
    """
    config, folder, output = config or LoraTuneConfig(), folder_of(folder), named_output(output)
    need_peft()
    check_places(output, overwrite, marker=RECORD_NAME, what="an adapter")
    base = open_base(folder, output, trust_remote_code)
    check_context(base, config.context)
    dense = _dense(base, config, teacher)
    items = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(items[0]))
    tokens = torch.cat([item.ids for part in items for item in part])
    weights = {} if dense is None else {"teacher_weights": dense.fingerprint()}
    arguments = {"method": "lora", "text": token_digest(tokens), **weights, **config.to_dict()}
    with open_run(output, base, arguments, config.loop, device, overwrite) as run:
        if is_published(output):  # by an earlier run that was killed afterwards
            return run.recall(LoraResult)
        model, adapted = with_adapter(base, config, run.state.device)
        task = LoraTask(model, items, config, run.dtype)
        # Of the base alone, before an adapter starts from the error or a resumed run is restored.
        before = None if dense is None else task.validate()
        if dense is not None and not run.work.has(CHECKPOINT):
            progress(Event("start", 0.0, f"from the error of {len(dense.parts)} tensors"))
            sequences = [item.ids for item in items[0]]
            start_from_error(model, dense, sequences, weighted=config.init == "output_error")
        loop = Loop(task, config.loop, steps, work=run.work, log=run.log, state=run.state)
        at = loop.run(lambda done: progress(step_event(done)))
        before = at.history[0][1] if before is None else before
        with torch.no_grad():
            for parameter in loop.parameters:
                parameter.copy_(parameter.bfloat16())
        loss_stored = task.validate()
        facts = _record(base, config, at.step, at.best_step, before=before, after=loss_stored)
        final = run.write(lambda place: _save(adapted, loop.parameters, place, facts))
        result = _result(base, output, final, loop, items, (before, loss_stored))
        run.finish({**vars(result), **_legend(result, folder), "recover": facts}, at.history)
    progress(Event("train", 1.0, str(output)))
    return result


def _dense(base: Base, config: LoraTuneConfig, teacher: str | None) -> DenseCheckpoint | None:
    """The dense model, if the adapter starts from the compression error.

    Raises:
        ConfigError: a teacher without use. Others as `find_teacher`.
    """
    if config.init == "zero":
        if teacher is not None:
            raise ConfigError(
                "--teacher does not apply to --method lora; remove it, or add --set init=output_error"
            )
        return None
    return open_dense(find_teacher(teacher or str(base.report["model"]), base), base.trust_remote_code)


def _result(
    base: Base,
    output: Path,
    final: Path,
    loop: Loop,
    items: tuple[list[Item], list[Item]],
    losses: tuple[float, float],
) -> LoraResult:
    """The result of a finished loop. final: folder it was written to. losses: of the base, and as stored."""
    at, base_bytes, adapter_bytes = loop.at, int(base.report["bytes_on_disk"]), ckpt.folder_bytes(final)
    return LoraResult(
        output=str(output),
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        bytes_on_disk=base_bytes + adapter_bytes,
        steps=at.step,
        best_step=at.best_step,
        stopped_early=at.stopped_early,
        loss_before=losses[0],
        loss_best=at.best_loss,
        loss_stored=losses[1],
        trained_parameters=sum(p.numel() for p in loop.parameters),
        training_items=len(items[0]),
        validation_items=len(items[1]),
        seconds=round(at.seconds, 3),
    )


def _legend(result: LoraResult, folder: Path) -> dict[str, str]:
    """Title and axis label of the curve."""
    figures = f"{result.loss_before:.4g} -> {result.loss_stored:.4g}"
    return {
        "title": f"LoRA on {folder.name}: loss {figures} nats per token",
        "loss_name": "loss (nats per token)",
    }


@in_default_torch_state
def dry_run_lora(
    folder: str | Path,
    config: LoraTuneConfig,
    teacher: str | None = None,
    trust_remote_code: bool = False,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `lora` would do: steps, tokens, trained parameters, bytes; nothing is trained.

    adapter_bytes: size on disk, exact except for the digits of the losses in the record.

    Raises:
        As `lora` before its first step; the output is checked only if it is given.
    """
    need_peft()
    if output is not None:
        check_places(named_output(output), overwrite, marker=RECORD_NAME, what="an adapter")
    base = open_base(folder_of(folder), None if output is None else named_output(output), trust_remote_code)
    check_context(base, config.context)
    _dense(base, config, teacher)
    train, validation = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(train))
    model, adapted = with_adapter(base, config, "cpu")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter_bytes = _planned_bytes(
        adapted, _record(base, config, steps, steps, before=math.pi, after=math.pi)
    )
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
    """The record stored with the adapter: its base, and how it was trained. before, after: losses."""
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
    """Bytes of the adapter's folder: the small files are written to a temporary folder, weights are counted."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    sizes = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    with tempfile.TemporaryDirectory() as place:
        _save(adapted, [], Path(place) / "final", facts, state={})
        small = sum(path.stat().st_size for path in (Path(place) / "final").glob("*.json"))
    return small + sum(safetensors_bytes(sizes).values())


def _save(
    adapted: Any,
    parameters: list[torch.nn.Parameter],
    final: Path,
    facts: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write PEFT's files in bfloat16, and the record of the base. state: tensors to store, None the model's."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    shutil.rmtree(final, ignore_errors=True)
    with system_errors(final):
        adapted.save_pretrained(final, save_embedding_layers=False, state_dict=state)
    copy_file_mode(final, SETTINGS_NAME)
    (final / "README.md").unlink(missing_ok=True)
    settings = json.loads((final / SETTINGS_NAME).read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):  # their order changes from run to run
        settings["target_modules"].sort()
    write_json(final / SETTINGS_NAME, settings)
    write_json(final / RECORD_NAME, facts)
