"""Every setting and its default, and the presets. Nothing else in the package holds a default."""

from __future__ import annotations

from pocketllm.config.checks import flat
from pocketllm.config.codec import CodecConfig, Safeguards
from pocketllm.config.compress import (
    REFINE_EPOCHS,
    SCOPES,
    TARGET_OPTIONS,
    CalibrationConfig,
    CompressConfig,
)
from pocketllm.config.evaluate import EvalConfig
from pocketllm.config.presets import (
    DEFAULT_PRESET,
    DEMO_RECOVERY,
    DEMO_TOKENS,
    PLAIN_PRESET,
    PLAIN_SETTINGS,
    PRESETS,
    Preset,
    preset,
)
from pocketllm.config.recover import DistillConfig, LoopConfig, LoraTuneConfig

__all__ = [
    "DEFAULT_PRESET",
    "DEMO_RECOVERY",
    "DEMO_TOKENS",
    "PLAIN_PRESET",
    "PLAIN_SETTINGS",
    "PRESETS",
    "REFINE_EPOCHS",
    "SCOPES",
    "TARGET_OPTIONS",
    "CalibrationConfig",
    "CodecConfig",
    "CompressConfig",
    "DistillConfig",
    "EvalConfig",
    "LoopConfig",
    "LoraTuneConfig",
    "Preset",
    "Safeguards",
    "flat",
    "preset",
]
