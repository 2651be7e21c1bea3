"""The LoRA task: an adapter that PEFT puts into a compressed base, and its loss on chats, instructions or plain text.

In a chat or an instruction only the assistant's answers are learned; in plain text all tokens of every window but
the first.
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
from pocketllm.recover.kl_loss import LmHead
from pocketllm.recover.loop import Group
from pocketllm.recover.trainable import make_trainable
from pocketllm.runtime.layers import reason_to_decode
from pocketllm.text.chat import Chat, has_template, pieces, warn_without_template
from pocketllm.text.default_texts import named_default
from pocketllm.text.read import read_answered, text_paths
from pocketllm.text.vocabulary import check_tokens
from pocketllm.text.windows import all_windows, split_numbers, tokenize, tokenize_pieces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One training sequence: token ids [T] int64, and [T] bool, which of them are learned: never the first."""

    ids: Tensor
    learned: Tensor

    @classmethod
    def of(cls, ids: Tensor, learned: Tensor) -> Item:
        """An item whose first token is not learned: nothing comes before it."""
        return cls(ids, learned & (torch.arange(len(ids)) > 0))

    @property
    def weight(self) -> int:
        """Number of scored tokens."""
        return int(self.learned.sum())


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

    Chats and instructions that leave no room for an answer are left out, with a warning.

    Args:
        texts: files or folders; none takes the text that ships with Python.

    Raises:
        SourceError: a text cannot be read.
        ConfigError: fewer than two items.
    """
    answered: list[Item] = []
    plain: dict[str, list[str]] = {}
    for text in texts:
        chats: list[Chat] = []
        for path in text_paths(text):
            found = read_answered(path)
            if isinstance(found, str):
                plain.setdefault(text, []).append(found)
            else:
                chats += found
        warn_without_template(chats, tokenizer, text)
        learnable = [chat for chat in chats if chat.is_answered]
        if len(learnable) < len(chats):
            logger.warning(
                "%s: %d of %d chats have no answer of the assistant; they are skipped",
                *(text, len(chats) - len(learnable), len(chats)),
            )
        answered += [_item(tokenizer, chat, context) for chat in learnable]
    items = [item for item in answered if item.weight > 0]
    lost = ""
    if len(items) < len(answered):
        lost = (
            f"{len(answered) - len(items)} of {len(answered)} instructions leave no room for their answer "
            f"in a context of {context} tokens; raise --context"
        )
    named = {name: "\n\n".join(parts) for name, parts in plain.items()} if texts else dict([named_default()])
    if named:
        windows = all_windows(tokenizer, named, context)
        items += [Item.of(window, torch.ones(len(window), dtype=torch.bool)) for window in windows]
    if len(items) < 2:
        raise ConfigError(
            f"the text contains {len(items)} items to train on, wanted at least two (one of them to validate); "
            f"{lost or 'give more text or change the context'}"
        )
    if lost:
        logger.warning("%s, or they are skipped", lost)
    return items


def _item(tokenizer: Any, chat: Chat, context: int) -> Item:
    """A chat or an instruction, cut off after `context` tokens.

    What a chat template writes is tokenized at once, as for generation. Without one, which would end answers itself,
    the answer follows the tokens of its prompt, and an end-of-sequence token is added.
    """
    written = pieces(chat, tokenizer)
    if has_template(tokenizer):
        ids, learned = tokenize_pieces(tokenizer, written)
        return Item.of(ids[:context], learned[:context])
    parts = [(tokenize(tokenizer, text), is_learned) for text, is_learned in written]
    if tokenizer.eos_token_id is not None:
        parts.append((torch.tensor([tokenizer.eos_token_id]), parts[-1][1]))
    ids = torch.cat([ids for ids, _ in parts])[:context]
    learned = torch.cat([torch.full((len(ids),), is_learned) for ids, is_learned in parts])[:context]
    return Item.of(ids, learned)


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
    if config.mode == "packed" and reason_to_decode(model):
        make_trainable(
            model
        )  # layers without a kernel would keep their decoded weights for the backward pass
    model.requires_grad_(False)
    torch.manual_seed(config.loop.seed)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    targets: Any = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
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

    Raises:
        SourceError: as `check_tokens`.
    """

    def __init__(
        self, model: Any, items: tuple[list[Item], list[Item]], config: LoraTuneConfig, dtype: torch.dtype
    ) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        check_tokens(model, torch.cat([item.ids for part in items for item in part]))
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
            scored[row, : len(item.ids) - 1] = item.learned[1:]
        positions = scored.reshape(-1).nonzero()[:, 0]
        following = ids.roll(-1, dims=1).reshape(-1)[positions][:, None]
        certain = torch.zeros(len(positions), 1, device=device)
        return self.head.kl(
            ids, lambda part: (following[part], certain[part]), scale, self.dtype, positions=positions
        )
