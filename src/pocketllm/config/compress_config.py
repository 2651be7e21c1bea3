"""Settings of a compression, and of its calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pocketllm.config.checks import MOST_SEED, at_least, between, one_of, plain, positive
from pocketllm.config.codec_config import CodecConfig
from pocketllm.errors import ConfigError

SCOPES = ("matrix", "kind", "model")
"""What may share a codebook or a decoder."""
TARGET_OPTIONS = {"target_bpw": "--bpw", "target_ratio": "--ratio", "target_bytes": "--size"}
"""The settings that determine the size of a model, and their options on the command line."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of calibration: indices are chosen to preserve the outputs of layers on a text.

    tokens: Number of calibration tokens.
    context: Tokens per calibration window.
    sensitivity_tokens: Number of calibration tokens on which the cost of errors in each matrix is measured.
    damping: Share of the mean diagonal that is added to the diagonal of each Hessian.
    weigh_tokens: Weight the inputs of a matrix by the gradients of the loss at its outputs if those of a few
        tokens are far above the others.
    two_sided: Also weight errors by the gradients of the loss at a layer's outputs, so that rows compensate
        for each other; false uses the layer's inputs only.
    passes: Passes of coordinate descent over the indices after error feedback; needs two_sided=false.
    rotate: Rotate both sides of each matrix.
    sequential: Encode each block for the inputs that the compressed blocks before it produce; false uses those
        of the dense model, which can be cached.
    refine_epochs: Passes over the text to tune each encoded block; 0 is off.
    refine_rate: Learning rate for refine_epochs.
    compensate: Steps in which the weights of a block that are not yet encoded are tuned to make up for the errors of
        those that are, after each group of matrices with the same inputs; 0 is off; needs sequential=true.
    compensate_rate: Learning rate for compensate: times the root mean square of a matrix over its number of inputs.
    texts: Files, folders or data sets on the Hub (OWNER/NAME[:CONFIG[:SPLIT]]); the default is Python's own
        documentation.
    """

    tokens: int = 32768
    context: int = 512
    sensitivity_tokens: int = 8192
    damping: float = 0.01
    weigh_tokens: bool = True
    two_sided: bool = True
    passes: int = 0
    rotate: bool = True
    sequential: bool = True
    refine_epochs: int = 0
    refine_rate: float = 1e-3
    compensate: int = 0
    compensate_rate: float = 1.0
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, self.context)
        at_least("context", self.context, 2)
        at_least("passes", self.passes, 0)
        if self.passes and self.two_sided:
            raise ConfigError("passes: coordinate descent needs two_sided=False")
        at_least("refine_epochs", self.refine_epochs, 0)
        positive("refine_rate", self.refine_rate)
        at_least("compensate", self.compensate, 0)
        positive("compensate_rate", self.compensate_rate)
        if self.compensate and not self.sequential:
            raise ConfigError(
                "compensate: got sequential=false, wanted true; later inputs depend on what is tuned"
            )
        positive("damping", self.damping)


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression.

    codec: Settings of the codecs.
    target_bpw: Stored bits per weight of all compressed matrices, everything counted.
    target_bytes: Bytes of the output folder, instead of target_bpw.
    target_ratio: Size of the bf16 checkpoint divided by that of the output folder, instead of target_bpw.
    vector_len: Weights per index (d) in the blocks; none lets the planner choose.
    codebook_size: Codewords of a codebook (K); needs vector_len and replaces the target (target_bpw is not used).
    codebook_scope: Scope of a codebook: matrix, kind (of projection) or model; auto takes the one with the
        least predicted error at the target.
    decoder_scope: Scope of a decoder: matrix, kind (of projection) or model.
    dense_first: Number of first blocks left dense (in the paper: 3).
    dense_last: Number of last blocks left dense (in the paper: 2).
    keep_embeddings: Leave embedding and head dense, in 16 bit.
    towers: Also compress what lies outside the blocks of a multimodal model's language model (vision and audio
        towers), without calibration; false leaves it dense.
    embedding_extra_bits: Additional bits per weight of embedding and head, compared with the blocks.
    max_index_bits: Largest log2 K, to bound the time.
    calibration: Settings of calibration; None minimizes the error of the weights alone.
    overrides: (pattern, bits per weight) pairs for matrices whose name matches the pattern (as in a shell);
        16 leaves them dense.
    seed: Seed of every random choice.
    max_memory_gb: Most memory of the process, in units of 10^9 bytes; none sets no limit. It changes no stored byte.
    """

    codec: CodecConfig = field(default_factory=CodecConfig)
    target_bpw: float | None = 3.98
    target_bytes: int | None = None
    target_ratio: float | None = None
    vector_len: int | None = None
    codebook_size: int | None = None
    codebook_scope: str = "auto"
    decoder_scope: str = "kind"
    dense_first: int = 0
    dense_last: int = 0
    keep_embeddings: bool = False
    towers: bool = False
    embedding_extra_bits: float = 0.5
    max_index_bits: int = 13
    calibration: CalibrationConfig | None = None
    overrides: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        if self.max_memory_gb is not None:
            positive("max_memory_gb", self.max_memory_gb)
        one_of("codebook_scope", self.codebook_scope, ("auto", *SCOPES))
        one_of("decoder_scope", self.decoder_scope, SCOPES)
        between("seed", self.seed, 0, MOST_SEED)
        for name in ("dense_first", "dense_last", "embedding_extra_bits"):
            at_least(name, getattr(self, name), 0)
        if not 1 <= self.max_index_bits <= 20:
            raise ConfigError(f"max_index_bits: got {self.max_index_bits}, wanted 1 to 20")
        if self.vector_len is not None and not 1 <= self.vector_len <= 64:
            raise ConfigError(f"vector_len: got {self.vector_len}, wanted 1 to 64")
        if self.codebook_size is not None:
            if not 2 <= self.codebook_size <= 1 << 20:
                raise ConfigError(f"codebook_size: got {self.codebook_size}, wanted 2 to {1 << 20}")
            if self.vector_len is None:
                raise ConfigError("codebook_size is set without vector_len; set both, or target_bpw alone")
            if self.target_bytes is not None or self.target_ratio is not None:
                raise ConfigError(
                    "codebook_size fixes the size; it cannot be combined with target_bytes or target_ratio"
                )
        else:
            self._check_target()
        if self.codebook_size is not None and self.codec.trellis_width is not None:
            raise ConfigError("codebook_size and trellis_width cannot be combined; K is 2^trellis_width")
        if self.codec.hashed and self.vector_len not in (None, 1, 2):
            raise ConfigError(
                f"vector_len: got {self.vector_len}, wanted 1, 2 or none with codec.codebook_source='hashed'; set it "
                "to fit for others"
            )
        for pattern, bits in self.overrides:
            if not 0 < bits <= 16:
                raise ConfigError(
                    f"override {pattern!r}: got {bits} bits per weight, wanted more than 0, at most 16"
                )
        if any(bits < 16 for _, bits in self.overrides) and self.codec.trellis_width is None:
            raise ConfigError("overrides below 16 bits need a trellis (trellis_width)")
        if self.calibration is not None and (self.codec.decoder != "lookup" or not self.codec.row_scale):
            raise ConfigError(
                f"calibration: got codec.decoder={self.codec.decoder!r}, codec.row_scale={self.codec.row_scale}, "
                "wanted 'lookup' and True; change them, or leave calibration off"
            )

    def _check_target(self) -> None:
        targets = {name: getattr(self, name) for name in TARGET_OPTIONS}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(f"got {' and '.join(given) or 'no target'}, wanted one of {', '.join(targets)}")
        if self.target_bpw is not None and not 0 < self.target_bpw <= 16:
            raise ConfigError(f"target_bpw: got {self.target_bpw}, wanted more than 0 and at most 16")
        if self.target_bytes is not None:
            at_least("target_bytes", self.target_bytes, 1)
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise ConfigError(f"target_ratio: got {self.target_ratio}, wanted more than 1")

    def codec_for(self, vector_len: int) -> CodecConfig:
        """The codec settings at another vector_len; `hidden` grows if the identity initialization needs it."""
        return _codec_for(self.codec, vector_len)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types of what defines the result: without `max_memory_gb`, and `towers` and the settings of
        compensation only where they are used, as files of models without them are older.
        """
        values = plain(self)
        del values["max_memory_gb"]
        if not self.towers:
            del values["towers"]
        if self.calibration is not None and not self.calibration.compensate:
            del values["calibration"]["compensate"], values["calibration"]["compensate_rate"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        overrides = tuple((pattern, bits) for pattern, bits in values.get("overrides", ()))
        calibration = values.get("calibration")
        if calibration is not None:
            texts = tuple(calibration["texts"])
            calibration = CalibrationConfig(**{**calibration, "texts": texts})
        return cls(
            **{
                **values,
                "codec": CodecConfig(**values["codec"]),
                "calibration": calibration,
                "overrides": overrides,
            }
        )


@lru_cache(maxsize=1 << 8)
def _codec_for(codec: CodecConfig, vector_len: int) -> CodecConfig:
    hidden = max(codec.hidden, 2 * vector_len) if codec.hidden else 0
    return dataclasses.replace(codec, vector_len=vector_len, hidden=hidden)
