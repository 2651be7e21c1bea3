"""The trainable form of a compressed model: indices fixed; codebooks, decoders, row scales, norms trained.

`make_trainable` takes a model loaded in mode `packed` and lets its layers decode with gradients. A linear layer
keeps only its input for the backward pass and decodes its weight again there; its dense gradient exists only until
it is reduced to the gradients of table and scale. Any other module that reads an encoded weight (embeddings, fused
experts) gets a differentiable weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.codec.hashed_table import hashed_table, off_halves
from pocketllm.codec.reconstruct import decoded_tables, reconstruct, reconstruct_gradients, row_decoder
from pocketllm.codec.subvectors import unfold
from pocketllm.config import CodecConfig
from pocketllm.format.checkpoint import STORE
from pocketllm.runtime.layers import PACKED, TIED, Codebook, Decoder, PackedMatrix, Store, parameter_name


class TrainableStore(nn.Module):
    """Codebooks and decoders as float32 parameters, and the tables computed from them."""

    codecs: list[CodecConfig]
    seeds: list[int | None]
    windows: list[int]

    def __init__(self, store: Store) -> None:
        super().__init__()
        books = [book for book in store.codebooks if isinstance(book, Codebook)]
        nets = [net for net in store.decoders if isinstance(net, Decoder)]
        self.codecs = [net.entry.codec for net in nets]
        self.seeds = [book.entry.seed for book in books]
        self.windows = [book.entry.window for book in books]
        self.codebooks = nn.ParameterList(nn.Parameter(book.value().float()) for book in books)
        self.ups = nn.ParameterList(nn.Parameter(net.up.float()) for net in nets)
        self.downs = nn.ParameterList(nn.Parameter(net.down.float()) for net in nets)
        for codebook, seed in zip(self.codebooks, self.seeds, strict=True):
            codebook.requires_grad_(seed is None)  # codebooks drawn from a seed are not stored
        self.pairs: set[tuple[int, int]] = set()
        self._cache: dict[tuple[int, int, bool], tuple[Tensor, ...]] = {}
        self._weights: dict[int, Tensor] = {}

    def stored(self) -> dict[str, nn.Parameter]:
        """Stored tensor name -> parameter, for decoders and for codebooks that are not drawn from a seed."""
        kept = [n for n, seed in enumerate(self.seeds) if seed is None]
        found = {f"{STORE}.codebooks.{n}.weight": self.codebooks[n] for n in kept}
        found |= {f"{STORE}.decoders.{n}.up": up for n, up in enumerate(self.ups)}
        found |= {f"{STORE}.decoders.{n}.down": down for n, down in enumerate(self.downs)}
        return found

    def refresh(self) -> None:
        """Recompute the tables from the current parameters; to be called before each forward pass.

        Tables are computed here, not on demand: a checkpointed layer would take them for its activations.
        """
        self._cache.clear()
        self._weights.clear()
        self._prepare()

    def shared(self, codebook: int, decoder: int) -> tuple[Tensor, ...]:
        """Tensors that decode the indices: (table [2^width, d],) in the look-up form, else (codebook, up, down)."""
        key = codebook, decoder, torch.is_grad_enabled()
        if key not in self._cache:
            self._prepare()
        return self._cache[key]

    def _prepare(self) -> None:
        """Compute tables of one shape together: launching an operation takes longer than running it."""
        same_shape: dict[tuple[CodecConfig, torch.Size, int], list[tuple[int, int]]] = defaultdict(list)
        for pair in sorted(self.pairs):
            parts = self.codebooks[pair[0]], self.ups[pair[1]], self.downs[pair[1]]
            self._cache[*pair, torch.is_grad_enabled()] = parts
            if self.codecs[pair[1]].decoder == "lookup":
                same_shape[self.codecs[pair[1]], parts[0].shape, self.windows[pair[0]]].append(pair)
        for (codec, _, window), pairs in same_shape.items():
            keys = [(*pair, torch.is_grad_enabled()) for pair in pairs]
            stacked = [torch.stack(part) for part in zip(*(self._cache[key] for key in keys), strict=True)]
            with torch.autocast(stacked[0].device.type, enabled=False):
                tables = decoded_tables(codec, *stacked)
                tables = hashed_table(tables, window) if window else tables
            self._cache.update((key, (table,)) for key, table in zip(keys, tables.unbind(), strict=True))


class TrainableMatrix(PackedMatrix):
    """An encoded parameter that decodes with gradients.

    row scale = `scale` * exp(`gain`), so that an optimizer step is relative to each row's own size.
    """

    indices: Tensor
    scale: Tensor
    codec: CodecConfig

    def __init__(self, packed: PackedMatrix, store: TrainableStore) -> None:
        nn.Module.__init__(self)
        self.entry, self.float_dtype = packed.entry, torch.float32
        self.codec = store.codecs[packed.entry.decoder]
        device = packed.indices.device
        self.register_buffer("indices", packed.unpacked().to(torch.int32).contiguous(), persistent=False)
        stored = packed._buffers.get("row_scale")
        scale = torch.ones(self.entry.rows, device=device) if stored is None else stored.float()
        self.register_buffer("scale", scale, persistent=False)
        self.gain = nn.Parameter(torch.zeros_like(scale), requires_grad=stored is not None)
        self._trained = [store]
        store.pairs.add((self.entry.codebook, self.entry.decoder))
        self.uses = 1

    def shared(self) -> tuple[Tensor, ...]:
        """Tensors that decode the indices; see `TrainableStore.shared`."""
        return self._trained[0].shared(self.entry.codebook, self.entry.decoder)

    def product(self) -> None:
        """None: a product from the stream has no gradients for what is trained."""

    def matrix(self, gain: Tensor, shared: tuple[Tensor, ...]) -> Tensor:
        """[rows, columns] float32; differentiable by autograd in the row form only."""
        scale = self.scale * gain.exp()
        decode = shared[0] if len(shared) == 1 else row_decoder(self.codec, *shared)
        return reconstruct(self.indices, decode, scale, self.entry.columns, self.entry.rotation)

    def gradients(self, grad: Tensor, gain: Tensor, shared: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of `gain` and `shared` from the gradient of the matrix [rows, columns]."""
        if len(shared) == 1:
            scale = self.scale * gain.exp()
            table_grad, scale_grad = reconstruct_gradients(
                grad, self.indices, shared[0], scale, self.entry.rotation
            )
            return scale_grad * scale, table_grad
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (gain, *shared)]
            value = self.matrix(inputs[0], tuple(inputs[1:]))
            return torch.autograd.grad(value, inputs, grad)

    def forward(self) -> Tensor:
        """The parameter, differentiable; decoded once per forward pass if several modules read it."""
        store = self._trained[0]
        if self.uses == 1 or not torch.is_grad_enabled():
            return unfold(_Decode.apply(self, self.gain, *self.shared()), self.entry)
        if id(self) not in store._weights:
            store._weights[id(self)] = unfold(_Decode.apply(self, self.gain, *self.shared()), self.entry)
        return store._weights[id(self)]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] -> x W^T + b [..., rows], computed in autocast's dtype if that is on."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Linear.apply(self, x.to(dtype), self.gain, *self.shared())
        return y if bias is None else y + bias.to(dtype)


