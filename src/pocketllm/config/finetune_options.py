"""From the options of `pocketllm finetune` to settings of distillation or LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from pocketllm.config.recover_config import DistillConfig, LoraTuneConfig
from pocketllm.config.settings import Setting, parse_settings, refuse_options, replaced, settings_of
from pocketllm.errors import ConfigError

FINETUNE_METHODS: dict[str, DistillConfig | LoraTuneConfig] = {
    "distill": DistillConfig(),
    "lora": LoraTuneConfig(),
}
"""The methods and their default settings."""
FINETUNE_OPTIONS = {
    "texts": "--text",
    "steps": "--steps",
    "context": "--context",
    "validation_text": "--validation-text",
    "loop.seed": "--seed",
}
"""Settings that have their own command-line option; `--set` refuses them."""


def finetune_settings(method: str) -> dict[str, Setting]:
    """The settings of a method of fine-tuning."""
    return settings_of(FINETUNE_METHODS[method])


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `pocketllm finetune` that define the result. settings: KEY=VALUE words of `--set`."""

    method: str = "distill"
    texts: tuple[str, ...] = ()
    steps: int | None = None
    context: int | None = None
    validation_text: str | None = None
    seed: int = 0
    settings: tuple[str, ...] = ()

    def config(self) -> DistillConfig | LoraTuneConfig:
        """The defaults of the method, modified by these options.

        Raises:
            ConfigError: unknown method or key, a key or option of the other method, or a value out of range.
        """
        if self.method not in FINETUNE_METHODS:
            raise ConfigError(f"--method: got {self.method!r}, wanted {' or '.join(FINETUNE_METHODS)}")
        own = finetune_settings(self.method)
        every = {
            key: one for method in FINETUNE_METHODS for key, one in finetune_settings(method).items()
        } | own
        values = parse_settings(self.settings, every, "pocketllm settings finetune")
        refuse_options(values, FINETUNE_OPTIONS)
        options = {"steps": self.steps, "context": self.context, "validation_text": self.validation_text}
        values |= {key: value for key, value in options.items() if value is not None}
        for key in values:
            if key not in own:
                name = FINETUNE_OPTIONS.get(key, key)
                raise ConfigError(f"{name} does not apply to --method {self.method}; remove it")
        return replaced(
            FINETUNE_METHODS[self.method], {**values, "texts": self.texts, "loop.seed": self.seed}
        )
