"""Compressed layers: the model's own modules with a weight that is decoded instead of stored.

Any module works, whatever its forward does with the weight: the parameter is replaced by a `PackedMatrix`
(registered under the parameter's name, so tensors are called `NAME.indices`, `NAME.row_scale`) and the
module's class by a subclass in which that name is a property that decodes. Codebooks and decoders live once
in a `Store` on the model; layers hold references to it that are not registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import select
from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.codec.kernels.packed_weight import packed_weight
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.subvectors import subvectors_per_row, unfold
from pocketllm.format.layout import STORE, CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.runtime.packed_forward import has_packed_forward, packed_bases


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
                # A float that was cast has lost bits: move the original to the new device.
                self._buffers[name] = moved if moved.dtype == dtypes[name] else buffer.to(moved.device)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self

    def _device(self) -> torch.device:
        return next((b.device for b in self._buffers.values() if b is not None), torch.device("cpu"))


class Codebook(_FixedDtype):
    """One codebook, float16 [K, d], in the buffer `weight`; not stored if it is generated from a seed."""

    weight: Tensor

    def __init__(self, entry: CodebookEntry) -> None:
        super().__init__()
        self.entry = entry
        if entry.seed is None:
            self.register_buffer("weight", torch.empty(entry.size, entry.vector_len, dtype=torch.float16))

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
        self.register_buffer("up", torch.empty(up, dtype=torch.float16))
        self.register_buffer("down", torch.empty(down, dtype=torch.float16))


class Store(nn.Module):
    """All codebooks and decoders of a model, and the codecs made of them."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.codebooks = nn.ModuleList(Codebook(entry) for entry in layout.codebooks)
        self.decoders = nn.ModuleList(Decoder(entry) for entry in layout.decoders)
        self._codecs: dict[tuple[int, int, torch.device], tuple[MatrixCodec, Tensor | None]] = {}

    @torch.no_grad()
    def codec(self, codebook: int, decoder: int, device: torch.device) -> tuple[MatrixCodec, Tensor | None]:
        """A codec for decoding on a device, with its table where the look-up form has one; cached."""
        key = (codebook, decoder, device)
        if key not in self._codecs:
            weights, net = self.codebooks[codebook], self.decoders[decoder]
            assert isinstance(weights, Codebook) and isinstance(net, Decoder)
            shared = nn.Parameter(weights.value().float(), requires_grad=False)
            made = MatrixCodec(net.entry.codec, shared)
            made.decoder.set_weights(net.up, net.down)
            made = made.to(device)
            self._codecs[key] = made, (made.decoded_codebook() if made.is_lookup else None)
        return self._codecs[key]


class PackedMatrix(_FixedDtype):
    """One encoded parameter: `indices` uint8 (packed) and `row_scale` bfloat16 [rows].

    Calling it returns the decoded parameter in the dtype in which the model computes.
    """

    indices: Tensor

    def __init__(self, entry: MatrixEntry, store: Store, float_dtype: torch.dtype) -> None:
        super().__init__()
        self.entry = entry
        self.float_dtype = float_dtype
        codebook = store.codebooks[entry.codebook].entry
        assert isinstance(codebook, CodebookEntry)
        self.form = entry.form(codebook.size)
        self.per_row = subvectors_per_row(entry.columns, codebook.vector_len)
        nbytes = self.form.nbytes(entry.rows, self.per_row)
        self.register_buffer("indices", torch.empty(nbytes, dtype=torch.uint8))
        decoder = store.decoders[entry.decoder].entry
        assert isinstance(decoder, DecoderEntry)
        if decoder.codec.row_scale:
            self.register_buffer("row_scale", torch.empty(entry.rows, dtype=torch.bfloat16))
        self._product: PackedProduct | None = None
        self._made_of: tuple[Tensor | None, Tensor | None] = (None, None)  # tensors of the product
        self._store = [store]  # a list hides it from nn.Module: shared, so it must not be registered

    def unpacked(self) -> Tensor:
        """[rows, n] int32 indices."""
        return self.form.unpack(self.indices, self.entry.rows, self.per_row)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_product": None,
            "_made_of": (None, None),
        }  # it holds addresses, and is made again where it is needed

    def product(self) -> PackedProduct | None:
        """Products straight from the stream; None where the decoder has row statistics or tensors are offloaded."""
        stream, scale = self._buffers["indices"], self._buffers.get("row_scale")
        if self._made_of[0] is not stream or self._made_of[1] is not scale:
            self._product, self._made_of = self._made_product(), (stream, scale)
        return self._product

    @torch.no_grad()
    def _made_product(self) -> PackedProduct | None:
        stream = self.indices
        if stream.is_meta:
            return None
        table = self._store[0].codec(self.entry.codebook, self.entry.decoder, stream.device)[1]
        if table is None:
            return None
        scale = self._buffers.get("row_scale")
        scale = torch.ones(self.entry.rows, device=stream.device) if scale is None else scale.float()
        trellis = self.form if isinstance(self.form, Trellis) else None
        weight = packed_weight(stream, table, scale, self.entry.columns, self.form.width, trellis)
        return PackedProduct(weight.rotated(self.entry.rotation))

    @torch.no_grad()
    def forward(self) -> Tensor:
        scale = self._buffers.get("row_scale")
        if scale is None:
            scale = torch.ones(self.entry.rows, dtype=torch.bfloat16, device=self.indices.device)
        store = self._store[0]
        codec, table = store.codec(self.entry.codebook, self.entry.decoder, self.indices.device)
        encoded = EncodedMatrix(self.indices, scale, self.entry.columns, self.form, self.entry.rotation)
        return unfold(codec.decode(encoded, self.float_dtype, table), self.entry)


