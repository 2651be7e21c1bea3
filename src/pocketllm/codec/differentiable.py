"""Decode a matrix with gradients, holding no dense matrix between forward and backward.

    W = R1^T (s * U) R2,   U = table[indices], cut to the row          (look-up form)

With G = dL/dW the gradients come back through the transpose of each step:

    G' = R1 G R2^T,   dL/ds_r = <G'_r, U_r>,   dL/dtable_k = sum of s_r G'_(r, j) where index (r, j) is k

`rotate_matrix` is the transpose of `unrotate_matrix`, so nothing but the indices has to be kept. The row form
has row statistics inside its decoder; its gradients are taken by autograd on one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

from pocketllm.codec import compiled
from pocketllm.codec.metanet import MetaDecoder
from pocketllm.codec.rotation import Seeds, rotate_matrix, unrotate_matrix
from pocketllm.codec.subvectors import cut, join
from pocketllm.config import CodecConfig


def decoder_output(codec: CodecConfig, codewords: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The decoder with given weights, differentiable in all of them.

    Args:
        codewords: [rows, n, d] float32. up, down: in the shapes of `CodecConfig.network_shapes`.
    """
    net = MetaDecoder(codec.vector_len, codec.hidden, codec.depth, codec.decoder_norm)
    weights = {f"blocks.{n}.up": up[n] for n in range(len(up))}
    weights |= {f"blocks.{n}.down": down[n] for n in range(len(down))}
    return functional_call(net, weights, (codewords,))


def decoded_table(codec: CodecConfig, codebook: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`decoded_codebook` [K, d] of the look-up form, differentiable in codebook and decoder."""
    return decoder_output(codec, codebook[None], up, down)[0]


def decoded_tables(codec: CodecConfig, codebooks: Tensor, ups: Tensor, downs: Tensor) -> Tensor:
    """`decoded_table` of many, [G, K, d], in as few operations as of one; each argument has G in front."""
    return torch.func.vmap(partial(decoded_table, codec))(codebooks, ups, downs)


@torch.no_grad()
def lookup(indices: Tensor, table: Tensor, scale: Tensor, columns: int, rotation: Seeds) -> Tensor:
    """W [rows, columns] float32 of the look-up form.

    Args:
        indices: [rows, n] int32. table: [K, d] float32. scale: [rows] float32.
    """
    if compiled.decodes(table, scale):
        return unrotate_matrix(compiled.gather(table, indices, scale, columns), rotation)
    unit = table[indices.long()] * scale[:, None, None]
    return unrotate_matrix(join(unit, columns), rotation)


@torch.no_grad()
def lookup_gradients(
    grad: Tensor, indices: Tensor, table: Tensor, scale: Tensor, rotation: Seeds
) -> tuple[Tensor, Tensor]:
    """Gradients of table [K, d] and scale [rows], given that of W [rows, columns]."""
    grad = rotate_matrix(grad, rotation)
    if compiled.decodes(table, scale, grad):
        return compiled.scatter(table, indices, scale, grad)
    pieces = cut(grad, table.shape[1])
    flat = indices.long().reshape(-1)
    scale_grad = (pieces * table[indices.long()]).sum(dim=(1, 2))
    scaled = (pieces * scale[:, None, None]).reshape(-1, table.shape[1])
    return torch.zeros_like(table).index_add_(0, flat, scaled), scale_grad


def row_form(
    codec: CodecConfig,
    indices: Tensor,
    shared: Sequence[Tensor],
    scale: Tensor,
    columns: int,
    rotation: Seeds,
) -> Tensor:
    """W [rows, columns] float32 of the row form; autograd goes through it.

    Args:
        shared: codebook [K, d], up, down.
    """
    codebook, up, down = shared
    unit = join(decoder_output(codec, codebook[indices.long()], up, down), columns)
    return _Unrotate.apply(unit * scale[:, None], rotation)


class _Unrotate(torch.autograd.Function):
    """`unrotate_matrix`, whose transpose is `rotate_matrix`."""

    @staticmethod
    def forward(ctx, weight, rotation):  # type: ignore[no-untyped-def]
        ctx.rotation = rotation
        return unrotate_matrix(weight, rotation)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return rotate_matrix(grad, ctx.rotation), None


class Lookup(torch.autograd.Function):
    """`lookup` with gradients of table and scale; keeps nothing dense."""

    @staticmethod
    def forward(ctx, indices, table, scale, columns, rotation):  # type: ignore[no-untyped-def]
        ctx.rotation = rotation
        ctx.save_for_backward(indices, table, scale)
        return lookup(indices, table, scale, columns, rotation)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        indices, table, scale = ctx.saved_tensors
        table_grad, scale_grad = lookup_gradients(grad, indices, table, scale, ctx.rotation)
        return None, table_grad, scale_grad, None, None
