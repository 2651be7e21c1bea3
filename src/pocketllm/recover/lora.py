"""LoRA on a compressed base: the paper's recovery. The base is frozen, an adapter is trained beside it.

Through PEFT, and saved in its form: `PeftModel.from_pretrained(pocketllm.load(DIR)[0], ADAPTER)` runs it. The
adapter is stored in bfloat16; its bytes come on top of the base and are counted in every size.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

import pocketllm
from pocketllm.config import LoraTuneConfig
from pocketllm.errors import ConfigError
from pocketllm.model import checkpoint as ckpt
from pocketllm.model.compress import Event, ProgressCallback
from pocketllm.model.workspace import Workspace, locked, output_error, system_errors
from pocketllm.recover.adapter import RECORD_NAME, check_adapter_output, need_peft
from pocketllm.recover.divergence import head_divergence, logits_divergence
from pocketllm.recover.instructions import Item, read_items
from pocketllm.recover.log import RunLog
from pocketllm.recover.loop import Group, Loop, told_event
from pocketllm.recover.readout import Readout
from pocketllm.recover.setting import Base, compute_dtype, enable_checkpointing, open_base
from pocketllm.recover.trainable import make_trainable


@dataclass(frozen=True)
class Adapted:
    """What a LoRA run did.

    loss_*: mean negative log likelihood of the validation items' scored tokens, in nats: before, at the best
    step, and as stored. bytes_on_disk: base and adapter together.
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


class Adaptation:
    """The task that the loop trains: an adapter on a base.

    Args:
        model: the transformers model that PEFT has put its layers into. items: (training, validation).
    """

    def __init__(
        self, model: Any, items: tuple[list[Item], list[Item]], config: LoraTuneConfig, dtype: torch.dtype
    ) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        self.train, self.validation = items
        self.items = len(self.train)
        self.readout = Readout.of(model)

    def groups(self) -> list[Group]:
        """The adapter."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [Group("adapter", self.config.learning_rate, trained)]

    def weight(self, numbers: Tensor) -> float:
        """Scored tokens."""
        return float(sum(self.train[n].weight for n in numbers.tolist()))

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Gradient of scale * summed negative log likelihood of these items."""
        loss = self._loss([self.train[n] for n in numbers.tolist()], scale)
        loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean negative log likelihood of the validation items' scored tokens."""
        size = self.config.loop.micro_batch or self.config.loop.batch_size
        parts = [self.validation[n : n + size] for n in range(0, len(self.validation), size)]
        total = sum(float(self._loss(part, 1.0)) for part in parts)
        return total / sum(item.weight for item in self.validation)

    def _loss(self, items: list[Item], scale: float) -> Tensor:
        """Negative log likelihood: the divergence from a teacher who is certain of the next token."""
        device, length = self.model.device, max(len(item.ids) for item in items)
        ids = torch.zeros(len(items), length, dtype=torch.int64, device=device)
        scored = torch.zeros(len(items), length, dtype=torch.bool, device=device)
        for row, item in enumerate(items):  # padding comes last: causal attention keeps it out of everything
            ids[row, : len(item.ids)] = item.ids
            scored[row, item.learned_from - 1 : len(item.ids) - 1] = True
        chosen = scored.reshape(-1).nonzero()[:, 0]
        following = ids.roll(-1, dims=1).reshape(-1)[chosen][:, None]
        certain = torch.zeros(len(chosen), 1, device=device)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if not self.readout.is_plain:
                logits = self.readout.logits(ids)[chosen]
                return logits_divergence(logits, lambda part: (following[part], certain[part]), scale)
            hidden = self.readout.hidden(ids)[chosen]
            weight, bias = self.readout.head()
        weight, hidden = weight.detach(), hidden if torch.is_grad_enabled() else hidden.detach()
        return head_divergence(
            hidden, weight, bias, lambda part: (following[part], certain[part]), self.dtype, scale
        )


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
        FormatError, ConfigError, SourceError, OutputError, ResumeError, TrainingError.

    Example:
        >>> pocketllm.lora("smol-2bit", "smol-adapter", LoraTuneConfig(texts=("alpaca.json",)))
    """
    started = time.monotonic()
    config, folder, output = config or LoraTuneConfig(), Path(folder), Path(output)
    need_peft()
    check_adapter_output(output, overwrite)
    base = open_base(folder, output, trust_remote_code)
    state = PartialState(cpu=device == "cpu")
    dtype = compute_dtype(config.loop.dtype, state.device)
    items = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(items[0]))
    arguments = {
        "method": "lora",
        "version": pocketllm.__version__,
        "base": base.identity,
        "device": state.device.type,
        "dtype": str(dtype),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
        "text": _fingerprint(items),
        **config.to_dict(),
    }
    try:
        with state.main_process_first():
            work = Workspace.at(output, arguments)
        with locked(work.folder, state.is_main_process):
            log = RunLog(output, state.is_main_process)
            model, adapted = with_adapter(base, config, state.device)
            task = Adaptation(model, items, config, dtype)
            loop = Loop(task, config.loop, steps, work, log, state)
            at = loop.run(lambda told: progress(told_event(told)))
            with torch.no_grad():
                for parameter in loop.parameters:
                    parameter.copy_(parameter.bfloat16())
            loss_stored = task.validate()
            facts = {
                "base": str(folder),
                "base_identity": base.identity,
                "base_model": base.report["model"],
                "steps": at.step,
                "best_step": at.best_step,
                "loss_before": float(f"{at.history[0][1]:.6g}"),
                "loss_after": float(f"{loss_stored:.6g}"),
                "config": config.to_dict(),
            }
            if state.is_main_process:
                _save(adapted, loop.parameters, work.folder / "final", facts)
                work.publish(output)
            state.wait_for_everyone()
    except OSError as error:
        raise output_error(output, error) from error
    sizes = int(base.report["bytes_on_disk"]), ckpt.folder_bytes(output)
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
        seconds=time.monotonic() - started,
    )
    title = f"LoRA on {folder.name}: loss {done.loss_before:.4f} -> {loss_stored:.4f} nats per token"
    summary = {
        "title": title,
        "loss_name": "loss (nats per token)",
        "validation": at.history,
        "recover": facts,
    }
    log.finish({**vars(done), **summary})
    progress(Event("train", 1.0, str(output)))
    return done


def dry_run_lora(
    folder: str | Path, config: LoraTuneConfig, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What `lora` would do: steps, tokens, trained parameters, bytes; nothing is trained.

    Raises:
        As `lora` before its first step.
    """
    need_peft()
    base = open_base(Path(folder), None, trust_remote_code)
    train, validation = training_items(base.tokenizer, config)
    steps = number_of_steps(config, len(train))
    model, _ = with_adapter(base, config, "cpu")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base_bytes = int(base.report["bytes_on_disk"])
    return {
        "steps": steps,
        "training_items": len(train),
        "validation_items": len(validation),
        "tokens": round(sum(i.weight for i in train) / len(train) * steps * config.loop.batch_size),
        "trained_parameters": parameters,
        "base_bytes": base_bytes,
        "adapter_bytes": 2 * parameters,
        "bytes_on_disk": base_bytes + 2 * parameters,
    }


