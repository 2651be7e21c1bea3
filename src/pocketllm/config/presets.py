"""Named configurations: the presets of a compression, and the settings of the demo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pocketllm.config.codec_config import CodecConfig
from pocketllm.config.compress_config import CalibrationConfig, CompressConfig
from pocketllm.config.recover_config import DistillConfig, LoopConfig
from pocketllm.errors import ConfigError

DEMO_SETTINGS = {
    "calibration.tokens": 8192,
    "calibration.sensitivity_tokens": 1024,
    "codec.trellis_width": 9,
}
"""Settings of the demo that save time: fewer tokens than the default, and windows that take an eighth of the search."""
DEMO_RECOVERY = DistillConfig(
    steps=6,
    context=256,
    validation_windows=8,
    lr_codebook=5e-4,
    lr_scale=5e-4,
    lr_norm=5e-4,
    lr_dense=2e-4,
    lr_decoder=1e-4,
    loop=LoopConfig(batch_size=4, eval_every=6, checkpoint_every=3),
)
"""Distillation in the demo: few steps need low learning rates."""


@dataclass(frozen=True)
class Preset:
    """A named configuration. summary: one line for `--help`."""

    config: CompressConfig
    summary: str


def _paper(bpw: float, vector_len: int) -> CompressConfig:
    """The published method: RLN in encoder and decoder, first three and last two blocks dense."""
    return CompressConfig(
        codec=CodecConfig(decoder="row", epochs=2, kmeans_iterations=10),
        target_bpw=bpw,
        vector_len=vector_len,
        dense_first=3,
        dense_last=2,
        max_index_bits=15,
    )


def _calibrated(bpw: float) -> CompressConfig:
    """Indices on a hashed trellis, chosen to preserve the outputs of layers; bits allocated where they matter."""
    return CompressConfig(
        codec=CodecConfig(
            trellis_width=12, codebook_source="hashed", kmeans_iterations=10, max_sample=1 << 18
        ),
        calibration=CalibrationConfig(),
        decoder_scope="matrix",
        target_bpw=bpw,
    )


def _lookup(bpw: float) -> CompressConfig:
    """Look-up decoder, independent indices, every block compressed."""
    return CompressConfig(target_bpw=bpw)


PRESETS: dict[str, Preset] = {
    "calibrated-8x": Preset(_calibrated(3.98), "calibrated, 3.98 bits per weight (8x against fp32)"),
    "calibrated-10x": Preset(_calibrated(2.98), "calibrated, 2.98 bits per weight (default)"),
    "calibrated-16x": Preset(_calibrated(2.02), "calibrated, 2.02 bits per weight"),
    "calibrated-20x": Preset(_calibrated(1.6), "calibrated, 1.6 bits per weight"),
    "paper-8x": Preset(_paper(3.98, 3), "published method, 3.98 bits per weight (8x against fp32)"),
    "paper-10x": Preset(_paper(2.98, 4), "published method, 2.98 bits per weight (10x against fp32)"),
    "paper-16x": Preset(_paper(2.02, 8), "published method, 2.02 bits per weight (16x against fp32)"),
    "paper-20x": Preset(_paper(1.6, 8), "published method, 1.6 bits per weight (20x against fp32)"),
    "lookup-8x": Preset(_lookup(3.98), "look-up decoder, all blocks, 3.98 bits per weight"),
    "lookup-10x": Preset(_lookup(2.98), "look-up decoder, all blocks, 2.98 bits per weight"),
    "lookup-16x": Preset(_lookup(2.02), "look-up decoder, all blocks, 2.02 bits per weight"),
    "lookup-20x": Preset(_lookup(1.6), "look-up decoder, all blocks, 1.6 bits per weight"),
}
"""The presets by name."""
DEFAULT_PRESET = "calibrated-10x"
"""The default preset."""
PLAIN_PRESET = "lookup-8x"
"""The default preset if calibration is off or one of `PLAIN_SETTINGS` is given."""
PLAIN_SETTINGS = (
    "codebook_size",
    "codec.decoder",
    "codec.norm",
    "codec.init",
    "codec.loss",
    "codec.hidden",
    "codec.depth",
    "codec.epochs",
    "codec.row_scale",
)
"""Settings of networks and of independent indices, which do not apply to a trellis."""


def default_preset(no_calibration: bool, keys: Iterable[str]) -> str:
    """The preset that options start from if none is named.

    Args:
        keys: the settings that are given a value.
    """
    return PLAIN_PRESET if no_calibration or not set(PLAIN_SETTINGS).isdisjoint(keys) else DEFAULT_PRESET


def preset(name: str) -> CompressConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].config
