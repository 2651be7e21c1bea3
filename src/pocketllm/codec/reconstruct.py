"""Reconstruct weights from their stored form: W = R1^T (s * U) R2.

U [rows, columns] holds the decoded indices without padding: table[indices] in the look-up form, the decoder
applied to full rows of codewords in the row form. s is the row scale, R1 and R2 rotate columns and
rows. `reconstruct` serves decoding at load, packed running and training.

With G = dL/dW the gradients pass through the transpose of each step, and only the indices have to be kept between
forward and backward pass:

    G' = R1 G R2^T,   dL/ds_r = <G'_r, U_r>,   dL/dtable_k = sum of s_r G'_(r, j) where index (r, j) is k

`rotate_matrix` is the transpose of `unrotate_matrix`. The row form has row statistics inside its decoder; its
gradients are taken by autograd on one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from pocketllm.codec.kernels import select
from pocketllm.codec.metanet import MetaDecoder
from pocketllm.codec.rotation import Seeds, rotate_matrix, unrotate_matrix
from pocketllm.codec.subvectors import join
from pocketllm.config import CodecConfig

Decode = Tensor | Callable[[Tensor], Tensor]
"""What turns indices into subvectors: the table [K, d] of the look-up form, or [rows, n] indices -> [rows, n, d]."""


def reconstruct(indices: Tensor, decode: Decode, scale: Tensor, columns: int, rotation: Seeds) -> Tensor:
    """W [rows, columns] float32.

    Args:
        indices: [rows, n] integer. scale: [rows] float32. columns: weights in a row.
        rotation: seeds of the rotations of the columns and of the rows.
    """
    if isinstance(decode, Tensor):
        weight = select.gather(decode, indices, scale, columns)
    else:
        weight = join(decode(indices.long()), columns) * scale[:, None]
    return weight if rotation == (None, None) else _Unrotate.apply(weight, rotation)


@torch.no_grad()
def reconstruct_gradients(
    grad: Tensor, indices: Tensor, table: Tensor, scale: Tensor, rotation: Seeds
) -> tuple[Tensor, Tensor]:
    """Gradients of table [K, d] and scale [rows] of the look-up form, given that of W [rows, columns]."""
    return select.scatter(table, indices, scale, rotate_matrix(grad, rotation))


class Lookup(torch.autograd.Function):
    """`reconstruct` of the look-up form with gradients of table and scale; keeps nothing dense."""

    @staticmethod
    def forward(ctx, indices, table, scale, columns, rotation):  # type: ignore[no-untyped-def]
        ctx.rotation = rotation
        ctx.save_for_backward(indices, table, scale)
        return reconstruct(indices, table, scale, columns, rotation)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        indices, table, scale = ctx.saved_tensors
        table_grad, scale_grad = reconstruct_gradients(grad, indices, table, scale, ctx.rotation)
        return None, table_grad, scale_grad, None, None


class _Unrotate(torch.autograd.Function):
    """`unrotate_matrix`, whose transpose is `rotate_matrix`."""

    @staticmethod
    def forward(ctx, weight, rotation):  # type: ignore[no-untyped-def]
        ctx.rotation = rotation
        return unrotate_matrix(weight, rotation)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return rotate_matrix(grad, ctx.rotation), None


def decoder_output(codec: CodecConfig, codewords: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The decoder with given weights, differentiable in all of them.

    Args:
        codewords: [rows, n, d] float32. up, down: in the shapes of `CodecConfig.network_shapes`.
    """
    net = MetaDecoder(codec.vector_len, codec.hidden, codec.depth, codec.decoder_norm)
    weights = {f"blocks.{n}.up": up[n] for n in range(len(up))}
    weights |= {f"blocks.{n}.down": down[n] for n in range(len(down))}
    return functional_call(net, weights, (codewords,))


def row_decoder(codec: CodecConfig, codebook: Tensor, up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
    """`Decode` of the row form, differentiable in the codebook [K, d] and the decoder's weights."""
    return lambda indices: decoder_output(codec, codebook[indices], up, down)


def decoded_table(codec: CodecConfig, codebook: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`decoded_codebook` [K, d] of the look-up form, differentiable in codebook and decoder."""
    return decoder_output(codec, codebook[None], up, down)[0]


def decoded_tables(codec: CodecConfig, codebooks: Tensor, ups: Tensor, downs: Tensor) -> Tensor:
    """`decoded_table` of many, [G, K, d], in as few operations as for one; each argument has a leading dimension G."""
    return torch.func.vmap(partial(decoded_table, codec))(codebooks, ups, downs)
