"""Error feedback to the right and downwards: the loss tr(E^T G E H), against what it is without G."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pocketllm.codec import feedback_schedule as strips_module
from pocketllm.codec.codebook import seeded_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.feedback_schedule import ColumnFeedback, RowFeedback, Strips
from pocketllm.codec.hessian import conditional_diagonal, factorize, triangular_root
from pocketllm.codec.index_form import Independent, IndexForm, Trellis
from tests.numerics.test_calibrated import correlated

CPU = torch.device("cpu")


def decoded(found: tuple[Tensor, Tensor], table: Tensor, columns: int) -> Tensor:
    indices, scale = found
    return table[indices].reshape(len(indices), -1)[:, :columns] * scale[:, None]


def loss(weight: Tensor, guess: Tensor, outer: Tensor, inner: Tensor) -> float:
    """tr(E^T G E H), written out."""
    error = (weight - guess).double()
    return float(torch.trace(error.T @ outer.double() @ error @ inner.double()))


@pytest.mark.parametrize("form", [Trellis(8, 4, 8), Trellis(8, 3, 7), Trellis(7, 7, 8), Independent(256, 8)])
@pytest.mark.parametrize(("rows", "columns", "d"), [(96, 64, 2), (50, 31, 2), (40, 9, 1)])
def test_rows_make_up_for_each_other(form: IndexForm, rows: int, columns: int, d: int) -> None:
    weight = torch.randn(rows, columns)
    table, scale = seeded_codebook(form.codebook_size, d, 5).float(), weight.square().mean(dim=1).sqrt()
    factor, outputs = factorize(correlated(columns), d), factorize(correlated(rows), 1)
    inner, outer = factor.hessian[:columns, :columns], outputs.hessian
    alone = decoded(assign(weight, factor, table, scale, form, passes=0), table, columns)
    found = assign(weight, factor, table, scale, form, outputs=outputs, passes=0)
    both = decoded(found, table, columns)
    assert loss(weight, both, outer, inner) < 0.93 * loss(weight, alone, outer, inner)
    packed = form.pack(found[0])
    assert torch.equal(form.unpack(packed, *found[0].shape).long(), found[0])


@pytest.mark.parametrize("form", [Independent(64, 16), Trellis(6, 3, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_nearest(form: IndexForm, seed: int) -> None:
    """Even where the Hessians are of a single token, or the weights all alike."""
    torch.manual_seed(seed)
    weight = torch.full((40, 12), 0.3) if seed == 3 else torch.randn(40, 12) ** 3
    x, g = torch.randn(1 if seed < 2 else 100, 12), torch.randn(1 if seed % 2 else 100, 40)
    factor, outputs = factorize(x.T @ x, 2), factorize(g.T @ g, 1)
    table, scale = seeded_codebook(64, 2, 3).float(), weight.square().mean(dim=1).sqrt()
    plain = assign(weight, factorize(torch.eye(12), 2), table, scale, form, passes=0)
    found = assign(weight, factor, table, scale, form, outputs=outputs, passes=0)
    one, other = (
        loss(weight, decoded(each, table, 12), outputs.hessian, factor.hessian) for each in (found, plain)
    )
    assert one <= other * (1 + 1e-4)


def test_row_scales_minimize_the_loss() -> None:
    weight = torch.randn(30, 16)
    factor, outputs = factorize(correlated(16), 2), factorize(correlated(30), 1)
    table = seeded_codebook(16, 2, 3).float()
    form = Trellis(4, 2, 16)
    indices, scale = assign(weight, factor, table, torch.ones(30), form, outputs=outputs, passes=0)
    scale = scale.double().requires_grad_()
    error = weight.double() - table.double()[indices].reshape(30, -1) * scale[:, None]
    total = ((outputs.hessian.double() @ error @ factor.hessian.double()) * error).sum()
    (gradient,) = torch.autograd.grad(total, scale)
    assert float(gradient.abs().max()) < 1e-3 * float(total.detach())


@pytest.mark.parametrize("group", [4, 128])
def test_what_is_carried_is_the_formula(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against feedback written out strip by strip and column by column, with any errors."""
    monkeypatch.setattr(strips_module, "FEEDBACK_GROUP", group)
    lengths, d, n = [5, 4, 4], 2, 9
    rows, columns = sum(lengths), d * n
    weight = torch.randn(rows, columns, dtype=torch.float64)
    upper = factorize(correlated(columns), d).upper.double()
    down_upper = factorize(correlated(rows), 1).upper.double()
    code = (weight / 0.7).round() * 0.7  # what the rows decode to, whatever they aim at

    def inverse(block: Tensor) -> Tensor:
        return torch.linalg.inv(block)

    aims, wants = weight.clone(), torch.zeros_like(weight)
    firsts = [0, 5, 9, 13]
    for top, bottom in itertools.pairwise(firsts):
        left = aims[top:bottom].clone()
        for j in range(0, columns, d):
            wants[top:bottom, j : j + d] = left[:, j : j + d]
            error = (left[:, j : j + d] - code[top:bottom, j : j + d]) @ inverse(upper[j : j + d, j : j + d])
            left[:, j + d :] -= error @ upper[j : j + d, j + d :]
        z = inverse(down_upper[top:bottom, top:bottom]).T @ (aims[top:bottom] - code[top:bottom])
        aims[bottom:] -= down_upper[top:bottom, bottom:].T @ z

    strips = Strips(lengths, n, True, CPU)
    right = ColumnFeedback(strips, weight.float(), upper.float(), d)
    down = RowFeedback(strips, down_upper.float(), d)
    codes = strips.pad(code.float()).reshape(3, 5, n, d)
    found = torch.zeros(3, 5, n, d)
    for at in strips:
        shift = down.shift(at)
        want = right.wanted(at) - shift
        found[at.numbers, :, at.columns] = want
        now = codes[at.numbers, :, at.columns]
        right.feed(at, (want - now) @ right.metric[at.columns])
        down.feed(at, (right.target(at) - shift - now) * strips.inside[at.strips][..., None])
    assert torch.allclose(found[strips.inside].reshape(rows, columns).double(), wants, atol=1e-4)


