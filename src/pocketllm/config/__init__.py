"""Every setting and its default, and the presets. Nothing else in the package holds a default."""

from __future__ import annotations

from pocketllm.config.checks import flat
from pocketllm.config.codec_config import CodecConfig, Safeguards
from pocketllm.config.command import Command, adapter_command, command_for
from pocketllm.config.compress_config import SCOPES, TARGET_OPTIONS, CalibrationConfig, CompressConfig
from pocketllm.config.compress_options import COMPRESS_OPTIONS, CompressOptions, compress_settings
from pocketllm.config.difference import as_options, finetune_as_options, left_out
from pocketllm.config.eval_config import EVAL_OPTIONS, EvalConfig, eval_config
from pocketllm.config.finetune_options import (
    FINETUNE_METHODS,
    FINETUNE_OPTIONS,
    FinetuneOptions,
    finetune_settings,
)
from pocketllm.config.presets import (
    DEFAULT_PRESET,
    DEMO_RECOVERY,
    DEMO_SETTINGS,
    PLAIN_PRESET,
    PLAIN_SETTINGS,
    PRESETS,
    Preset,
    preset,
)
from pocketllm.config.recover_config import DistillConfig, LoopConfig, LoraTuneConfig
from pocketllm.config.sample_config import SampleConfig
from pocketllm.config.settings import Setting, replaced, settings_of, text_of

__all__ = [
    "COMPRESS_OPTIONS",
    "DEFAULT_PRESET",
    "DEMO_RECOVERY",
    "DEMO_SETTINGS",
    "EVAL_OPTIONS",
    "FINETUNE_METHODS",
    "FINETUNE_OPTIONS",
    "PLAIN_PRESET",
    "PLAIN_SETTINGS",
    "PRESETS",
    "SCOPES",
    "TARGET_OPTIONS",
    "CalibrationConfig",
    "CodecConfig",
    "Command",
    "CompressConfig",
    "CompressOptions",
    "DistillConfig",
    "EvalConfig",
    "FinetuneOptions",
    "LoopConfig",
    "LoraTuneConfig",
    "Preset",
    "Safeguards",
    "SampleConfig",
    "Setting",
    "adapter_command",
    "as_options",
    "command_for",
    "compress_settings",
    "eval_config",
    "finetune_as_options",
    "finetune_settings",
    "flat",
    "left_out",
    "preset",
    "replaced",
    "settings_of",
    "text_of",
]
