"""The errors that PocketLLM raises. Each message says what was found, what was expected and what to do."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ExtraError",
    "FormatError",
    "LoadError",
    "OutputError",
    "PocketError",
    "RankError",
    "ResumeError",
    "ShapeError",
    "SourceError",
    "TargetError",
    "TrainingError",
    "WeightError",
]


class PocketError(Exception):
    """Base class of all errors that pocketllm raises; the command line exits with code 1."""


class ConfigError(PocketError):
    """A setting is invalid or conflicts with another; the command line exits with code 2."""


class TargetError(ConfigError):
    """No plan meets a target of bits per weight. least, most: the possible range with these settings."""

    def __init__(self, message: str, least: float, most: float) -> None:
        super().__init__(message)
        self.least, self.most = least, most


class ShapeError(PocketError):
    """A tensor has a shape that the operation does not accept."""


class WeightError(PocketError):
    """Weights or computed values are not finite (NaN, Inf), or weights have an unsupported dtype."""


class SourceError(PocketError):
    """An input model or text is missing, empty, or in an unsupported format (pickle instead of safetensors)."""


class FormatError(PocketError):
    """A compressed model on disk is damaged, altered, or written by an unknown format version."""


class OutputError(PocketError):
    """The output cannot be written: not created by pocketllm, no permission, or the disk is full."""


class ResumeError(PocketError):
    """An unfinished output was started with other arguments."""


class RankError(PocketError):
    """Another of the processes that torchrun launched together has failed; the message names its rank."""


class LoadError(PocketError):
    """A model was loaded, but its layers are not the compressed ones."""


class ExtraError(PocketError):
    """An optional package is not installed; the message names the extra that brings it."""


class TrainingError(PocketError):
    """Fine-tuning cannot continue: the loss is not finite, or there is nothing to train."""


def reason_of(error: BaseException) -> str:
    """The first line of the message of another package's error, and the second if the first announces it; the type of
    the error if it has no message.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def cannot_read(path: object, error: OSError) -> SourceError:
    """The error for a file or folder that the system does not let this user read."""
    return SourceError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")
