"""Gradients of encoded layers and of the divergence, against autograd through the plain formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pocketllm
from pocketllm.codec.kernels import cpu
from pocketllm.codec.reconstruct import reconstruct, reconstruct_gradients
from pocketllm.codec.rotation import rotate_matrix, unrotate_matrix
from pocketllm.codec.subvectors import join
from pocketllm.recover.kl_loss import head_kl, kl_loss, logits_kl
from pocketllm.recover.trainable import make_trainable
from tests import tiny

SHAPES = [(48, 40, 5), (7, 13, 4), (1, 3, 3), (33, 64, 1)]
SEEDS: list[Any] = [(3, 4), (None, 4), (3, None), (None, None)]


def orthogonal(size: int, seed: int | None) -> Tensor:
    """R as a matrix, from its definition."""
    eye = torch.eye(size)
    return eye.double() if seed is None else unrotate_matrix(eye, (None, seed)).double()


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "decodes", lambda *tensors: False)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("rows", "columns", "d"), SHAPES)
def test_lookup_gradients_are_those_of_the_formula(
    rows: int, columns: int, d: int, seeds: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = orthogonal(rows, seeds[0]), orthogonal(columns, seeds[1])
    if path == "torch":
        in_torch(monkeypatch)
    indices = torch.randint(0, 6, (rows, -(-columns // d)), dtype=torch.int32)
    table = torch.randn(6, d, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    wanted = left.T @ (join(table[indices.long()], columns) * scale[:, None]) @ right
    grad = torch.randn(rows, columns, dtype=torch.float64)
    wanted_grads = torch.autograd.grad(wanted, (table, scale), grad)
    low = table.detach().float(), scale.detach().float()
    decoded = reconstruct(indices, *low, columns, seeds)
    torch.testing.assert_close(decoded.double(), wanted, rtol=1e-4, atol=1e-5)
    found = reconstruct_gradients(grad.float(), indices, *low, seeds)
    for one, other in zip(found, wanted_grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("rows", "columns"), [(48, 40), (7, 13), (1, 1), (64, 96), (17, 576)])
def test_compiled_rotation_does_what_torch_does(
    rows: int, columns: int, seeds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(columns, rows).T  # not contiguous
    found = rotate_matrix(weight, seeds), unrotate_matrix(weight, seeds)
    before = weight.clone()
    in_torch(monkeypatch)
    torch.testing.assert_close(found[0], rotate_matrix(weight, seeds), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], unrotate_matrix(weight, seeds), rtol=1e-5, atol=1e-5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("in_cache", [1 << 20, 33, 1])  # numbers at a time: all, three positions, one
def test_divergence_and_gradient_are_those_of_the_formula(
    in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketllm.recover.kl_loss._LOGITS_IN_CACHE", in_cache)
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, dtype=torch.float64)
    log_q = student.log_softmax(1)
    wanted = torch.nn.functional.kl_div(log_q, teacher.log_softmax(1), reduction="sum", log_target=True)
    wanted_grad = torch.autograd.grad(wanted * 0.25, student)[0]
    logits, target = student.detach().float(), teacher.float()
    total, grad = kl_loss(logits, target, 0.25)
    assert torch.equal(logits, student.float()) and torch.equal(target, teacher.float())
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_divergence_of_the_most_likely_tokens_is_that_of_grouped_outcomes(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketllm.recover.kl_loss._LOGITS_IN_CACHE", 33)
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    log_p, ids = torch.randn(7, 11, dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    q = student.softmax(1)
    inside = q.gather(1, ids)
    p_all = torch.cat([log_p.exp(), 1 - log_p.exp().sum(1, keepdim=True)], dim=1)
    q_all = torch.cat([inside, 1 - inside.sum(1, keepdim=True)], dim=1)
    wanted = (p_all * (p_all / q_all).log()).sum()
    wanted_grad = torch.autograd.grad(wanted, student)[0]
    total, grad = kl_loss(student.detach().float(), (ids, log_p.float()), 1.0)
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [0, 4])
def test_labels_are_mixed_in(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """w (-log q_label) + (1 - w) KL, w another one at every position."""
    monkeypatch.setattr("pocketllm.recover.kl_loss._LOGITS_IN_CACHE", 33)
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, dtype=torch.float64).log_softmax(1)
    ids, weights = torch.randint(0, 11, (7,)), torch.tensor([0.0, 0.3, 1.0, 0.5, 0.1, 0.9, 0.0]).double()
    log_q, log_p = student.log_softmax(1), teacher
    if k:
        log_p, top = teacher.topk(k, dim=1)
        rest = (1 - log_q.gather(1, top).exp().sum(1, keepdim=True)).log()
        grouped = torch.cat([log_q.gather(1, top), rest], dim=1)
        log_p_all = torch.cat([log_p, (1 - log_p.exp().sum(1, keepdim=True)).log()], dim=1)
    else:
        grouped, log_p_all = log_q, log_p
    kl = (log_p_all.exp() * (log_p_all - grouped)).sum(1)
    wanted = ((1 - weights) * kl - weights * log_q.gather(1, ids[:, None])[:, 0]).sum()
    wanted_grad = torch.autograd.grad(wanted * 0.5, student)[0]
    target = (top, log_p.float()) if k else teacher.float()
    total, grad = kl_loss(student.detach().float(), target, 0.5, (ids, weights.float()))
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [0, 4])
def test_a_share_of_the_positions_is_those_with_the_largest_loss(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketllm.recover.kl_loss._LOGITS_IN_CACHE", 33)
    student, teacher = torch.randn(7, 11), torch.randn(7, 11).log_softmax(1)
    log_p, ids = teacher.topk(k or 1, dim=1)

    def at(part: slice, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        return kl_loss(student[part], (ids[part], log_p[part]) if k else teacher[part], 0.5, share=share)

    each = torch.stack([at(slice(n, n + 1), 1.0)[0] for n in range(7)])
    kept = each.topk(4).indices  # 0.5 of 7, rounded up
    total, grad = at(slice(None), 0.5)
    torch.testing.assert_close(total, each[kept].sum())
    wanted = torch.zeros(7, 11)
    wanted[kept] = at(slice(None), 1.0)[1][kept]
    torch.testing.assert_close(grad, wanted)


def test_chunked_head_gives_what_whole_logits_give(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = torch.randn(10, 6), torch.randn(11, 6), torch.randn(11)
    teacher = torch.randn(10, 11)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    whole = logits_kl(torch.nn.functional.linear(*leaves), lambda part: teacher[part].clone(), 0.1)
    wanted = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr("pocketllm.recover.kl_loss._LOGITS_AT_ONCE", 33)  # three positions at a time
    parts = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    chunked = head_kl(*parts, lambda part: teacher[part].clone(), torch.float32, 0.1)
    torch.testing.assert_close(chunked, whole)
    for one, other in zip(torch.autograd.grad(chunked, parts), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["lookup", "row"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_trainable_model_has_the_gradients_of_naive_decoding(
    architecture: str, form: str, tmp_path: Path
) -> None:
    """The same model with every weight decoded by plain differentiable operations."""
    source = tiny.save(tmp_path / "m", architecture)
    settings = tiny.settings(codec={"decoder": form})
    if form == "lookup":
        settings = tiny.calibrated(settings)
    pocketllm.compress(source, settings, tmp_path / "c")
    ids = torch.randint(0, 96, (2, 12))
    losses, gradients = [], []
    for naive in (False, True):
        model, _ = pocketllm.load(tmp_path / "c", mode="packed", dtype=torch.float32)
        matrices = make_trainable(model)
        if naive:
            for module in model.modules():
                if type(module).__dict__.get("forward") is not None and "_dense_class" in dir(type(module)):
                    module.__class__ = type(module).__mro__[1]  # without the layer's own forward
            for matrix in matrices.values():
                matrix.forward = lambda matrix=matrix: naive_decode(matrix)  # type: ignore[method-assign]
        loss = model(ids, use_cache=False).logits.square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".gain" in name for name in gradients[0])
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def naive_decode(matrix: Any) -> Tensor:
    """The parameter by gather, scale, dense rotation matrices: autograd does the rest."""
    from pocketllm.codec.reconstruct import decoder_output
    from pocketllm.codec.subvectors import unfold

    shared = matrix.shared()
    if len(shared) == 1:
        unit = shared[0][matrix.indices.long()]
    else:
        unit = decoder_output(matrix.codec, shared[0][matrix.indices.long()], *shared[1:])
    weight = join(unit, matrix.entry.columns) * (matrix.scale * matrix.gain.exp())[:, None]
    left, right = (
        orthogonal(n, seed).float() for n, seed in zip(weight.shape, matrix.entry.rotation, strict=True)
    )
    return unfold(left.T @ weight @ right, matrix.entry)
