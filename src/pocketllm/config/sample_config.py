"""Settings of texts that a model writes itself."""

from __future__ import annotations

from dataclasses import dataclass

from pocketllm.config.checks import MOST_SEED, at_least, between, positive


@dataclass(frozen=True)
class SampleConfig:
    """What is written.

    tokens: in all, at least. length: tokens of a text; fewer if the model has fewer positions. batch: texts at once.
    temperature: as of `Sampling`; at 1, texts have the model's own distribution. seed: of the random choices.

    Raises:
        ConfigError: a value out of range.
    """

    tokens: int = 40_000
    length: int = 512
    batch: int = 32
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "batch"):
            at_least(name, getattr(self, name), 1)
        positive("temperature", self.temperature)
        between("seed", self.seed, 0, MOST_SEED)