def replace_parameters(model: nn.Module, layout: Layout, float_dtype: torch.dtype) -> None:
    """Turn a model (on any device, meta included) into its compressed form, weights not yet filled."""
    store = Store(layout)
    model.add_module(STORE, store)
    for name, entry in layout.matrices.items():
        parent, _, leaf = name.rpartition(".")
        _attach(model.get_submodule(parent), leaf, PackedMatrix(entry, store, float_dtype))


def attach_tied(model: nn.Module, name: str, source: str) -> None:
    """Let the parameter `name` decode the packed matrix registered as `source`."""
    packed = packed_matrices(model)[source]
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    module._parameters.pop(leaf, None)
    module.__dict__[f"_tied_{leaf}"] = [packed]  # the list hides it: registered once, as `source`
    module._is_hf_initialized = True  # type: ignore[assignment]


def packed_matrices(model: nn.Module) -> dict[str, PackedMatrix]:
    """Parameter name -> its packed matrix."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedMatrix)}


def initialize_buffers(model: Any) -> None:
    """Compute the buffers of packed modules that no checkpoint stores (Gemma's embedding scale).

    transformers does that while it initializes a module's weights, which it must not do for packed ones; so
    it is called for them once, with a stand-in for the weight that counts as initialized.
    """
    for module in list(model.modules()):
        leaves = _packed_leaves(module)
        if not leaves or not module._non_persistent_buffers_set:
            continue
        held = {leaf: module._modules.pop(leaf, None) for leaf, _ in leaves}
        for leaf, packed in leaves:
            stand_in = nn.Parameter(torch.empty(packed.entry.shape, device="meta"), requires_grad=False)
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[leaf] = stand_in
        model._init_weights(module)
        for leaf, original in held.items():
            del module._parameters[leaf]
            if original is not None:
                module._modules[leaf] = original


def compute_weights(model: nn.Module) -> None:
    """After the packed tensors are filled, give every layer a class whose weight is decoded on access.

    Not before, because transformers finds the modules to fill by walking attributes.
    """
    for module in list(model.modules()):
        for leaf, _ in _packed_leaves(module):
            _computed(module, leaf)


def reason_to_decode(model: nn.Module) -> str:
    """Why a model does not run from the packed stream layer by layer; empty where every layer has a kernel."""
    for name, module in model.named_modules():
        for leaf, matrix in _packed_leaves(module):
            device = matrix.indices.device
            if device.type != "cpu":
                return f"there are no kernels for {device.type}"
            if select.packed_isa() is None:
                return "there are no kernels: no C++ compiler was found, or POCKETLLM_COMPILE=0 is set"
            if leaf != "weight" or not has_packed_forward(type(module)):
                return f"there is no kernel for {name}.{leaf} ({type(module).__name__})"
            if matrix.product() is None:
                return f"there is no kernel for {name}.{leaf}, whose decoder has row statistics"
    return ""


def _packed_leaves(module: nn.Module) -> list[tuple[str, PackedMatrix]]:
    own = [(leaf, m) for leaf, m in module._modules.items() if isinstance(m, PackedMatrix)]
    tied = [
        (key.removeprefix("_tied_"), held[0])
        for key, held in module.__dict__.items()
        if key.startswith("_tied_")
    ]
    return own + tied


def _attach(module: nn.Module, leaf: str, packed: PackedMatrix) -> None:
    module._parameters.pop(leaf, None)
    module._modules[leaf] = packed
    module._is_hf_initialized = True  # type: ignore[assignment]


def _computed(module: nn.Module, leaf: str) -> None:
    """Give the module a class in which `leaf` is decoded on access."""

    def read(self: nn.Module) -> Any:
        return dict(_packed_leaves(self))[leaf]()

    cls = type(module)
    is_first = not hasattr(cls, "_dense_class")
    name = f"Packed{cls.__name__}" if is_first else cls.__name__
    base = cls if is_first else getattr(cls, "_dense_class")  # noqa: B009
    bases = packed_bases(cls) if leaf == "weight" else (cls,)
    module.__class__ = type(name, bases, {leaf: property(read), "_dense_class": base})


@torch.no_grad()
def decode_in_place(model: nn.Module) -> dict[str, PackedMatrix]:
    """Replace every packed parameter by its decoded value: ordinary layers again, at full speed.

    Returns:
        The packed matrices that were replaced, by parameter name.
    """
    packed = packed_matrices(model)
    decoded = {id(m): nn.Parameter(m(), requires_grad=False) for m in packed.values()}
    for module in list(model.modules()):
        module.__class__ = getattr(type(module), "_dense_class", type(module))
        for leaf, matrix in _packed_leaves(module):
            module._modules.pop(leaf, None)
            module.__dict__.pop(f"_tied_{leaf}", None)
            module.register_parameter(leaf, decoded[id(matrix)])
    delattr(model, STORE)
    return packed