def test_what_is_left_of_a_diagonal() -> None:
    hessian = correlated(24)
    factor, root = factorize(hessian, 1, 0.01), triangular_root(hessian, 0.01)
    damped = factor.hessian.double()
    assert torch.allclose(root @ root.T, damped, rtol=1e-6)
    assert torch.allclose(torch.linalg.inv(root), factor.upper.double(), rtol=1e-3, atol=1e-6)
    assert torch.allclose(conditional_diagonal(root, 24), damped.diagonal(), rtol=1e-6)
    expected = []
    for begin in range(0, 24, 8):  # Schur complement with respect to what comes after
        a, rest = slice(begin, begin + 8), slice(begin + 8, 24)
        cross = damped[a, rest] @ torch.linalg.pinv(damped[rest, rest]) @ damped[rest, a]
        expected.append((damped[a, a] - cross).diagonal())
    assert torch.allclose(conditional_diagonal(root, 8), torch.cat(expected), rtol=1e-3)


@pytest.mark.parametrize(
    ("lengths", "columns"), [([4] * 96, 97), ([7] * 30 + [9] * 5, 43), ([5] * 3, 17), ([4], 9)]
)
def test_strips_make_up_for_all_above_them(lengths: list[int], columns: int) -> None:
    """What is handed on nearby and from afar, against one product over all rows above."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows, d, longest = sum(lengths), 2, max(lengths)
    upper = 2 * torch.eye(rows) + 0.1 * torch.randn(rows, rows, generator=generator).triu()
    strips = Strips(lengths, columns, True, torch.device("cpu"))
    down, starts = RowFeedback(strips, upper, d), [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    noted = torch.zeros(rows, columns, d)
    for at in strips:
        found, ahead = down.shift(at), down.shift(at.next, 3)
        errors = torch.randn(len(at.numbers), longest, d, generator=generator)
        errors *= strips.inside[at.strips][..., None]
        places = list(zip(at.numbers.tolist(), at.columns.tolist(), at.next.columns.tolist(), strict=True))
        for shifts, which in ((found, 1), (ahead, 2)):
            for shift, place in zip(shifts, places, strict=True):
                begin, end = starts[place[0]], starts[place[0] + 1]
                expected = upper[:begin, begin:end].T @ noted[:begin, place[which]]
                there = min(len(shift), end - begin)
                torch.testing.assert_close(shift[:there], expected[:there], atol=1e-4, rtol=1e-4)
        down.feed(at, errors)
        for error, (number, column, _) in zip(errors, places, strict=True):
            begin, end = starts[number], starts[number + 1]
            inner = upper[begin:end, begin:end]
            noted[begin:end, column] = torch.linalg.solve(inner.T, error[: end - begin])
