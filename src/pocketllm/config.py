"""Every setting and its default, and the presets. Nothing else in the package holds a default."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketllm.errors import ConfigError

SCOPES = ("matrix", "kind", "model")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}: got {value}, wanted at least {least}")


def _plain(config: Any) -> dict[str, Any]:
    """A configuration in plain JSON types: no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


@dataclass(frozen=True)
class CodecConfig:
    """The codec on one group of matrices; how it is built and trained.

    vector_len: d, weights per index.
    hidden, depth: width and number of MLP blocks in encoder and decoder (the authors: 16 and 3). hidden 0
        makes each block an affine map; depth 0 leaves the networks out, so that codewords are weights.
    norm: inside the networks; `rln` as published, `ln` and `none` are ablations.
    decoder: `row` as published (norm inside, row context) or `lookup` (no norm inside, exact table).
    row_scale: store one scale per matrix row (counted). Without it the rows of a matrix must share one.
    init: `kmeans` (identity networks, k-means codebook) or `normal` as published.
    loss: `mse` or `rmse`. vq_weight: the paper's lambda. commitment_weight: 0 is off.
    epochs, learning_rate, batch_size (subvectors): Adam with a cosine schedule.
    kmeans_iterations: Lloyd rounds of the initialization.
    sample_per_codeword, max_sample: bounds on the subvectors that a codebook and its networks are fitted to.
    trellis_width: bits of an index on a trellis, where indices overlap; None for independent indices.
    codebook_source: `fit`, or `seed`: Gaussian numbers drawn from a seed, so that no codebook is stored.
    """

    vector_len: int = 4
    hidden: int = 16
    depth: int = 3
    norm: str = "rln"
    decoder: str = "lookup"
    row_scale: bool = True
    init: str = "kmeans"
    loss: str = "mse"
    vq_weight: float = 0.5
    commitment_weight: float = 0.0
    epochs: int = 3
    learning_rate: float = 3e-3
    batch_size: int = 16384
    kmeans_iterations: int = 25
    sample_per_codeword: int = 256
    max_sample: int = 1 << 21
    trellis_width: int | None = None
    codebook_source: str = "fit"

    def __post_init__(self) -> None:
        _one_of("norm", self.norm, ("rln", "ln", "none"))
        _one_of("decoder", self.decoder, ("row", "lookup"))
        _one_of("init", self.init, ("kmeans", "normal"))
        _one_of("loss", self.loss, ("mse", "rmse"))
        _one_of("codebook_source", self.codebook_source, ("fit", "seed"))
        if self.trellis_width is not None:
            self._check_trellis(self.trellis_width)
        for name in ("vector_len", "batch_size", "sample_per_codeword", "max_sample"):
            _at_least(name, getattr(self, name), 1)
        for name in ("hidden", "depth", "epochs", "kmeans_iterations", "vq_weight", "commitment_weight"):
            _at_least(name, getattr(self, name), 0)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate: got {self.learning_rate}, wanted more than 0")
        if self.depth == 0 and (self.decoder != "lookup" or self.vq_weight == 0):
            raise ConfigError(
                "depth=0 needs decoder='lookup' and vq_weight above 0: without networks a codeword decodes to "
                "itself, and only the codebook's own loss can train it"
            )
        if self.init == "kmeans" and self.hidden and self.depth and self.hidden < 2 * self.vector_len:
            raise ConfigError(
                f"hidden: got {self.hidden}, wanted at least {2 * self.vector_len} (twice vector_len="
                f"{self.vector_len}) so that the networks can start as the identity; "
                "raise hidden or use init='normal'"
            )

    def _check_trellis(self, width: int) -> None:
        if not 2 <= width <= 16:
            raise ConfigError(f"trellis_width: got {width}, wanted 2 to 16")
        if self.decoder != "lookup" or not self.row_scale:
            raise ConfigError("trellis_width needs decoder='lookup' and row_scale=True")

    @property
    def decoder_norm(self) -> str:
        """Norm inside the decoder: none in the look-up form, whose output depends on the codeword alone."""
        return "none" if self.decoder == "lookup" else self.norm

    @property
    def network_shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of all blocks of a network as they are stored, `up` and `down`."""
        d, hidden = self.vector_len, self.hidden
        if hidden == 0:
            return (self.depth, d, d), (self.depth, 1, d)
        return (self.depth, d, hidden), (self.depth, hidden, d)

    @property
    def decoder_bits(self) -> int:
        """Stored bits of one decoder, float16."""
        return 16 * sum(math.prod(shape) for shape in self.network_shapes)


REFINE_EPOCHS = 2  # where refinement is asked for without a number


@dataclass(frozen=True)
class Safeguards:
    """What keeps the training of a codec on its way; off only where a study asks what happens without.

    max_grad_norm: gradients are scaled down to it; infinite is off.
    revive: move codewords that an epoch never used.
    """

    max_grad_norm: float = 1.0
    revive: bool = True

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm: got {self.max_grad_norm}, wanted more than 0")


@dataclass(frozen=True)
class CalibrationConfig:
    """How indices are chosen for what layers do to their inputs.

    tokens, context: of the calibration text, and per window. sensitivity_tokens: of these, for the
    measurement of what an error in each matrix costs. damping: share of the mean diagonal added to each
    Hessian. passes: of coordinate descent after error feedback. rotate: rotate both sides of matrices.
    sequential: code each block for the inputs it gets from the coded blocks before it; else for those it has
        in the dense model, which can be kept and used again.
    refine_epochs, refine_rate: passes over the text, and learning rate, of tuning each coded block; 0 passes
        leave it as it was coded.
    texts: files, folders or data sets of the hub (OWNER/NAME[:CONFIG[:SPLIT]]); none takes the text that comes
        with Python.
    """

    tokens: int = 32768
    context: int = 512
    sensitivity_tokens: int = 4096
    damping: float = 0.01
    passes: int = 0
    rotate: bool = True
    sequential: bool = True
    refine_epochs: int = 0
    refine_rate: float = 1e-3
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least("calibration tokens", self.tokens, self.context)
        _at_least("calibration context", self.context, 2)
        _at_least("passes", self.passes, 0)
        _at_least("refine_epochs", self.refine_epochs, 0)
        if not self.refine_rate > 0:
            raise ConfigError(f"refine_rate: got {self.refine_rate}, wanted more than 0")
        if not self.damping > 0:
            raise ConfigError(f"damping: got {self.damping}, wanted more than 0")


@dataclass(frozen=True)
class CompressConfig:
    """What `pocketllm.compress` does with a model.

    codec: settings of every codec; `vector_len` is overridden where the planner chooses it.
    target_bpw: stored bits per weight over all compressed matrices, everything counted.
    target_bytes: of the whole output folder, instead. target_ratio: of the whole bf16 checkpoint to the whole
        output folder, instead.
    vector_len: fixes d for the blocks; None lets the planner choose.
    codebook_size: fixes K (then `vector_len` must be set too and `target_bpw` is not used).
    codebook_scope, decoder_scope: what shares one: `matrix`, `kind` (of projection) or `model`;
        codebook_scope `auto` takes the one with the least predicted error at the target.
    dense_first, dense_last: blocks left dense at either end (the authors: 3 and 2).
    keep_embeddings: leave embedding and head dense, in 16 bit.
    embedding_extra_bits: bits per weight by which embedding and head are coded finer than the blocks.
    max_index_bits: bound on log2 K, for the sake of time.
    calibration: how to calibrate; None codes for the error of the weights alone.
    overrides: (pattern, bits per weight) pairs for matrices whose name fits the pattern (as in a shell);
        16 leaves them dense.
    seed: of every random choice.
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
    embedding_extra_bits: float = 0.5
    max_index_bits: int = 13
    calibration: CalibrationConfig | None = None
    overrides: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("codebook_scope", self.codebook_scope, ("auto", *SCOPES))
        _one_of("decoder_scope", self.decoder_scope, SCOPES)
        for name in ("dense_first", "dense_last", "embedding_extra_bits", "seed"):
            _at_least(name, getattr(self, name), 0)
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
                raise ConfigError("codebook_size fixes the size; it excludes target_bytes and target_ratio")
        else:
            self._check_target()
        if self.codebook_size is not None and self.codec.trellis_width is not None:
            raise ConfigError("codebook_size and trellis_width exclude each other; K is 2^trellis_width")
        for pattern, bits in self.overrides:
            if not 0 < bits <= 16:
                raise ConfigError(f"override {pattern!r}: got {bits} bits per weight, wanted 0 to 16")
        if any(bits < 16 for _, bits in self.overrides) and self.codec.trellis_width is None:
            raise ConfigError("overrides below 16 bits need a trellis (trellis_width)")
        if self.calibration is not None and (self.codec.decoder != "lookup" or not self.codec.row_scale):
            raise ConfigError("calibration needs decoder='lookup' and row_scale=True")

    def _check_target(self) -> None:
        targets = {name: getattr(self, name) for name in ("target_bpw", "target_bytes", "target_ratio")}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(f"got {' and '.join(given) or 'no target'}, wanted one of {', '.join(targets)}")
        if self.target_bpw is not None and not 0 < self.target_bpw <= 16:
            raise ConfigError(f"target_bpw: got {self.target_bpw}, wanted more than 0 and at most 16")
        if self.target_bytes is not None:
            _at_least("target_bytes", self.target_bytes, 1)
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise ConfigError(f"target_ratio: got {self.target_ratio}, wanted more than 1")

    def codec_for(self, vector_len: int) -> CodecConfig:
        """The codec settings at another vector_len; `hidden` grows where the identity start needs it."""
        hidden = max(self.codec.hidden, 2 * vector_len) if self.codec.hidden else 0
        return dataclasses.replace(self.codec, vector_len=vector_len, hidden=hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(self)

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


@dataclass(frozen=True)
class LoopConfig:
    """How fine-tuning steps, whatever the method.

    batch_size: items per step. micro_batch: items at once, their gradients added up; 0 takes all.
    eval_every: steps between validations. patience: validations without a better one before it stops; 0
        never stops early. checkpoint_every: steps between checkpoints.
    warmup: share of the steps with a rising rate; a cosine follows. max_grad_norm: gradients are scaled down
        to it; 0 is off.
    gradient_checkpointing: compute activations again on the way back instead of keeping them.
    dtype: of the matrix products; auto is bfloat16 where the machine has it, else float32.
    """

    batch_size: int = 8
    micro_batch: int = 0
    eval_every: int = 20
    patience: int = 0
    checkpoint_every: int = 10
    warmup: float = 0.03
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_every", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("micro_batch", "patience", "max_grad_norm", "seed"):
            _at_least(name, getattr(self, name), 0)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup}, wanted 0 to less than 1")
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class DistillConfig:
    """Tune what is stored beside the indices until the next-token distributions match the dense model's.

    texts: files or folders; none takes the text that comes with Python. context: tokens per window.
    validation_windows: kept out of training. validation_text: take them from here instead.
    lr_codebook, lr_scale, lr_norm, lr_dense: of codebooks, of row scales, of norms, biases and other vectors, and
        of matrices that are stored dense (embedding and head where they are kept), each relative to the size of
        what is tuned (norms of one model differ a hundredfold). lr_decoder: of decoders. A rate of 0 leaves its
        group as it is.
    teacher_top_k: keep the teacher's k most likely tokens, computed once; 0 runs it on every batch.
    """

    steps: int = 200
    context: int = 512
    texts: tuple[str, ...] = ()
    validation_windows: int = 16
    validation_text: str | None = None
    lr_codebook: float = 3e-3
    lr_decoder: float = 3e-4
    lr_scale: float = 3e-3
    lr_norm: float = 3e-3
    lr_dense: float = 1e-3
    teacher_top_k: int = 0
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("context", self.context, 2)
        _at_least("validation_windows", self.validation_windows, 1)
        for name in ("lr_codebook", "lr_decoder", "lr_scale", "lr_norm", "lr_dense", "teacher_top_k"):
            _at_least(name, getattr(self, name), 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(self)


DEMO_TOKENS = 16384  # of calibration text: half the default, for the sake of time
DEMO_RECOVERY = DistillConfig(  # so few steps want small ones
    steps=12,
    context=256,
    validation_windows=8,
    lr_codebook=5e-4,
    lr_scale=5e-4,
    lr_norm=5e-4,
    lr_dense=2e-4,
    lr_decoder=1e-4,
    loop=LoopConfig(batch_size=4, eval_every=6, checkpoint_every=6),
)


@dataclass(frozen=True)
class EvalConfig:
    """How a model is measured.

    context: tokens per window of perplexity and divergence. windows: first ones used, None all.
    limit: first documents of each task, None all. batch_tokens: tokens of a batch of task prompts, padding
    counted. max_length: longest prompt of a task with its answer, in tokens.
    """

    context: int = 1024
    windows: int | None = None
    limit: int | None = None
    batch_tokens: int = 1024
    max_length: int = 2048

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field."""
        for name, least in (
            ("context", 2),
            ("windows", 1),
            ("limit", 1),
            ("batch_tokens", 1),
            ("max_length", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value}, wanted at least {least}")


@dataclass(frozen=True)
class LoraTuneConfig:
    """Train a low-rank adapter on a frozen compressed base; defaults are the paper's recipe.

    rank, alpha, dropout, targets: as in PEFT; targets is `all-linear` or names of layers.
    epochs: over the text; steps sets the number of steps instead.
    texts: instruction data (JSON or JSON lines) or plain text; none takes the text that comes with Python.
    context: tokens per window of plain text, and the most that are kept of an instruction with its answer.
    mode: how the base is held, `dense` (fast) or `packed` (small).
    """

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float = 1e-4
    context: int = 512
    texts: tuple[str, ...] = ()
    validation_items: int = 64
    mode: str = "dense"
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(batch_size=16, max_grad_norm=1.0))

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "validation_items"):
            _at_least(name, getattr(self, name), 1)
        _at_least("context", self.context, 2)
        if self.steps is not None:
            _at_least("steps", self.steps, 1)
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: got {self.dropout}, wanted 0 to less than 1")
        _one_of("mode", self.mode, ("dense", "packed"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(self)


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
    """Indices on a trellis, chosen for what layers do to their inputs; bits where they matter."""
    return CompressConfig(
        codec=CodecConfig(trellis_width=12, kmeans_iterations=10, max_sample=1 << 18),
        calibration=CalibrationConfig(),
        decoder_scope="matrix",
        target_bpw=bpw,
    )


def _lookup(bpw: float) -> CompressConfig:
    """Their successor: look-up decoder, every block compressed."""
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
DEFAULT_PRESET = "calibrated-10x"
PLAIN_PRESET = "lookup-8x"  # where calibration is not wanted


def preset(name: str) -> CompressConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].config