class _Decode(torch.autograd.Function):
    """(gain, shared) -> matrix; saves nothing dense."""

    @staticmethod
    def forward(ctx, matrix, gain, *shared):  # type: ignore[no-untyped-def]
        ctx.matrix = matrix
        ctx.save_for_backward(gain, *shared)
        return matrix.matrix(gain, shared)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gain, *shared = ctx.saved_tensors
        return None, *ctx.matrix.gradients(grad.float(), gain, tuple(shared))


class _Linear(torch.autograd.Function):
    """x W^T; saves only x, and decodes W again in the backward pass."""

    @staticmethod
    def forward(ctx, matrix, x, gain, *shared):  # type: ignore[no-untyped-def]
        ctx.matrix = matrix
        ctx.save_for_backward(x, gain, *shared)
        return x @ matrix.matrix(gain, shared).to(x.dtype).T

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, gain, *shared = ctx.saved_tensors
        grad = grad.to(x.dtype)
        x_grad = None
        if ctx.needs_input_grad[1]:
            with torch.no_grad():
                x_grad = grad @ ctx.matrix.matrix(gain, tuple(shared)).to(x.dtype)
        if not any(ctx.needs_input_grad[2:]):  # a frozen base under an adapter
            return None, x_grad, *[None] * (1 + len(shared))
        weight_grad = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return None, x_grad, *ctx.matrix.gradients(weight_grad.float(), gain, tuple(shared))


