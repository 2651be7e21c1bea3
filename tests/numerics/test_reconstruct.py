"""Decoding at load, packed running and training: the same weights, to the last bit, and those of the formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketllm.codec.hashed_table import hashed_index
from pocketllm.codec.index_form import HashedTrellis, Independent, IndexForm, Trellis, strip_lengths
from pocketllm.codec.kernels import cpu
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.reconstruct import Lookup, decoded_table, reconstruct, row_decoder
from pocketllm.codec.rotation import Seeds
from pocketllm.codec.subvectors import join
from pocketllm.config import CodecConfig
from pocketllm.format.layout import CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.recover.trainable import TrainableMatrix, TrainableStore
from pocketllm.runtime.layers import PackedMatrix, Store
from tests.numerics.test_recover import orthogonal

FORMS: list[IndexForm] = [Independent(16), Independent(11), Trellis(6, 2, 9), Trellis(4, 4, 256)]
HASHED: list[IndexForm] = [HashedTrellis(9, 3, 9), HashedTrellis(12, 5, 256)]
ROTATIONS: list[Any] = [(3, 4), (None, 4), (3, None), (None, None)]
COLUMNS = [24, 30, 3]  # of whole subvectors, with a padded one, of less than one
ROWS = 21


@dataclass(frozen=True)
class Stored:
    """A matrix as it is stored: float16 codebook and networks, packed indices, bfloat16 row scale."""

    config: CodecConfig
    encoded: EncodedMatrix
    codebook: Tensor
    up: Tensor
    down: Tensor

    def codec(self) -> MatrixCodec:
        codec = MatrixCodec(self.config, nn.Parameter(self.codebook.float()))
        codec.decoder.set_weights(self.up, self.down)
        return codec

    def at_load(self) -> Tensor:
        return self.codec().decode(self.encoded)

    def layer(self) -> tuple[PackedMatrix, Store]:
        encoded = self.encoded
        entry = MatrixEntry(
            shape=(ROWS, encoded.columns),
            transposed=False,
            codebook=0,
            decoder=0,
            stride=encoded.form.stride,
            strip_rows=encoded.form.strip_rows,
            rotation=encoded.rotation,
            crc32="0" * 8,
        )
        window = encoded.form.width if isinstance(encoded.form, HashedTrellis) else 0
        codebook = CodebookEntry(*self.codebook.shape, None, "0" * 8, window)
        store = Store(Layout({"w": entry}, (codebook,), (DecoderEntry(self.config, "0" * 8),)))
        packed = PackedMatrix(entry, store, torch.float32)
        packed.load_state_dict({"indices": encoded.stream, "row_scale": encoded.row_scale}, assign=True)
        parts = {
            "codebooks.0.weight": self.codebook,
            "decoders.0.up": self.up,
            "decoders.0.down": self.down,
        }
        store.load_state_dict(parts, assign=True)
        return packed, store

    def refined(self) -> Tensor:
        """As a block is tuned after it is encoded."""
        encoded, networks = self.encoded, (self.codebook.float(), self.up.float(), self.down.float())
        indices, scale = encoded.indices(self.config.vector_len), encoded.row_scale.float()
        if self.config.decoder == "lookup":
            table = encoded.form.table(decoded_table(self.config, *networks))
            return Lookup.apply(indices, table, scale, encoded.columns, encoded.rotation)
        return reconstruct(
            indices, row_decoder(self.config, *networks), scale, encoded.columns, encoded.rotation
        )

    def formula(self) -> Tensor:
        """R1^T (s U) R2 in float64."""
        codec, indices = self.codec().double(), self.encoded.indices(self.config.vector_len).long()
        if isinstance(self.encoded.form, HashedTrellis):
            entries = (codec.decoder(codec.codebook[None])[0] * 32).round().clamp(-127, 127) / 32
            chosen = [
                entries[hashed_index(self.encoded.form.width, n)[indices], n] for n in range(entries.shape[1])
            ]
            unit = join(torch.stack(chosen, dim=-1), self.encoded.columns)
        else:
            unit = join(codec.decoder(codec.codebook[indices]), self.encoded.columns)
        left, right = (orthogonal(n, seed) for n, seed in zip(unit.shape, self.encoded.rotation, strict=True))
        return left.T @ (unit * self.encoded.row_scale.double()[:, None]) @ right


def stored(decoder: str, form: IndexForm, columns: int, rotation: Seeds, d: int = 4) -> Stored:
    config = CodecConfig(vector_len=d, hidden=8, depth=2, decoder=decoder)
    per_row = -(-columns // d)
    indices = torch.randint(form.codebook_size, (ROWS, per_row))
    if isinstance(form, Trellis):
        strips = [
            form.windows(torch.randint(1 << form.stride, (per_row * rows,))).reshape(per_row, rows).T
            for rows in strip_lengths(ROWS, form.strip_rows)
        ]
        indices = torch.cat(strips)
    up, down = (torch.randn(shape).half() for shape in config.network_shapes)
    codebook, scale = torch.randn(form.codebook_size, d).half(), torch.rand(ROWS).bfloat16()
    return Stored(
        config, EncodedMatrix(form.pack(indices), scale, columns, form, rotation), codebook, up, down
    )


@pytest.mark.parametrize("kernel", ["C++", "torch"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decoder", ["lookup", "row"])
def test_all_uses_decode_to_equal_weights(
    decoder: str,
    form: IndexForm,
    columns: int,
    rotation: Seeds,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(cpu, "decodes", lambda *tensors: False)
    check_uses(stored(decoder, form, columns, rotation))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", HASHED)
@pytest.mark.parametrize("d", [1, 2])
def test_all_uses_of_a_hashed_trellis_too(d: int, form: IndexForm, columns: int, rotation: Seeds) -> None:
    check_uses(stored("lookup", form, columns, rotation, d))


def check_uses(matrix: Stored) -> None:
    packed, store = matrix.layer()
    trained = TrainableMatrix(packed, TrainableStore(store))
    weight = packed()
    assert weight.shape == (ROWS, matrix.encoded.columns) and weight.dtype == torch.float32
    assert torch.equal(matrix.at_load(), weight)
    assert torch.equal(matrix.refined(), weight)
    assert torch.equal(trained(), weight)
    with torch.no_grad():
        assert torch.equal(trained(), weight)
    torch.testing.assert_close(weight.double(), matrix.formula(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_layers_round_once(dtype: torch.dtype) -> None:
    """They compute in float32 and put out the dtype of the model."""
    matrix = stored("lookup", FORMS[2], 30, (3, 4))
    packed, _ = matrix.layer()
    assert torch.equal(packed.to(dtype)(), matrix.at_load().to(dtype))