def training_items(tokenizer: Any, config: LoraTuneConfig) -> tuple[list[Item], list[Item]]:
    """(training, validation) items: at most a twentieth is kept for validation, but at least one."""
    items = read_items(tokenizer, config.texts, config.context)
    count = min(config.validation_items, max(1, len(items) // 20))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(config.loop.seed)).tolist()
    return [items[n] for n in sorted(order[count:])], [items[n] for n in sorted(order[:count])]


def _fingerprint(items: tuple[list[Item], list[Item]]) -> str:
    """Changes with any token."""
    tokens = torch.cat([item.ids for part in items for item in part])
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def number_of_steps(config: LoraTuneConfig, items: int) -> int:
    """Steps of the run."""
    return config.steps or max(1, math.ceil(config.epochs * items / config.loop.batch_size))


def with_adapter(base: Base, config: LoraTuneConfig, device: Any) -> tuple[Any, Any]:
    """(the transformers model with PEFT's layers in it, the PeftModel around it), everything else frozen.

    Raises:
        ConfigError: no layer has a name in `targets`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = base.load(config.mode, device)
    if config.mode == "packed":
        make_trainable(model)  # linear layers then keep their inputs alone
        model.requires_grad_(False)
    torch.manual_seed(config.loop.seed)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    targets: Any = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.folder),
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"targets {', '.join(config.targets)}: {str(error).splitlines()[0]}") from error
    adapted.peft_config["default"].base_model_name_or_path = str(base.folder)
    adapted.eval()
    if config.dropout:
        for name, module in adapted.named_modules():
            module.training = module.training or "lora_dropout" in name
    if config.loop.gradient_checkpointing:
        enable_checkpointing(model)
    return model, adapted


def _save(adapted: Any, parameters: list[torch.nn.Parameter], final: Path, facts: dict[str, Any]) -> None:
    """PEFT's own files, in bfloat16, and our record of the base beside them."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    shutil.rmtree(final, ignore_errors=True)
    with system_errors(final):
        adapted.save_pretrained(final, save_embedding_layers=False)
    (final / "README.md").unlink(missing_ok=True)
    ckpt.write_json(final / RECORD_NAME, facts)
