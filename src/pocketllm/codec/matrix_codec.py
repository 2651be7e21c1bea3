"""The method on one matrix: fit, encode, decode.

    W [rows, columns]  --row_scale-->  rows of unit RMS  --cut-->  S [rows, n, d]
    z = encoder(S);  index = nearest codeword to z;  S^ = decoder(codebook[index])
    W^ = row_scale * join(S^)

Source: arXiv 2511.17637, section "Method". Two forms of decoder:

- `row` (published): RLN inside, so the output of a codeword depends on the row it stands in. Indices are
  the nearest latents, or the nearest of what codewords decode to in a typical row, whichever decodes closer
  to the row.
- `lookup`: no norm inside, so `decoded_codebook = decoder(codebook)` [K, d] is exact and decoding is a
  table look-up. Indices are chosen by distance to the decoded codewords, which is the quantity that counts;
  the encoder is needed in training only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketllm.codec import codebook as cb
from pocketllm.codec.metanet import MetaDecoder, MetaEncoder
from pocketllm.codec.normalization import TypicalRow, best_row_scale, divide_rows, row_rms
from pocketllm.codec.subvectors import cut, join
from pocketllm.config import CodecConfig

# Weights decoded or encoded at once; bounds the memory beside the matrix itself.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class EncodedMatrix:
    """What is stored of one matrix, beside its codec.

    indices: [rows, n] int64 in [0, K). row_scale: [rows] bfloat16. columns: weights in a row.
    """

    indices: Tensor
    row_scale: Tensor
    columns: int


class MatrixCodec(nn.Module):
    """Encoder, codebook and decoder. The codebook parameter may be shared with other codecs.

    Args:
        config: sizes and forms.
        codebook: [K, d] parameter; K is read from it.
    """

    def __init__(self, config: CodecConfig, codebook: nn.Parameter) -> None:
        super().__init__()
        d = config.vector_len
        self.config = config
        self.codebook = codebook
        self.encoder = MetaEncoder(d, config.hidden, config.depth, config.norm)
        self.decoder = MetaDecoder(d, config.hidden, config.depth, config.decoder_norm)

    @property
    def is_lookup(self) -> bool:
        return self.config.decoder == "lookup"

    def forward(self, subvectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One training pass over whole rows.

        Args:
            subvectors: [rows, n, d] float32, rows already divided by their scale.

        Returns:
            reconstruction [rows, n, d], latents z and their codewords q [rows, n, d], indices [rows * n].
        """
        z = self.encoder(subvectors)
        indices = cb.nearest(z.reshape(-1, z.shape[-1]), self.codebook)
        q = self.codebook[indices].reshape(z.shape)
        return self.decoder(cb.straight_through(z, q)), z, q, indices

    @torch.no_grad()
    def decoded_codebook(self) -> Tensor:
        """[K, d] float32: what each codeword decodes to. Exact for the look-up form only."""
        return self.decoder(self.codebook.float()[None])[0]

    @torch.no_grad()
    def choose(self, unit: Tensor) -> Tensor:
        """Indices [rows, n] int64 for rows of unit scale [rows, n, d]."""
        if self.is_lookup:
            return self._nearest(unit, self.decoded_codebook())
        by_latent = self._nearest(self.encoder(unit), self.codebook)
        if self.config.norm == "rln":
            typical = TypicalRow()
            self.decoder(self.codebook.float()[by_latent], typical.record)
            table = self.decoder(self.codebook.float()[None], typical.replay)[0]
        else:
            table = self.decoded_codebook()
        by_output = self._nearest(unit, table)
        errors = [_row_error(unit, self.decode_unit(found, None)) for found in (by_latent, by_output)]
        closer = errors[1] < errors[0]
        return torch.where(closer[:, None], by_output, by_latent)

    def _nearest(self, x: Tensor, targets: Tensor) -> Tensor:
        return cb.nearest(x.reshape(-1, x.shape[-1]), targets).reshape(x.shape[:2])

    @torch.no_grad()
    def encode(self, weight: Tensor) -> EncodedMatrix:
        """Code a matrix [rows, columns]; the row scale is refitted by least squares afterwards."""
        first_scale = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
        if self.config.row_scale:
            first_scale = row_rms(weight).bfloat16()
        table = self.decoded_codebook() if self.is_lookup else None
        indices, scales = [], []
        step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
        for chunk, scale in zip(weight.split(step), first_scale.split(step), strict=True):
            indices.append(self.choose(cut(divide_rows(chunk, scale.float()), self.config.vector_len)))
            if self.config.row_scale:
                decoded = join(self.decode_unit(indices[-1], table), weight.shape[1])
                scale = best_row_scale(chunk, decoded).bfloat16()
            scales.append(scale)
        return EncodedMatrix(torch.cat(indices), torch.cat(scales), weight.shape[1])

    @torch.no_grad()
    def decode(
        self, encoded: EncodedMatrix, dtype: torch.dtype = torch.float32, table: Tensor | None = None
    ) -> Tensor:
        """[rows, columns] from indices and row scale, computed in float32, returned in `dtype`.

        table: `decoded_codebook()` if the caller has it already (look-up form).
        """
        if table is None and self.is_lookup:
            table = self.decoded_codebook()
        out = torch.empty(
            (encoded.indices.shape[0], encoded.columns), dtype=dtype, device=encoded.indices.device
        )
        step = max(1, _CHUNK_WEIGHTS // encoded.columns)
        for begin in range(0, out.shape[0], step):
            rows = slice(begin, begin + step)
            unit = join(self.decode_unit(encoded.indices[rows], table), encoded.columns)
            out[rows] = unit * encoded.row_scale[rows].float()[:, None]
        return out

    def decode_unit(self, indices: Tensor, table: Tensor | None) -> Tensor:
        """[rows, n] indices -> [rows, n, d] decoded subvectors before scaling."""
        return table[indices] if table is not None else self.decoder(self.codebook.float()[indices])


def _row_error(one: Tensor, other: Tensor) -> Tensor:
    """[rows] squared distance of rows [rows, n, d]."""
    return (one - other).square().sum(dim=(1, 2))
