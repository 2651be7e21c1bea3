"""Settings of the codec on tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pocketllm.config.checks import at_least, between, one_of, positive
from pocketllm.errors import ConfigError

_WIDEST, _DEEPEST = 1 << 14, 256  # of networks on subvectors of at most 64 weights


@dataclass(frozen=True)
class CodecConfig:
    """Settings of the codec of one group of matrices: its form, and how it is trained.

    vector_len: Weights per index (d); overridden by `vector_len` of the compression or by the planner.
    hidden: Width of the MLP blocks of encoder and decoder (in the paper: 16); 0 makes each block an affine map.
    depth: Number of MLP blocks (in the paper: 3); 0 omits the networks, so that codewords are weights.
    norm: Norm inside the networks: rln (as published), ln or none.
    decoder: row (as published: norm inside, row context) or lookup (no norm inside, exact table).
    row_scale: Store one scale per matrix row, counted in bpw. Without it all rows of a matrix share one scale.
    init: kmeans (identity networks, k-means codebook) or normal (as published).
    loss: Reconstruction loss: mse or rmse.
    vq_weight: Weight of the codebook loss (lambda in the paper).
    commitment_weight: Weight of the commitment loss; 0 is off.
    epochs: Training passes over the sample.
    learning_rate: Adam learning rate; a cosine schedule follows.
    batch_size: Subvectors per training step.
    kmeans_iterations: Lloyd iterations of the initialization.
    sample_per_codeword: Largest number of subvectors per codeword to fit a codebook and its networks to.
    max_sample: Largest number of subvectors to fit a codebook and its networks to.
    trellis_width: Bits of an index on a trellis, where indices overlap; none for independent indices.
    codebook_source: fit (K fitted codewords); hashed (256 fitted codewords, looked up by a hash of the index, which is
        a trellis window of 9 to 16 bits; several times faster to decode on CPUs with AVX-512 VBMI); or seed (Gaussian
        numbers generated from a seed; no codebook is stored).
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
        one_of("norm", self.norm, ("rln", "ln", "none"))
        one_of("decoder", self.decoder, ("row", "lookup"))
        one_of("init", self.init, ("kmeans", "normal"))
        one_of("loss", self.loss, ("mse", "rmse"))
        one_of("codebook_source", self.codebook_source, ("fit", "hashed", "seed"))
        if self.trellis_width is not None:
            self._check_trellis(self.trellis_width)
        elif self.codebook_source == "seed":
            raise ConfigError(
                "codebook_source='seed' needs a trellis (trellis_width): training would change the codebook, and none "
                "is stored"
            )
        elif self.hashed:
            raise ConfigError(
                "codebook_source='hashed' needs a trellis; set trellis_width, or codebook_source='fit'"
            )
        for name in ("vector_len", "batch_size", "sample_per_codeword", "max_sample"):
            at_least(name, getattr(self, name), 1)
        between("hidden", self.hidden, 0, _WIDEST)
        between("depth", self.depth, 0, _DEEPEST)
        for name in ("epochs", "kmeans_iterations", "vq_weight", "commitment_weight"):
            at_least(name, getattr(self, name), 0)
        positive("learning_rate", self.learning_rate)
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
        if self.hashed and width < 9:
            raise ConfigError(f"trellis_width: got {width}, wanted 9 to 16 with codebook_source='hashed'")
        if self.decoder != "lookup" or not self.row_scale:
            raise ConfigError("trellis_width needs decoder='lookup' and row_scale=True")

    @property
    def hashed(self) -> bool:
        """Whether windows of the trellis look up codewords by a hash."""
        return self.codebook_source == "hashed"

    @property
    def decoder_norm(self) -> str:
        """Norm inside the decoder: none in the look-up form, whose output depends on the codeword alone."""
        return "none" if self.decoder == "lookup" else self.norm

    @property
    def decodes_to_table(self) -> bool:
        """Whether a codeword decodes to the same weights in every row: no norm of full rows inside the decoder."""
        return self.depth < 2 or self.decoder_norm != "rln"

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


@dataclass(frozen=True)
class Safeguards:
    """Safeguards that keep the training of a codec stable; turned off only by studies.

    max_grad_norm: Largest norm of the gradients; infinity turns clipping off.
    revive: Move codewords that were unused in an epoch.
    """

    max_grad_norm: float = 1.0
    revive: bool = True

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm: got {self.max_grad_norm}, wanted more than 0")
