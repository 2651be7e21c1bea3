"""The method on one matrix: fit (training.py), encode, decode; the published form and the default as branches.

    W [rows, columns]  --rotate-->  R1 W R2^T  --row_scale-->  rows of unit RMS  --cut-->  S [rows, n, d]

    published:  z = encoder(S);  index = nearest codeword to z;  S^ = decoder(codebook[index])
    default:    index = best codeword for the layer's inputs (Hessian H) and the gradients at its outputs
                (Hessian G), with error feedback, on a trellis;  S^ = table(decoded_codebook)[index]

    W^ = R1^T (row_scale * join(S^)) R2;   stored: packed indices, row_scale, and, shared, codebook and decoder

Source: arXiv 2511.17637, section "Method". Two forms of decoder:

- `row` (published): RLN inside, so the output of a codeword depends on the row it stands in. Indices are
  the nearest latents, or the codewords whose decoded values in a typical row are nearest, whichever decode
  closer to the row.
- `lookup`: no norm inside, so `decoded_codebook = decoder(codebook)` [K, d] is exact and decoding is a
  table look-up. Indices are chosen by distance to the decoded codewords, the quantity that matters; the
  encoder is needed in training only. (A hashed trellis makes its table from it: hashed_table.py.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketllm.codec import codebook as cb
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import Hessian, IdentityHessian
from pocketllm.codec.index_form import Independent, IndexForm
from pocketllm.codec.metanet import MetaDecoder, MetaEncoder
from pocketllm.codec.normalization import TypicalRow, best_row_scale, divide_rows, row_rms
from pocketllm.codec.reconstruct import reconstruct
from pocketllm.codec.rotation import Seeds, rotate_matrix
from pocketllm.codec.subvectors import cut, join, subvectors_per_row
from pocketllm.config import CodecConfig
from pocketllm.errors import ConfigError, ShapeError

# Weights decoded or encoded at once; bounds the memory in addition to the matrix itself.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class EncodedMatrix:
    """The stored form of one matrix, without its codec.

    stream: [bytes] uint8, the packed indices. row_scale: [rows] bfloat16. columns: weights in a row.
    form: of the indices. rotation: seeds of the rotations of the columns and of the rows, None for none.
    """

    stream: Tensor
    row_scale: Tensor
    columns: int
    form: IndexForm
    rotation: Seeds = (None, None)

    def indices(self, vector_len: int) -> Tensor:
        """[rows, n] int32, n subvectors of `vector_len` weights in a row."""
        return self.form.unpack(
            self.stream, len(self.row_scale), subvectors_per_row(self.columns, vector_len)
        )


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

    def loss(self, subvectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss of whole rows: reconstruction + vq_weight |q - sg[z]|^2 + commitment_weight |sg[q] - z|^2.

        Args:
            subvectors: [rows, n, d] float32, rows already divided by their scale.

        Returns:
            loss, mean square error of the reconstruction, indices [rows * n].
        """
        reconstruction, z, q, indices = self(subvectors)
        error = (reconstruction - subvectors).square().mean()
        loss = error.sqrt() if self.config.loss == "rmse" else error
        loss = loss + self.config.vq_weight * (q - z.detach()).square().mean()
        if self.config.commitment_weight:
            loss = loss + self.config.commitment_weight * (q.detach() - z).square().mean()
        return loss, error, indices

    @torch.no_grad()
    def encode(
        self,
        weight: Tensor,
        hessian: Hessian | None = None,
        outputs: Hessian | None = None,
        *,
        form: IndexForm | None = None,
        rotation: Seeds = (None, None),
        row_importance: Tensor | None = None,
        passes: int = 0,
    ) -> EncodedMatrix:
        """Encode a matrix: rotate it, choose an index for every subvector, fit the row scale, pack.

        Args:
            weight: [rows, columns].
            hessian: H of the layer's inputs; None minimizes the error of the weights alone (published form).
            outputs: G of the loss's gradients at the layer's outputs; None for G = I. With `hessian`.
            form: of the indices; None for independent ones.
            row_importance: [rows] what an error in a row costs. With `hessian`, without `outputs`.
            passes: of coordinate descent. With `hessian`, without `outputs`.

        Raises:
            ConfigError: arguments that exclude each other.
            ShapeError: a Hessian or importance of another size than the matrix.
        """
        form = form or Independent(len(self.codebook))
        _check_encode(self, weight, hessian, outputs, row_importance, passes)
        rotated = rotate_matrix(weight, rotation)
        if hessian is None and not form.chosen_jointly:
            indices, scale = self._choose_for_weights(rotated)
        else:
            hessian = hessian or IdentityHessian(weight.shape[1], weight.device)
            indices, scale = assign(
                rotated,
                hessian.factor(rotation[1], self.config.vector_len),
                form.table(self.decoded_codebook()),
                row_rms(rotated),
                form,
                outputs=None if outputs is None else outputs.factor(rotation[0], 1),
                row_importance=row_importance,
                passes=passes,
            )
        return EncodedMatrix(form.pack(indices), scale.bfloat16(), weight.shape[1], form, rotation)

    def _choose_for_weights(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [rows, n] and row scale [rows] for the least error of the weights, some rows at a time."""
        scale = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
        if self.config.row_scale:
            scale = row_rms(weight).bfloat16()
        table = self.decoded_codebook() if self.is_lookup else None
        indices, scales = [], []
        for rows in _row_chunks(*weight.shape):
            chunk, divisor = weight[rows], scale[rows]
            indices.append(self.choose(cut(divide_rows(chunk, divisor.float()), self.config.vector_len)))
            if self.config.row_scale:  # refitted by least squares to what the indices decode to
                decoded = join(self.decode_unit(indices[-1], table), weight.shape[1])
                divisor = best_row_scale(chunk, decoded).bfloat16()
            scales.append(divisor)
        return torch.cat(indices), torch.cat(scales)

    @torch.no_grad()
    def choose(self, unit: Tensor) -> Tensor:
        """Indices [rows, n] int64 of the nearest codewords, for rows of unit scale [rows, n, d]."""
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
    def decoded_codebook(self) -> Tensor:
        """[K, d] float32: what each codeword decodes to. Exact for the look-up form only."""
        return self.decoder(self.codebook.float()[None])[0]

    @torch.no_grad()
    def decode(
        self,
        encoded: EncodedMatrix,
        dtype: torch.dtype = torch.float32,
        table: Tensor | None = None,
        *,
        rotated: bool = False,
    ) -> Tensor:
        """[rows, columns] from packed indices and row scale, computed in float32, returned in `dtype`.

        Args:
            table: `decoded_codebook()` if the caller already has it (look-up form).
            rotated: return the rotated matrix R1 W R2^T.
        """
        if table is None and self.is_lookup:
            table = self.decoded_codebook()
        indices, scale = encoded.indices(self.config.vector_len), encoded.row_scale.float()
        rotation = (None, None) if rotated else encoded.rotation
        decode = encoded.form.table(table) if table is not None else self._decode_rows
        if rotation != (None, None):
            return reconstruct(indices, decode, scale, encoded.columns, rotation).to(dtype)
        out = torch.empty(len(indices), encoded.columns, dtype=dtype, device=indices.device)
        for rows in _row_chunks(*out.shape):
            out[rows] = reconstruct(indices[rows], decode, scale[rows], encoded.columns, rotation)
        return out

    def _decode_rows(self, indices: Tensor) -> Tensor:
        """The decoder on whole rows, some at a time: [rows, n] -> [rows, n, d]."""
        columns = indices.shape[1] * self.config.vector_len
        parts = [self.decode_unit(indices[rows], None) for rows in _row_chunks(len(indices), columns)]
        return torch.cat(parts)

    def decode_unit(self, indices: Tensor, table: Tensor | None) -> Tensor:
        """[rows, n] indices -> [rows, n, d] decoded subvectors before scaling."""
        return table[indices] if table is not None else self.decoder(self.codebook.float()[indices])


def _row_chunks(rows: int, columns: int) -> list[slice]:
    """Runs of rows of about `_CHUNK_WEIGHTS` weights."""
    step = max(1, _CHUNK_WEIGHTS // columns)
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _row_error(one: Tensor, other: Tensor) -> Tensor:
    """[rows] squared distance of rows [rows, n, d]."""
    return (one - other).square().sum(dim=(1, 2))


def _check_encode(
    codec: MatrixCodec,
    weight: Tensor,
    hessian: Hessian | None,
    outputs: Hessian | None,
    row_importance: Tensor | None,
    passes: int,
) -> None:
    rows, columns = weight.shape
    if hessian is None and (outputs is not None or row_importance is not None or passes):
        raise ConfigError("encode: outputs, row_importance and passes need a Hessian of the inputs; give one")
    if outputs is not None and (row_importance is not None or passes):
        raise ConfigError("encode: outputs exclude row_importance and passes; leave them out")
    if hessian is not None and not codec.is_lookup:
        raise ConfigError(
            "encode: a Hessian needs decoder='lookup', got decoder='row'; leave the Hessian out"
        )
    for name, got, wanted in (
        ("hessian", None if hessian is None else hessian.matrix.shape, (columns, columns)),
        ("outputs", None if outputs is None else outputs.matrix.shape, (rows, rows)),
        ("row_importance", None if row_importance is None else row_importance.shape, (rows,)),
    ):
        if got is not None and tuple(got) != wanted:
            raise ShapeError(f"encode: got {name} of shape {tuple(got)}, wanted {wanted} for this matrix")
