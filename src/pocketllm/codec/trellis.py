"""Trellis-coded indices: every index shares bits with the one before it, so a large codebook costs few bits.

An index is a window of `width` bits onto a stream; the next window lies `stride` bits further on. Each index
so chooses from 2^width codewords but adds only `stride` bits, and a path through all indices is found by
dynamic programming (Viterbi). At equal bits the error of a Gaussian source is about 20 to 25 percent below
that of independent indices. With stride = width the windows do not overlap: plain vector quantization.

A path runs down the rows of one column of subvectors, and on into the next column, so that error feedback
can take its turn between two columns. The rows are cut into strips whose paths are independent (they are
searched in parallel, and error feedback takes its turn between them, too); the bits before a strip's first
window are zero. Short strips lose about 2 / rows of the error each.

Source: the bitshift trellis of QTIP (arXiv 2406.11235), here with a learned codebook.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec import compiled
from pocketllm.codec.packing import pack, packed_bytes, unpack
from pocketllm.errors import reason_of

logger = logging.getLogger(__name__)

STRIP_ROWS = 256  # about, where nothing but parallel search asks for strips


@dataclass(frozen=True)
class Trellis:
    """Window of `width` bits (K = 2^width), `stride` bits from one to the next, 1 <= stride <= width.

    strip_rows: about how many rows a strip has.
    """

    width: int
    stride: int
    strip_rows: int = STRIP_ROWS

    @property
    def kept(self) -> int:
        """Bits that a window shares with the one before."""
        return self.width - self.stride

    def windows(self, steps: Tensor) -> Tensor:
        """New bits [..., T] int -> indices [..., T] int32; the newest bits of a window are its highest."""
        steps = steps.to(torch.int32)
        length, shift, back = steps.shape[-1], self.kept, 0
        found = torch.zeros_like(steps)
        while shift > -self.stride and back < length:
            shifted = steps[..., : length - back]
            found[..., back:] |= shifted << shift if shift >= 0 else shifted >> -shift
            shift, back = shift - self.stride, back + 1
        return found

    def steps(self, indices: Tensor) -> Tensor:
        """Inverse of `windows`: the new bits of each index."""
        return indices >> self.kept


def strip_lengths(rows: int, strip_rows: int) -> list[int]:
    """Lengths of the strips that `rows` are cut into: equal but for one row, the longer ones first."""
    count = max(1, round(rows / strip_rows))
    return [rows // count + (1 if strip < rows % count else 0) for strip in range(count)]


def trellis_bytes(rows: int, per_row: int, trellis: Trellis) -> int:
    """Bytes of the packed indices of a matrix; every strip begins on a byte."""
    return sum(
        packed_bytes(length * per_row, trellis.stride) for length in strip_lengths(rows, trellis.strip_rows)
    )


def pack_paths(indices: Tensor, trellis: Trellis) -> Tensor:
    """[rows, n] indices that form paths -> uint8 [trellis_bytes]."""
    steps = trellis.steps(indices)
    parts = steps.split(strip_lengths(indices.shape[0], trellis.strip_rows))
    return torch.cat([pack(part.T.reshape(-1), trellis.stride) for part in parts])


def unpack_paths(stream: Tensor, trellis: Trellis, rows: int, per_row: int) -> Tensor:
    """Inverse of `pack_paths`: [rows, per_row] int32.

    Raises:
        FormatError: the stream has another length.
    """
    out = torch.empty(rows, per_row, dtype=torch.int32, device=stream.device)
    first, offset = 0, 0
    for length in strip_lengths(rows, trellis.strip_rows):
        nbytes = packed_bytes(length * per_row, trellis.stride)
        last = first + length == rows
        part = stream[offset:] if last else stream[offset : offset + nbytes]
        steps = unpack(part, trellis.stride, length * per_row)
        out[first : first + length] = trellis.windows(steps).reshape(per_row, length).T
        first, offset = first + length, offset + nbytes
    return out


def first_state(strips: int, device: torch.device) -> Tensor:
    """[strips] int64: the window before a strip's first one, which has seen no bits yet."""
    return torch.zeros(strips, dtype=torch.int64, device=device)


