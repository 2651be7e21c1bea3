"""Meta-encoder and meta-decoder: small residual MLPs between weight space and latent space.

Source: arXiv 2511.17637, section "Method". Blocks are d -> hidden -> d with GELU and no biases.
Encoder: the first block plain, the others pre-norm residual, a final norm; its output is z.
Decoder: the mirror image, residual blocks first, ending in a plain block. With norm `rln` both see whole
rows, so both take and return [rows, n, d]. With hidden 0 every block is an affine map; with depth 0 a network
is the identity, without a final norm. Both serve to measure the benefit of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketllm.codec.normalization import NORMS, Norm


class MLPBlock(nn.Module):
    """x -> GELU(x A) B with A [d, hidden], B [hidden, d]."""

    def __init__(self, vector_len: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(vector_len, hidden))
        self.down = nn.Parameter(torch.empty(hidden, vector_len))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x @ self.up) @ self.down

    def init_random(self, generator: torch.Generator) -> None:
        """He-like normal initialization for training from scratch."""
        d, hidden = self.up.shape
        with torch.no_grad():
            self.up.normal_(0.0, (2.0 / d) ** 0.5, generator=generator)
            self.down.normal_(0.0, (1.0 / hidden) ** 0.5, generator=generator)

    def init_identity(self, generator: torch.Generator) -> None:
        """Exactly the identity, since GELU(x) - GELU(-x) = x. Needs hidden >= 2 d."""
        d = self.up.shape[0]
        self.init_random(generator)
        with torch.no_grad():
            eye = torch.eye(d)
            self.up[:, : 2 * d] = torch.cat([eye, -eye], dim=1)
            self.down.zero_()
            self.down[: 2 * d] = torch.cat([eye, -eye], dim=0)

    def init_zero(self, generator: torch.Generator) -> None:
        """A residual branch that adds nothing yet but can learn: A random, B zero."""
        self.init_random(generator)
        with torch.no_grad():
            self.down.zero_()


class AffineBlock(nn.Module):
    """x -> x A + b with A [d, d] in `up` and b [1, d] in `down`."""

    def __init__(self, vector_len: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(vector_len, vector_len))
        self.down = nn.Parameter(torch.empty(1, vector_len))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up + self.down

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Random initialization that keeps the scale of the input."""
        self.up.normal_(0.0, self.up.shape[0] ** -0.5, generator=generator)
        self.down.zero_()

    @torch.no_grad()
    def init_identity(self, generator: torch.Generator) -> None:
        """Exactly the identity."""
        self.up.copy_(torch.eye(self.up.shape[0]))
        self.down.zero_()

    @torch.no_grad()
    def init_zero(self, generator: torch.Generator) -> None:
        """A residual branch that adds nothing yet but can learn."""
        self.up.zero_()
        self.down.zero_()


class _MetaNet(nn.Module):
    """`depth` blocks, one of them plain; `start` says how they begin (`identity` or `random`)."""

    plain: int  # index of the plain block, set by the subclass

    def __init__(self, vector_len: int, hidden: int, depth: int, norm: str) -> None:
        super().__init__()
        made = (MLPBlock(vector_len, hidden) if hidden else AffineBlock(vector_len) for _ in range(depth))
        self.blocks = nn.ModuleList(made)
        self.empty = torch.empty(0, vector_len, hidden or vector_len), torch.empty(0, hidden or 1, vector_len)
        self.norm = norm

    def reset(self, start: str, generator: torch.Generator) -> None:
        """Initialize in place. `identity`: the whole network computes x -> x (up to a final norm)."""
        for number, block in enumerate(self.blocks):
            assert isinstance(block, MLPBlock | AffineBlock)
            if start == "random":
                block.init_random(generator)
            elif number == self.plain % len(self.blocks):
                block.init_identity(generator)
            else:
                block.init_zero(generator)

    def weights(self) -> tuple[Tensor, Tensor]:
        """All blocks in two tensors, in the shapes of `CodecConfig.network_shapes`."""
        if not len(self.blocks):
            return self.empty
        state = self.state_dict()
        count = range(len(self.blocks))
        return (
            torch.stack([state[f"blocks.{n}.up"] for n in count]),
            torch.stack([state[f"blocks.{n}.down"] for n in count]),
        )

    def set_weights(self, up: Tensor, down: Tensor) -> None:
        """Inverse of `weights`; computes in float32 whatever was stored."""
        with torch.no_grad():
            for block, upper, lower in zip(self.blocks, up, down, strict=True):
                assert isinstance(block, MLPBlock | AffineBlock)
                assert block.up.shape == upper.shape and block.down.shape == lower.shape
                block.up.copy_(upper)
                block.down.copy_(lower)

    def use_weights(self, up: Tensor, down: Tensor) -> None:
        """Stand for several networks at once, which take and return [networks, n, d].

        Args:
            up, down: `weights` of each, stacked: [networks, depth, ...].
        """
        for number, block in enumerate(self.blocks):
            for name, stacked in (("up", up), ("down", down)):
                setattr(block, name, nn.Parameter(stacked[:, number].float(), requires_grad=False))


class MetaEncoder(_MetaNet):
    """Weights of full rows [rows, n, d] -> latents z [rows, n, d]."""

    plain = 0

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.blocks):
            return x
        normalize = NORMS[self.norm]
        x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = x + block(normalize(x))
        return normalize(x)


class MetaDecoder(_MetaNet):
    """Codewords of full rows [rows, n, d] -> weights of those rows [rows, n, d]."""

    plain = -1

    def forward(self, q: Tensor, normalize: Norm | None = None) -> Tensor:
        """normalize: replaces the norm, to record row statistics or to replay them."""
        if not len(self.blocks):
            return q
        normalize = normalize or NORMS[self.norm]
        for block in list(self.blocks)[:-1]:
            q = q + block(normalize(q))
        return self.blocks[-1](q)
