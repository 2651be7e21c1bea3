"""Segments of trellis paths (benchmarks/index_segments.py) against brute force on a tiny matrix."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pocketllm.codec.index_form import HashedTrellis, Trellis

PATH = Path(__file__).parents[2] / "benchmarks" / "index_segments.py"
spec = importlib.util.spec_from_file_location("index_segments", PATH)
assert spec is not None and spec.loader is not None
index_segments = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = index_segments  # where dataclasses look for their module
spec.loader.exec_module(index_segments)
Segments, SegmentSearch = index_segments.Segments, index_segments.SegmentSearch

FORMS = [Trellis(4, 2, 3), Trellis(5, 2, 100), HashedTrellis(9, 4, 3), HashedTrellis(9, 1, 4)]


def problem(form: Trellis, d: int):
    generator = torch.Generator().manual_seed(form.width)
    rows, per_row = 7, 3
    stream = torch.randint(256, (form.nbytes(rows, per_row),), generator=generator, dtype=torch.uint8)
    indices = form.unpack(stream, rows, per_row)
    table = form.table(torch.randn(form.codebook_size, d, generator=generator))
    gradient = torch.randn(rows, per_row * d - (d - 1), generator=generator)  # the last subvector is padded
    curvature = torch.rand(gradient.shape, generator=generator)
    return SegmentSearch(form, table), indices, gradient, curvature


def gain_of(search, old, new, gradient, curvature):
    """The gain from replacing all indices, from its definition."""
    moved = (search.table[new.long()] - search.table[old.long()]).reshape(len(old), -1)[
        :, : gradient.shape[1]
    ]
    return -(gradient * moved + curvature * moved.square() / 2).sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("d", [1, 2])
def test_every_segment_is_as_good_as_the_best_of_all_changes_of_its_steps(form, d):
    search, indices, gradient, curvature = problem(form, d)
    rows, per_row = indices.shape
    places = search.places(rows, per_row)
    found = search.best(indices, gradient, curvature, places)
    for number in range(0, len(places), 5):
        # The stream's own arithmetic is the judge: set the steps, pack, unpack.
        steps, best = form.steps(indices).reshape(-1), torch.tensor(0.0)
        for values in torch.cartesian_prod(*[torch.arange(1 << form.stride)] * search.steps):
            changed = steps.clone()
            changed[places[number, : search.steps]] = values.to(changed.dtype)
            new = form.unpack(form.pack((changed << form.kept).reshape(rows, per_row)), rows, per_row)
            best = torch.maximum(best, gain_of(search, indices, new, gradient, curvature))
        torch.testing.assert_close(found.gains[number], best)
        if best > 0:
            one = Segments(places[[number]], found.windows[[number]], found.gains[[number]])
            new = one.applied(indices)
            assert torch.equal(form.unpack(form.pack(new), rows, per_row), new)  # a path
            torch.testing.assert_close(gain_of(search, indices, new, gradient, curvature), best)


def test_accepted_segments_share_no_window_so_that_their_gains_add_up():
    search, indices, gradient, curvature = problem(HashedTrellis(9, 4, 3), 2)
    found = search.best(indices, gradient, curvature, search.places(*indices.shape)).apart(1000)
    assert len(found.gains) > 1
    used = found.places[found.places >= 0]
    assert len(used) == len(used.unique())
    new = found.applied(indices)
    assert torch.equal(search.form.unpack(search.form.pack(new), *indices.shape), new)
    torch.testing.assert_close(gain_of(search, indices, new, gradient, curvature), found.gains.sum())


def test_only_so_many_of_the_best_segments_are_taken():
    search, indices, gradient, curvature = problem(HashedTrellis(9, 4, 3), 2)
    found = search.best(indices, gradient, curvature, search.places(*indices.shape))
    assert found.apart(1).gains.tolist() == [found.gains.max()]
    assert len(found.apart(0).gains) == 0


def test_moves_are_those_of_the_decoded_indices():
    search, indices, gradient, curvature = problem(Trellis(5, 2, 100), 2)
    found = search.best(indices, gradient, curvature, search.places(*indices.shape)).apart(2)
    moved = torch.zeros(indices.numel(), 2)
    inside = found.places >= 0
    moved[found.places[inside]] = found.moves(indices, search.table)[inside]
    new = search.table[found.applied(indices).long()] - search.table[indices.long()]
    torch.testing.assert_close(moved, new.reshape(-1, 2))
