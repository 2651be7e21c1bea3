"""The tensors of a compressed model in memory: codebooks, decoders, and one `PackedMatrix` for each parameter.

Codebooks and decoders live once in a `Store` on the model; packed matrices hold references to it that are not
registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.hashed_table import int8_entries
from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.codec.kernels.packed_weight import form_weight
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.metanet import MetaDecoder
from pocketllm.codec.subvectors import subvectors_per_row, unfold
from pocketllm.config import CodecConfig
from pocketllm.format.layout import CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.torch_state import default_torch_state, in_default_torch_state, one_thread

PACKED = "packed_"
"""Prefix under which a module registers the packed matrix of a parameter."""
TIED = "_packed_tied"
"""Attribute that holds references to other modules' by parameter; transformers' `_tied_weights_keys` is of classes."""
_CODEWORDS = 1 << 16
"""Codewords that are decoded at a time, as a group."""
_FEW_GROUPS = 4
"""Groups up to which one thread is faster, since others hash files meanwhile."""


class _FixedDtype(nn.Module):
    """A module whose buffers keep their dtype when the model is cast; `float_dtype` follows the cast."""

    float_dtype: torch.dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        example = fn(torch.empty(0, dtype=self.float_dtype, device=self._device()))
        self.float_dtype = example.dtype
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                # A float that was cast on the way has lost bits: take the original to the new device.
                self._buffers[name] = moved if moved.dtype == dtypes[name] else buffer.to(moved.device)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self

    def _device(self) -> torch.device:
        return next((b.device for b in self._buffers.values() if b is not None), torch.device("cpu"))


def _unfilled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values, to be replaced by that of a file."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Codebook(_FixedDtype):
    """One codebook, float16 [K, d], in the buffer `weight`; not stored if it is drawn from a seed."""

    weight: Tensor

    def __init__(self, entry: CodebookEntry) -> None:
        super().__init__()
        self.entry = entry
        if entry.seed is None:
            self.register_buffer("weight", _unfilled((entry.size, entry.vector_len), torch.float16))

    def value(self) -> Tensor:
        """[K, d] float16."""
        if self.entry.seed is None:
            return self.weight
        return seeded_codebook(self.entry.size, self.entry.vector_len, self.entry.seed)


class Decoder(_FixedDtype):
    """One decoder, float16 `up` and `down` in the shapes of `CodecConfig.network_shapes`."""

    up: Tensor
    down: Tensor

    def __init__(self, entry: DecoderEntry) -> None:
        super().__init__()
        self.entry = entry
        up, down = entry.codec.network_shapes
        self.register_buffer("up", _unfilled(up, torch.float16))
        self.register_buffer("down", _unfilled(down, torch.float16))


class Store(nn.Module):
    """All codebooks and decoders of a model, and the codecs made of them."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.codebooks = nn.ModuleList(Codebook(entry) for entry in layout.codebooks)
        self.decoders = nn.ModuleList(Decoder(entry) for entry in layout.decoders)
        self._codecs: dict[tuple[int, int, torch.device], tuple[MatrixCodec, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codecs": {}}  # made anew where they are needed

    @torch.no_grad()
    def codec(self, codebook: int, decoder: int, device: torch.device) -> tuple[MatrixCodec, Tensor | None]:
        """A codec for decoding on a device, with its decoded codebook in the look-up form; cached."""
        key = (codebook, decoder, device)
        if key not in self._codecs:
            weights, net = self._codebook(codebook), self._decoder(decoder)
            shared = nn.Parameter(weights.value().float(), requires_grad=False)
            made = MatrixCodec(net.entry.codec, shared)
            made.decoder.set_weights(net.up, net.down)
            made = made.to(device)
            self._codecs[key] = made, (made.decoded_codebook() if made.is_lookup else None)
        return self._codecs[key]

    @torch.no_grad()
    def tables(self, uses: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """What decoders in the look-up form make of codebooks, without codecs of their own.

        Args:
            uses: (codebook, decoder) of each.

        Returns:
            [K, d] float32 each, of hashed codebooks int8 [d, K]. Networks of one shape are computed together, which
            takes a fraction of the time.
        """
        groups = list(self._same_shapes(dict.fromkeys(uses)))
        found: dict[tuple[int, int], Tensor] = {}
        with one_thread() if len(groups) <= _FEW_GROUPS else nullcontext():
            for group in groups:
                found.update(zip(group, self._tables_of(group, device), strict=True))
        return [found[use] for use in uses]

    def _tables_of(self, group: list[tuple[int, int]], device: torch.device) -> Tensor:
        """`tables` of uses whose networks have one shape, stacked."""
        codec = self._decoder(group[0][1]).entry.codec
        net = MetaDecoder(codec.vector_len, codec.hidden, codec.depth, codec.decoder_norm)
        decoders = [self._decoder(decoder) for _, decoder in group]
        up, down = (
            torch.stack(parts).to(device) for parts in zip(*((d.up, d.down) for d in decoders), strict=True)
        )
        net.use_weights(up, down)
        values = torch.stack([self._codebook(codebook).value() for codebook, _ in group])
        decoded: Tensor = net(values.to(device).float())
        return int8_entries(decoded) if self._codebook(group[0][0]).entry.window else decoded

    def _same_shapes(self, uses: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Uses whose networks have one shape, at most `_CODEWORDS` codewords in all."""
        groups: dict[tuple[CodecConfig, int, int], list[tuple[int, int]]] = {}
        for codebook, decoder in uses:
            entry = self._codebook(codebook).entry
            key = self._decoder(decoder).entry.codec, entry.size, entry.window
            groups.setdefault(key, []).append((codebook, decoder))
        for (_, size, _), group in groups.items():
            step = max(1, _CODEWORDS // size)
            for begin in range(0, len(group), step):
                yield group[begin : begin + step]

    def _codebook(self, number: int) -> Codebook:
        found = self.codebooks[number]
        assert isinstance(found, Codebook)
        return found

    def _decoder(self, number: int) -> Decoder:
        found = self.decoders[number]
        assert isinstance(found, Decoder)
        return found


class PackedMatrix(_FixedDtype):
    """One encoded parameter: `indices` uint8 (packed) and `row_scale` bfloat16 [rows].

    Calling it decodes: the parameter's shape, in the dtype the model computes in.
    """

    indices: Tensor

    def __init__(self, entry: MatrixEntry, store: Store, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.entry = entry
        self.float_dtype = float_dtype
        codebook = store.codebooks[entry.codebook].entry
        assert isinstance(codebook, CodebookEntry)
        self.form = entry.form(codebook)
        self.per_row = subvectors_per_row(entry.columns, codebook.vector_len)
        nbytes = self.form.nbytes(entry.rows, self.per_row)
        self.register_buffer("indices", _unfilled((nbytes,), torch.uint8))
        decoder = store.decoders[entry.decoder].entry
        assert isinstance(decoder, DecoderEntry)
        self.is_lookup = decoder.codec.decodes_to_table  # else values depend on the row
        if decoder.codec.row_scale:
            self.register_buffer("row_scale", _unfilled((entry.rows,), torch.bfloat16))
        self._product: PackedProduct | None = None
        self._made_of: tuple[Tensor | None, Tensor | None] = (None, None)  # tensors of the product
        self._store = [store]  # a list hides it from nn.Module: shared, so it must not be registered

    def unpacked(self) -> Tensor:
        """[rows, n] int32 indices; on a hashed trellis, windows."""
        return self.form.unpack(self.indices, self.entry.rows, self.per_row)

    def expert_rows(self, expert: int) -> range:
        """Rows of the stored matrix that hold one of several fused experts."""
        count = self.entry.rows // self.entry.shape[0]
        return range(expert * count, (expert + 1) * count)

    def __getstate__(
        self,
    ) -> dict[str, Any]:  # a product holds addresses, and is made again where it is needed
        return {**self.__dict__, "_product": None, "_made_of": (None, None)}

    def product(self) -> PackedProduct | None:
        """Products straight from the stream; None if the decoder has row statistics or tensors are offloaded."""
        if not self._has_product():
            self._product = None
            make_products([self])
            self._made_of = self._buffers["indices"], self._buffers.get("row_scale")
        return self._product

    def _has_product(self) -> bool:
        """Whether `product` has been made of the tensors that are there."""
        stream, scale = self._made_of
        return stream is self._buffers["indices"] and scale is self._buffers.get("row_scale")

    def _make_product(self, table: Tensor) -> None:
        """Make the product from one of `Store.tables`."""
        entry, stream, scale = self.entry, self.indices, self._buffers.get("row_scale")
        self._made_of = stream, scale
        scale = torch.ones(entry.rows, device=stream.device) if scale is None else scale.float()
        weight = form_weight(stream, self.form, table, scale, entry.columns)
        self._product = PackedProduct(weight.rotated(entry.rotation))

    def forward(self) -> Tensor:
        if torch.compiler.is_exporting():
            from pocketllm.runtime.decode_op import decode

            return decode(self)
        with default_torch_state(), torch.no_grad():
            return self._decoded()

    def _decoded(self) -> Tensor:
        scale = self._buffers.get("row_scale")
        if scale is None:
            scale = torch.ones(self.entry.rows, dtype=torch.bfloat16, device=self.indices.device)
        store = self._store[0]
        codec, decoded = store.codec(self.entry.codebook, self.entry.decoder, self.indices.device)
        encoded = EncodedMatrix(self.indices, scale, self.entry.columns, self.form, self.entry.rotation)
        return unfold(codec.decode(encoded, self.float_dtype, decoded), self.entry)


@in_default_torch_state
@torch.no_grad()
def make_products(
    matrices: Iterable[PackedMatrix], on_made: Callable[[PackedMatrix], None] = lambda matrix: None
) -> None:
    """Make the products of all matrices that can have one, in less time than one by one.

    on_made: called with each of these matrices when its product is there.
    """
    groups: dict[tuple[int, torch.device], list[PackedMatrix]] = {}
    for matrix in matrices:
        if matrix.is_lookup and not matrix.indices.is_meta and not matrix._has_product():
            groups.setdefault((id(matrix._store[0]), matrix.indices.device), []).append(matrix)
    for (_, device), group in groups.items():
        uses = [(matrix.entry.codebook, matrix.entry.decoder) for matrix in group]
        for matrix, table in zip(group, group[0]._store[0].tables(uses, device), strict=True):
            matrix._make_product(table)
            on_made(matrix)
