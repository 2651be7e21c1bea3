"""The page of the method: both branches of `MatrixCodec.encode`, and the Hessians that the second one takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import Hessian, factorize
from pocketllm.codec.index_form import Independent, IndexForm, Trellis
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate_hessian, rotate_matrix
from pocketllm.config import CodecConfig
from pocketllm.errors import ConfigError, ShapeError, WeightError
from tests.numerics.test_calibrated import correlated
from tests.numerics.test_two_sided import loss

ROWS, COLUMNS = 40, 30
FORMS = [Independent(64, 16), Trellis(6, 3, 16)]
ROTATIONS: list[Any] = [(3, 4), (None, 4), (3, None), (None, None)]


def codec(size: int = 64) -> MatrixCodec:
    """Its networks are the identity, so its codebook is what indices decode to."""
    made = MatrixCodec(CodecConfig(vector_len=2), nn.Parameter(seeded_codebook(size, 2, 3).float()))
    for net in (made.encoder, made.decoder):
        net.reset("identity", torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_what_is_encoded_is_what_assign_finds(two_sided: bool, form: IndexForm, rotation: Any) -> None:
    weight, made = torch.randn(ROWS, COLUMNS), codec()
    inputs, gradients = correlated(COLUMNS), correlated(ROWS)
    hessian, outputs = Hessian(inputs, 0.02), Hessian(gradients, 0.3) if two_sided else None
    encoded = made.encode(weight, hessian, outputs, form=form, rotation=rotation)
    rotated = rotate_matrix(weight, rotation)
    left, right = rotation
    indices, scale = assign(
        rotated,
        factorize(inputs if right is None else rotate_hessian(inputs, right), 2, 0.02),
        made.decoded_codebook(),
        row_rms(rotated),
        form,
        outputs=factorize(gradients if left is None else rotate_hessian(gradients, left), 1, 0.3)
        if two_sided
        else None,
    )
    assert torch.equal(encoded.indices(2).long(), indices)
    assert torch.equal(encoded.row_scale, scale.bfloat16())
    assert len(encoded.stream) == form.nbytes(ROWS, COLUMNS // 2)
    assert (encoded.form, encoded.rotation, encoded.columns) == (form, rotation, COLUMNS)
    table = made.decoded_codebook()[indices].reshape(ROWS, COLUMNS)
    as_encoded = made.decode(encoded, rotated=True)
    torch.testing.assert_close(as_encoded, table * encoded.row_scale.float()[:, None])
    torch.testing.assert_close(
        rotate_matrix(made.decode(encoded), rotation), as_encoded, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("form", [Independent(256, 8), Trellis(8, 4, 8)])
@pytest.mark.parametrize("columns", [64, 31])  # without padding, and with some
def test_hessians_lower_the_loss_that_they_stand_for(form: IndexForm, columns: int) -> None:
    weight, made = torch.randn(96, columns), codec(256)
    inputs, gradients = correlated(columns), correlated(96)
    even, one, other = Hessian(torch.eye(columns)), Hessian(inputs), Hessian(gradients)
    losses = []
    for hessian, outputs in ((even, None), (one, None), (one, other)):
        encoded = made.encode(weight, hessian, outputs, form=form, rotation=(3, 4))
        losses.append(loss(weight, made.decode(encoded), gradients, inputs))
    assert losses[1] < 0.93 * losses[0] and losses[2] < 0.93 * losses[1]


def test_without_a_hessian_rotated_weights_are_encoded_as_they_are() -> None:
    weight, made = torch.randn(ROWS, COLUMNS), codec()
    encoded, other = made.encode(weight, rotation=(3, 4)), made.encode(rotate_matrix(weight, (3, 4)))
    assert torch.equal(encoded.stream, other.stream) and torch.equal(encoded.row_scale, other.row_scale)
    assert torch.equal(made.decode(encoded, rotated=True), made.decode(other))


def test_a_hessian_is_factorized_once_for_each_rotation() -> None:
    hessian = Hessian(correlated(COLUMNS))
    assert hessian.factor(None, 4) is hessian.factor(None, 4) is not hessian.factor(None, 2)
    assert torch.equal(hessian.factor(5, 4).hessian, factorize(rotate_hessian(hessian.matrix, 5), 4).hessian)
    assert hessian.factor(None, 4).hessian.shape == (32, 32)
    with pytest.raises(WeightError, match="Hessian: contains NaN or Inf"):
        Hessian(torch.full((4, 4), torch.nan)).factor(None, 2)


H, G = Hessian(torch.eye(COLUMNS), 0.01), Hessian(torch.eye(ROWS), 0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": G}, "need a Hessian of the inputs"),
        ({"row_importance": torch.ones(ROWS)}, "need a Hessian of the inputs"),
        ({"passes": 1}, "need a Hessian of the inputs"),
        ({"hessian": H, "outputs": G, "passes": 1}, "outputs exclude"),
        ({"hessian": H, "outputs": G, "row_importance": torch.ones(ROWS)}, "outputs exclude"),
    ],
)
def test_arguments_that_exclude_each_other(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        codec().encode(torch.randn(ROWS, COLUMNS), **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hessian": G}, r"hessian of shape \(40, 40\), wanted \(30, 30\)"),
        ({"hessian": H, "outputs": H}, r"outputs of shape \(30, 30\), wanted \(40, 40\)"),
        ({"hessian": H, "row_importance": torch.ones(3)}, r"row_importance of shape \(3,\), wanted \(40,\)"),
    ],
)
def test_sizes_that_do_not_match_the_matrix(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        codec().encode(torch.randn(ROWS, COLUMNS), **arguments)


def test_a_row_decoder_takes_no_hessian() -> None:
    """Its table is not exact: the output of a codeword depends on the row it stands in."""
    made = MatrixCodec(CodecConfig(vector_len=2, decoder="row"), nn.Parameter(torch.randn(64, 2)))
    with pytest.raises(ConfigError, match="decoder='lookup'"):
        made.encode(torch.randn(ROWS, COLUMNS), H)


@pytest.mark.parametrize("vector_len", [2, 4])
def test_a_trellis_without_a_hessian_minimizes_the_error_of_the_weights(vector_len: int) -> None:
    """Its indices form paths; nearest codewords one by one would decode to noise."""
    weight, form = torch.randn(64, COLUMNS), Trellis(8, 4, 32)
    made = MatrixCodec(
        CodecConfig(vector_len=vector_len), nn.Parameter(seeded_codebook(256, vector_len, 3).float())
    )
    for net in (made.encoder, made.decoder):
        net.reset("identity", torch.Generator().manual_seed(0))
    nmse = ((weight - made.decode(made.encode(weight, form=form))) ** 2).mean() / (weight**2).mean()
    assert nmse < 1.6 * form.predicted_nmse(vector_len)
