"""The errors PocketLLM raises on purpose. Each message says what was got, what was wanted, what to do."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ExtraError",
    "FormatError",
    "LoadError",
    "OutputError",
    "PocketError",
    "ResumeError",
    "ShapeError",
    "SourceError",
    "TargetError",
    "TrainingError",
    "WeightError",
]


class PocketError(Exception):
    """Base of every error raised on purpose; the command line exits with code 1 on it."""


class ConfigError(PocketError):
    """A setting is wrong or two settings contradict each other; the command line exits with code 2."""


class TargetError(ConfigError):
    """No plan meets a target of bits per weight. least, most: that are possible with the settings."""

    def __init__(self, message: str, least: float, most: float) -> None:
        super().__init__(message)
        self.least, self.most = least, most


class ShapeError(PocketError):
    """A tensor has a shape the operation cannot take."""


class WeightError(PocketError):
    """Weights hold or compute what is not finite (NaN, Inf), or have an unsupported dtype."""


class SourceError(PocketError):
    """A model or a text to be read is missing, empty, or in a form that is not read (pickle, no safetensors)."""


class FormatError(PocketError):
    """A compressed model on disk is damaged, altered, or written by an unknown format version."""


class OutputError(PocketError):
    """The output cannot be written: it was not created by pocketllm, no permission, or the disk is full."""


class ResumeError(PocketError):
    """A half-done output was started with other arguments."""


class LoadError(PocketError):
    """A model was loaded, but its layers are not the compressed ones."""


class ExtraError(PocketError):
    """An optional package is not installed; the message names the extra that brings it."""


class TrainingError(PocketError):
    """Fine-tuning cannot go on: the loss is not finite, or there is nothing to train."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error of another package says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