def make_trainable(model: Any, dense: bool = False) -> dict[str, TrainableMatrix]:
    """Turn a model loaded in mode `packed` into its trainable form, in place.

    Args:
        dense: train matrices that are stored dense as well; norms, biases and other vectors always are.

    Returns:
        The encoded parameters by name.
    """
    store = TrainableStore(getattr(model, STORE))
    delattr(model, STORE)
    model.add_module(STORE, store)
    made: dict[int, TrainableMatrix] = {}
    named: dict[str, TrainableMatrix] = {}
    for path, module in list(model.named_modules()):
        for key, packed in list(module._modules.items()):
            if isinstance(packed, PackedMatrix):
                matrix = TrainableMatrix(packed, store)
                made[id(packed)] = named[parameter_name(f"{path}.{key}")] = matrix
                module._modules[key] = matrix
    for module in list(model.modules()):
        tied = module.__dict__.get(TIED, {})
        for key, packed in tied.items():
            tied[key] = made[id(packed)]
            tied[key].uses += 1
        _fast_linear(module)
    shared = {id(p) for p in store.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        if parameter.ndim < 2 or (dense and id(parameter) not in shared):
            parameter.requires_grad_(True)
    for matrix in named.values():
        matrix.gain.requires_grad_(matrix.codec.row_scale)
    return named


def _fast_linear(module: nn.Module) -> None:
    """Let nn.Linear and Conv1D, whose forward is known, save only their input."""
    from transformers.pytorch_utils import Conv1D

    plain = getattr(type(module), "_dense_class", None)
    weight = module._modules.get(f"{PACKED}weight")
    if plain in (nn.Linear, Conv1D) and isinstance(weight, TrainableMatrix) and weight.uses == 1:
        module.__class__ = type(type(module).__name__, (type(module),), {"forward": _linear_forward})


def _linear_forward(module: Any, x: Tensor) -> Tensor:
    matrix: TrainableMatrix = module._modules[f"{PACKED}weight"]
    return matrix.linear(x, module.bias)


def stored_tensors(model: Any, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """All trained tensors, rounded as they are stored, by stored name.

    Args:
        dtypes: stored dtype of the tensors that are stored dense; those absent are left out.
    """
    store: TrainableStore = getattr(model, STORE)
    found = {name: value.detach().half() for name, value in store.stored().items()}
    for number, window in enumerate(store.windows):
        if window:
            name = f"{STORE}.codebooks.{number}.weight"
            found[name] = off_halves(store.codebooks[number].detach())
    for name, module in model.named_modules():
        if isinstance(module, TrainableMatrix) and module.codec.row_scale:
            found[f"{parameter_name(name)}.row_scale"] = (
                module.scale * module.gain.detach().exp()
            ).bfloat16()
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.requires_grad:
            found[name] = parameter.detach().to(dtypes[name])
    return found


@torch.no_grad()
def set_stored(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `stored_tensors`: the model computes with the rounded values."""
    store: TrainableStore = getattr(model, STORE)
    store.refresh()
    for name, parameter in store.stored().items():
        parameter.copy_(tensors[name])
    parameters = dict(model.named_parameters())
    for name, module in model.named_modules():
        row_scale = f"{parameter_name(name)}.row_scale"
        if isinstance(module, TrainableMatrix) and row_scale in tensors:
            module.scale.copy_(tensors[row_scale])
            module.gain.zero_()
    for name, value in tensors.items():
        if name in parameters:
            parameters[name].copy_(value)
