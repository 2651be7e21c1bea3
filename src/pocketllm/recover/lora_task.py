"""The LoRA task: an adapter that PEFT puts into a compressed base, and its loss on instructions or plain text.

Of an instruction only the answer is learned; of plain text every window, all tokens but its first.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketllm.config import LoraTuneConfig
from pocketllm.errors import ConfigError
from pocketllm.recover.base_model import Base, enable_checkpointing
from pocketllm.recover.lm_head import LmHead
from pocketllm.recover.loop import Group
from pocketllm.recover.trainable import make_trainable
from pocketllm.text.instructions import read_instructions, read_training
from pocketllm.text.read import named_default, text_paths
from pocketllm.text.windows import all_windows, split_numbers, tokenize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One training sequence: token ids [T] int64; tokens from position `learned_from` on are learned."""

    ids: Tensor
    learned_from: int

    @property
    def weight(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.learned_from


def training_items(tokenizer: Any, config: LoraTuneConfig) -> tuple[list[Item], list[Item]]:
    """(training, validation) items: at most a twentieth is kept for validation, at least one.

    Raises:
        SourceError, ConfigError: as `read_items`.
    """
    items = read_items(tokenizer, config.texts, config.context)
    numbers = split_numbers(len(items), config.validation_items, one_in=20, seed=config.loop.seed)
    train, validation = ([items[n] for n in part.tolist()] for part in numbers)
    return train, validation


def read_items(tokenizer: Any, texts: tuple[str, ...], context: int) -> list[Item]:
    """Training items of all texts, at most `context` tokens each.

    Instructions whose prompt leaves no room for an answer are left out, with a warning.

    Args:
        texts: files or folders; none takes the text that ships with Python.

    Raises:
        SourceError: a text cannot be read.
        ConfigError: fewer than two items.
    """
    answered: list[Item] = []
    plain: dict[str, list[str]] = {}
    for text in texts:
        for path in text_paths(text):
            pairs = read_instructions(path)
            if pairs is None:
                plain.setdefault(text, []).append(read_training(path))
            else:
                answered += [_item(tokenizer, prompt, answer, context) for prompt, answer in pairs]
    items = [item for item in answered if item.weight > 0]
    lost = ""
    if len(items) < len(answered):
        lost = (
            f"{len(answered) - len(items)} of {len(answered)} instructions leave no room for their answer "
            f"in a context of {context} tokens; raise --context"
        )
    named = {name: "\n\n".join(parts) for name, parts in plain.items()} if texts else dict([named_default()])
    if named:
        items += [Item(window, learned_from=1) for window in all_windows(tokenizer, named, context)]
    if len(items) < 2:
        raise ConfigError(
            f"the text contains {len(items)} items to train on, wanted at least two (one of them to validate); "
            f"{lost or 'give more text or change the context'}"
        )
    if lost:
        logger.warning("%s, or they are skipped", lost)
    return items


def _item(tokenizer: Any, prompt: str, answer: str, context: int) -> Item:
    """Prompt and answer with an end-of-sequence token, cut off after `context` tokens."""
    start = tokenize(tokenizer, prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = torch.cat([start, tokenize(tokenizer, answer), torch.tensor(end, dtype=torch.int64)])[:context]
    return Item(ids, learned_from=max(1, len(start)))


def number_of_steps(config: LoraTuneConfig, items: int) -> int:
    """Number of steps of a run on so many training items."""
    return config.steps or max(1, math.ceil(config.epochs * items / config.loop.batch_size))


def with_adapter(base: Base, config: LoraTuneConfig, device: Any) -> tuple[Any, Any]:
    """Load the base with a new adapter in it; everything else is frozen.

    Returns:
        The transformers model with PEFT's layers in it, and the PeftModel around it.

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


class LoraTask:
    """The task that the loop trains: an adapter on a base.

    Args:
        model: the transformers model that PEFT has put its layers into.
        items: (training, validation).
        dtype: of matrix products.
    """

    def __init__(
        self, model: Any, items: tuple[list[Item], list[Item]], config: LoraTuneConfig, dtype: torch.dtype
    ) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        self.train, self.validation = items
        self.items = len(self.train)
        self.head = LmHead.of(model)

    def groups(self) -> list[Group]:
        """The adapter's parameters."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [Group("adapter", self.config.learning_rate, trained)]

    def weight(self, numbers: Tensor) -> float:
        """Number of scored tokens."""
        return float(sum(self.train[n].weight for n in numbers.tolist()))

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Add the gradient of scale * the negative log likelihood of these items; returns that value."""
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
        for row, item in enumerate(items):  # padding is on the right: causal attention does not look there
            ids[row, : len(item.ids)] = item.ids
            scored[row, item.learned_from - 1 : len(item.ids) - 1] = True
        positions = scored.reshape(-1).nonzero()[:, 0]
        following = ids.roll(-1, dims=1).reshape(-1)[positions][:, None]
        certain = torch.zeros(len(positions), 1, device=device)
        return self.head.kl(
            ids, lambda part: (following[part], certain[part]), scale, self.dtype, positions=positions
        )
