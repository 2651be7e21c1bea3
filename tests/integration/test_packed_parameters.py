"""Stand-ins of packed parameters: products run on the packed matrix, everything else on decoded values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

import pocketllm
from pocketllm.runtime.layers import PackedMatrix, packed_matrices
from pocketllm.runtime.packed_parameter import PackedParameter
from tests import tiny
from tests.packed_weights import needs_compiler

pytestmark = needs_compiler
CLOSE = {"rtol": 0, "atol": 1e-5}


def loaded(folder: Path, architecture: str) -> Any:
    pocketllm.compress(tiny.save(folder / "dense", architecture), tiny.on_trellis(), folder / "out")
    return pocketllm.load(folder / "out", mode="packed", dtype=torch.float32)[0]


def experts(model: Any) -> PackedMatrix:
    return next(m for m in packed_matrices(model).values() if len(m.entry.shape) == 3)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_slices_multiply_as_decoded_ones(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = experts(loaded(tmp_path, architecture))
    dense, packed = matrix(), PackedParameter(matrix)
    monkeypatch.setattr(PackedMatrix, "forward", None)  # nothing decodes the matrix
    assert packed.shape == dense.shape and packed.dtype == dense.dtype and packed.device == dense.device
    assert len(packed) == len(dense) and packed[-1].shape == dense[-1].shape
    x, columns = torch.randn(5, matrix.entry.columns), matrix.entry.transposed
    for expert in (0, torch.tensor(2), -1):
        found = x @ packed[expert] if columns else linear(x, packed[expert])
        torch.testing.assert_close(found, x @ dense[expert] if columns else linear(x, dense[expert]), **CLOSE)
        torch.testing.assert_close(packed[expert] + 0, dense[expert], **CLOSE)
    if columns:
        x = torch.randn(len(dense), 5, matrix.entry.columns)
        torch.testing.assert_close(torch.bmm(x, packed), torch.bmm(x, dense), **CLOSE)
    else:
        bias = torch.randn(dense.shape[1])
        torch.testing.assert_close(linear(x, packed[1], bias), linear(x, dense[1], bias), **CLOSE)


def test_what_is_not_known_is_decoded(tmp_path: Path) -> None:
    matrix = experts(loaded(tmp_path, "mixtral"))
    dense, packed = matrix(), PackedParameter(matrix)
    for work in (
        lambda w: w * 2 + w.mT.mT,
        lambda w: w[1:],
        lambda w: w[torch.tensor([2, 0])],
        lambda w: w[:, 0][0],
        lambda w: torch.einsum("eij,j->ei", w, torch.ones(w.shape[-1])),
        lambda w: linear(torch.ones(2, w.shape[-1]).double(), w[0].double()),
        lambda w: w[0] @ w[1].T,
        lambda w: w[True],
    ):
        torch.testing.assert_close(work(packed), work(dense))
    x = torch.randn(2, dense.shape[-1], requires_grad=True)
    linear(x, packed[1]).sum().backward()
    torch.testing.assert_close(x.grad, dense[1].sum(dim=0).expand(2, -1), **CLOSE)
    with pytest.raises(IndexError):
        packed[len(dense)]


def test_outside_of_a_forward_parameters_are_ordinary_tensors(tmp_path: Path) -> None:
    model = loaded(tmp_path, "gemma3")
    assert type(model.get_input_embeddings().weight) is torch.Tensor
    ids = torch.arange(5)[None]
    before = model(ids).logits
    assert type(model.get_input_embeddings().weight) is torch.Tensor
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: None)
    assert torch.equal(model(ids).logits, before)