def reversed_bits(width: int) -> Tensor:
    """[2^width] int64 permutation that reverses the bits of an index; its own inverse."""
    index = torch.arange(1 << width)
    found = torch.zeros_like(index)
    for bit in range(width):
        found |= ((index >> bit) & 1) << (width - 1 - bit)
    return found


class PathSearch:
    """Cheapest paths through the trellis for one column of each strip, all strips at once.

    Args:
        trellis: the trellis. device: of the points.
    """

    def __init__(self, trellis: Trellis, device: torch.device) -> None:
        self.trellis = trellis
        self.order = reversed_bits(trellis.width).to(device)

    def ordered(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [..., 2^width, d] as the search wants them: [..., d, 2^width], and |c|^2 / 2."""
        # Inside, states are bit-reversed: the bits that survive a step are the low ones and lie together.
        tables = tables[..., self.order, :]
        return tables.transpose(-1, -2).contiguous(), tables.square().sum(dim=-1) / 2

    def search(
        self,
        points: Tensor,
        weights: Tensor,
        tables: tuple[Tensor, Tensor],
        which: Tensor,
        lengths: list[int],
        start: Tensor,
        end: Tensor | None = None,
        aheads: list[int] | None = None,
    ) -> Tensor:
        """Indices of the paths of least sum over rows of weight * |point - table[index]|^2.

        Args:
            points: [rows, d] float32. weights: [rows] float32, positive.
            tables: what `ordered` makes of tables [C, 2^width, d]. which: [strips] int64, the table of each.
            lengths: rows of each strip. start: [strips] int64, the index before its first row.
            end: [strips] int64, the index each strip must end with; None leaves it free.
            aheads: how many of the points of each strip, its last ones, belong to the column after it and take
                the table after its own: the path is to be good for them, too, but is put out without them.

        Returns:
            [rows] int64.
        """
        aheads = aheads or [0] * len(lengths)
        after = (which + 1).clamp(max=len(tables[0]) - 1)
        start = self.order[start]
        stop = torch.full_like(start, -1) if end is None else self.order[end]
        arguments = (points.contiguous(), weights.contiguous(), *tables, which, after, start, stop)
        d, stride = points.shape[1], self.trellis.stride
        if points.device.type == "cpu" and compiled.trellis_available(d, stride, self.trellis.kept):
            states = compiled.trellis_search(*arguments, lengths, aheads, self.trellis.width, stride)
        elif (on_gpu := _gpu_search(points.device)) is not None:
            states = on_gpu(*arguments, lengths, aheads, self.trellis.width, stride)
        else:
            states = self._torch(*arguments, lengths, aheads)
        return self.order[states]

    def _torch(
        self,
        points: Tensor,
        weights: Tensor,
        tables: Tensor,
        halves: Tensor,
        which: Tensor,
        after: Tensor,
        start: Tensor,
        stop: Tensor,
        lengths: list[int],
        aheads: list[int],
    ) -> Tensor:
        """The search in torch, strips of equal length at once; the same operations in the same order."""
        out = torch.empty(sum(lengths), dtype=torch.int64, device=points.device)
        sizes = list(zip(lengths, aheads, strict=True))
        firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        skipped = torch.tensor([0, *aheads]).cumsum(0)[:-1]
        for length, ahead in dict.fromkeys(sizes):
            chosen = torch.tensor([n for n, size in enumerate(sizes) if size == (length, ahead)])
            into = (firsts[chosen][:, None] + torch.arange(length)).to(points.device)
            rows = ((firsts + skipped)[chosen][:, None] + torch.arange(length + ahead)).to(points.device)
            chosen = chosen.to(points.device)
            pairs = [(tables[n], halves[n]) for n in (which[chosen], after[chosen])]
            found = self._paths(points[rows], weights[rows], pairs, length, start[chosen], stop[chosen])
            out[into] = found[:, :length]
        return out

    def _paths(
        self,
        points: Tensor,
        weights: Tensor,
        tables: list[tuple[Tensor, Tensor]],
        own: int,
        start: Tensor,
        stop: Tensor,
    ) -> Tensor:
        """points [B, T, d], weights [B, T] -> states [B, T].

        tables: ([B, d, K], |c|^2 / 2 [B, K]) of the first `own` points, and of those after them.
        """
        table, half = tables[0]
        batch, length, d = points.shape
        kept, choices = self.trellis.kept, 1 << self.trellis.stride
        scaled = points * weights[..., None]
        cost = torch.full((batch, half.shape[1]), torch.inf, device=points.device)
        cost.scatter_(1, start[:, None], 0.0)
        back = torch.empty(length, batch, 1 << kept, dtype=torch.uint8, device=points.device)
        for t in range(length):
            if t == own:
                table, half = tables[1]
            previous = cost.reshape(batch, choices, 1 << kept)
            least = previous.amin(dim=1)
            # The first of equals wins on every device.
            back[t] = (previous == least[:, None]).to(torch.uint8).argmax(dim=1)
            branch = half * weights[:, t, None]
            for i in range(d):
                branch = branch - scaled[:, t, i, None] * table[:, i]
            cost = least.repeat_interleave(choices, dim=1) + branch
            if t % 16 == 15:  # keep magnitudes small
                cost = cost - cost.amin(dim=1, keepdim=True)
        state = torch.where(stop < 0, cost.argmin(dim=1), stop)
        out = torch.empty(batch, length, dtype=torch.int64, device=points.device)
        for t in range(length - 1, -1, -1):
            out[:, t] = state
            group = state >> self.trellis.stride
            state = (back[t].gather(1, group[:, None])[:, 0].long() << kept) | group
        return out


@functools.cache
def _gpu_search(device: torch.device) -> Callable[..., Tensor] | None:
    """The search in Triton, where it is there and finds on this device what torch finds."""
    if device.type != "cuda":
        return None
    try:
        from pocketllm.codec import trellis_gpu
    except ImportError:  # it comes with torch's CUDA builds
        return None
    wrong = differs(trellis_gpu.search, device)
    if wrong:
        logger.warning("paths cannot be searched with Triton on this GPU (%s); torch does it, slower", wrong)
    return None if wrong else trellis_gpu.search


def differs(search: Callable[..., Tensor], device: torch.device) -> str:
    """What is wrong with another search, tried on a few points; empty if it finds what torch finds."""
    paths, generator = PathSearch(Trellis(8, 3), device), torch.Generator().manual_seed(0)
    lengths, aheads = [40, 17], [4, 0]
    points = torch.randn(sum(lengths) + sum(aheads), 2, generator=generator).to(device)
    tables = paths.ordered(torch.randn(2, 256, 2, generator=generator).to(device))
    which, weights = torch.tensor([0, 1], device=device), points.square().sum(dim=1)
    ends = first_state(2, device), torch.full_like(which, -1)
    arguments = points, weights, *tables, which, 1 - which, *ends, lengths, aheads
    try:
        found = search(*arguments, 8, 3)
    except Exception as error:  # whatever a compiler or a driver may say
        return reason_of(error)
    return "" if torch.equal(found, paths._torch(*arguments)) else "it finds other paths"


def train_codebook(
    points: Tensor, trellis: Trellis, iterations: int, seed: int
) -> tuple[Tensor, float, list[float]]:
    """Lloyd's algorithm with cheapest paths in the place of nearest codewords.

    Starts from points drawn with `seed`: what makes a trellis good is that codewords are random over states.

    Args:
        points: [N, d] float32, in random order.

    Returns:
        codebook [2^width, d], share of codewords used, error per iteration (mean square over that of the
        points).
    """
    generator = torch.Generator().manual_seed(seed)
    size = 1 << trellis.width
    drawn = torch.randint(len(points), (size,), generator=generator).to(points.device)
    table = points[drawn].float()
    lengths = strip_lengths(len(points), trellis.strip_rows)
    search = PathSearch(trellis, points.device)
    start = first_state(len(lengths), points.device)
    which = torch.zeros_like(start)
    weights = torch.ones(len(points), device=points.device)
    energy, errors, counts = float(points.square().sum()), list[float](), torch.ones(size)
    for _ in range(max(1, iterations)):
        indices = search.search(points, weights, search.ordered(table[None]), which, lengths, start)
        errors.append(float((points - table[indices]).square().sum()) / max(energy, 1e-30))
        sums = torch.zeros_like(table, dtype=torch.float64).index_add_(0, indices, points.double())
        counts = torch.bincount(indices, minlength=size)
        means = (sums / counts.clamp(min=1)[:, None]).float()
        table = torch.where(counts[:, None] > 0, means, table)
    return table, float((counts > 0).float().mean()), errors
