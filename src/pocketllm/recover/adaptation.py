"""What LoRA trains: an adapter, put into a compressed base by PEFT, item by item."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from pocketllm.config import LoraTuneConfig
from pocketllm.errors import ConfigError
from pocketllm.recover.divergence import head_divergence, logits_divergence
from pocketllm.recover.items import Item, read_items
from pocketllm.recover.loop import Group
from pocketllm.recover.readout import Readout
from pocketllm.recover.setting import Base, enable_checkpointing
from pocketllm.recover.trainable import make_trainable


def training_items(tokenizer: Any, config: LoraTuneConfig) -> tuple[list[Item], list[Item]]:
    """(training, validation) items: at most a twentieth is kept for validation, but at least one."""
    items = read_items(tokenizer, config.texts, config.context)
    count = min(config.validation_items, max(1, len(items) // 20))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(config.loop.seed)).tolist()
    return [items[n] for n in sorted(order[count:])], [items[n] for n in sorted(order[:count])]


def items_digest(items: tuple[list[Item], list[Item]]) -> str:
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
