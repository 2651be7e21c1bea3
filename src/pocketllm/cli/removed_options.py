"""Options replaced by `--set KEY=VALUE`: each is refused with its replacement."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

from pocketllm.errors import ConfigError

_COMPRESS = {
    "--calibration-tokens": "--set calibration.tokens={}",
    "--sequential": "--set calibration.sequential=true",
    "--no-sequential": "--set calibration.sequential=false",
    "--refine": "--set calibration.refine_epochs=2",
    "--no-refine": "--set calibration.refine_epochs=0",
    "--passes": "--set calibration.passes={}",
    "--weigh-tokens": "--set calibration.weigh_tokens=true",
    "--no-weigh-tokens": "--set calibration.weigh_tokens=false",
    "--two-sided": "--set calibration.two_sided=true",
    "--one-sided": "--set calibration.two_sided=false",
    "--rotate": "--set calibration.rotate=true",
    "--no-rotate": "--set calibration.rotate=false",
    "--dense-first": "--set dense_first={}",
    "--dense-last": "--set dense_last={}",
    "--vector-len": "--set vector_len={}",
    "--codebook-size": "--set codebook_size={}",
    "--codebook-scope": "--set codebook_scope={}",
    "--codebook-source": "--set codec.codebook_source={}",
    "--decoder-scope": "--set decoder_scope={}",
    "--decoder": "--set codec.decoder={}",
    "--norm": "--set codec.norm={}",
    "--init": "--set codec.init={}",
    "--loss": "--set codec.loss={}",
    "--hidden": "--set codec.hidden={}",
    "--depth": "--set codec.depth={}",
    "--vq-weight": "--set codec.vq_weight={}",
    "--commitment-weight": "--set codec.commitment_weight={}",
    "--epochs": "--set codec.epochs={}",
    "--learning-rate": "--set codec.learning_rate={}",
    "--batch-size": "--set codec.batch_size={}",
    "--row-scale": "--set codec.row_scale=true",
    "--no-row-scale": "--set codec.row_scale=false",
    "--recover-steps": "--set recover.steps={}",
}
_FINETUNE = {
    "--batch-size": "--set loop.batch_size={}",
    "--micro-batch": "--set loop.micro_batch={}",
    "--validation-windows": "--set validation_windows={} (with --method lora: --set validation_items={})",
    "--eval-every": "--set loop.eval_every={}",
    "--patience": "--set loop.patience={}",
    "--checkpoint-every": "--set loop.checkpoint_every={}",
    "--gradient-checkpointing": "--set loop.gradient_checkpointing=true",
    "--dtype": "--set loop.dtype={}",
    "--teacher-top-k": "--set teacher_top_k={}",
    "--label-weight": "--set label_weight={}",
    "--lr-codebook": "--set lr_codebook={}",
    "--lr-decoder": "--set lr_decoder={}",
    "--lr-scale": "--set lr_scale={}",
    "--lr-norm": "--set lr_norm={}",
    "--lr-dense": "--set lr_dense={}",
    "--rank": "--set rank={}",
    "--alpha": "--set alpha={}",
    "--dropout": "--set dropout={}",
    "--targets": "--set targets={}",
    "--epochs": "--set epochs={}",
    "--learning-rate": "--set learning_rate={}",
    "--mode": "--set mode={}",
}
REMOVED: Mapping[str, Mapping[str, str]] = {
    "compress": _COMPRESS,
    "finetune": _FINETUNE,
    "eval": {"--batch-tokens": "--set batch_tokens={}"},
}
"""Command -> old option -> what to use instead; {} stands for the value that was given."""


class SettingsCommand(TyperCommand):
    """A command with `--set`; refuses the options that it has replaced."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError: a removed option is given."""
        removed = REMOVED.get(self.name or "", {})
        for place, word in enumerate(args):
            option, equals, value = word.partition("=")
            if option in removed:
                following = args[place + 1] if place + 1 < len(args) else "VALUE"
                given = shlex.quote(value if equals else following)
                instead = removed[option].replace("{}", given)
                raise ConfigError(f"{option}: use {instead}")
        return super().parse_args(ctx, args)
