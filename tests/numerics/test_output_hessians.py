"""The forms in which Hessians of outputs are kept: what comes back, and that it can be factorized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketllm.calibrate.output_hessians import (
    as_kept,
    least_rows_in_8_bits,
    output_hessians,
    scaled_hessian,
)
from pocketllm.calibrate.window_sums import WindowSums, in_8_bits
from pocketllm.codec.hessian import factorize
from pocketllm.config.constants import OUTPUT_DAMPING
from pocketllm.format.workspace import keep_tensors


def gradients(rows: int, tokens: int, power: float = 0.5) -> Tensor:
    """Correlated, [tokens, rows], of very different sizes."""
    generator = torch.Generator().manual_seed(rows)
    mixed = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    loud = torch.arange(1, rows + 1).float() ** -power
    return (
        1e-4
        * torch.randn(tokens, 1, generator=generator).exp()
        * (torch.randn(tokens, rows, generator=generator) * loud @ mixed)
    )


@pytest.mark.parametrize(("rows", "tokens"), [(96, 400), (97, 40), (64, 1)])
def test_gradients_in_8_bits_give_the_hessian(rows: int, tokens: int, tmp_path: Path) -> None:
    sums, given = WindowSums(columns_in_8_bits=rows), gradients(rows, tokens)
    for part in given.split(30):
        sums.add_square("m", part)
        sums.add_square("narrow", part[:, 1:])
    assert set(sums.in_8_bits) == {"m"}
    hessian = scaled_hessian(sums.squares["m"], tokens)
    kept = as_kept("m", hessian, sums.in_8_bits["m"])
    assert sum(x.numel() * x.element_size() for x in kept.values()) == tokens * (rows + 4)
    keep_tensors(tmp_path / "block.safetensors", kept, {"tokens": tokens})
    (found,) = output_hessians(tmp_path, "block", "cpu", ["m", "other"]).values()
    assert float(found.diagonal().mean()) == pytest.approx(1, rel=1e-5)
    # Rounding of 1/127 of the largest of about 100 normal numbers: 0.2 % of a gradient's energy, uncorrelated.
    assert float((found - hessian).norm() / hessian.norm()) < 0.01
    assert float(torch.linalg.eigvalsh(found.double())[0]) > -1e-5


def test_codes_keep_the_largest_and_zeros() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [-2.54, 1.27, 0.001], [1e-30, 0.0, -1e-30]])
    codes, scales = in_8_bits(x)
    assert codes.tolist() == [[0, 0, 0], [-127, 64, 0], [127, 0, -127]] and codes.dtype == torch.int8
    assert torch.allclose(codes * scales[:, None], x, atol=0.011)


def test_the_smaller_form_is_kept() -> None:
    for tokens in (2, 100, 8192):
        least = least_rows_in_8_bits(tokens)
        full, coded = ((2 * rows**2, tokens * rows) for rows in (least - 1, least))
        assert full[0] <= full[1] and coded[0] > coded[1]


def test_a_hessian_in_float16_loses_definiteness_and_the_damping_restores_it(tmp_path: Path) -> None:
    """Without being doubled."""
    g = gradients(128, 129, power=2.0)
    hessian = scaled_hessian(g.T @ g, 129) + 2e-5 * torch.eye(128)
    keep_tensors(tmp_path / "block.safetensors", as_kept("m", hessian, []), {"tokens": 129})
    found = output_hessians(tmp_path, "block", "cpu", ["m"])["m"]
    assert torch.equal(found, hessian.half().float())
    assert float(torch.linalg.eigvalsh(hessian.double())[0]) > 0
    for kept in (found, found.bfloat16().float()):
        assert float(torch.linalg.eigvalsh(kept.double())[0]) < 0
        damped = factorize(kept, 1, OUTPUT_DAMPING).hessian
        assert float(damped.diagonal().mean()) == pytest.approx(1 + OUTPUT_DAMPING, rel=1e-2)


def test_nothing_is_kept_without_a_folder() -> None:
    assert output_hessians(None, "block", "cpu", ["a"]) == {}
