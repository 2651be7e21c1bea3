"""Sums over the windows of a text that do not depend on how many ranks run the windows.

Window (or batch of windows) n is run by rank n modulo the number of ranks. After each round, in which every rank has
run one, what they have added is applied in the order of the windows. A sum of x x^T is kept by one rank, to which the
others send x; each product is computed there as in a single process. Wide x can be kept as well, in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocketllm.calibrate.autocast import as_multiplied
from pocketllm.codec.kernels.select import add_square
from pocketllm.ranks import SOLO, Ranks

_SQUARE, _VALUE, _ITEM, _SAME = "square", "value", "item", "same"


class _Label(NamedTuple):
    """What is added to what. other: see `WindowSums.share`. rows: of x."""

    kind: str
    name: str
    other: str = ""
    rows: int = 0


@dataclass
class WindowSums:
    """Sums by name.

    squares: [C, C] float32 sums of x^T x, on the rank that keeps each (`owner`); see `shared`.
    rows: number of rows of all x of such a sum. same: name -> the name whose sum it shares.
    values: sums of tensors. items: tensors, in order. columns_in_8_bits: of x from which on all x of a sum are kept in
    8 bits, too, by name in `in_8_bits`, on the same rank; None for none.
    """

    device: torch.device | str = "cpu"
    ranks: Ranks = SOLO
    squares: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    items: dict[str, list[Tensor]] = field(default_factory=dict)
    owner: dict[str, int] = field(default_factory=dict)
    columns_in_8_bits: int | None = None
    in_8_bits: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _columns: dict[str, int] = field(default_factory=dict)
    _loads: list[int] = field(default_factory=list)
    _waiting: list[tuple[_Label, Tensor]] = field(default_factory=list)

    def add_square(self, name: str, x: Tensor) -> None:
        """Add x^T x, x [n, C] in the dtype in which layers multiply it."""
        self._note(_Label(_SQUARE, name, rows=len(x)), as_multiplied(x))

    def add_value(self, name: str, value: Tensor) -> None:
        """Add a tensor."""
        self._note(_Label(_VALUE, name), value)

    def add_item(self, name: str, item: Tensor) -> None:
        """Append a tensor to a list."""
        self._note(_Label(_ITEM, name), item)

    def share(self, name: str, other: str) -> None:
        """Let `name` be another name of the sum of squares of `other`."""
        self._note(_Label(_SAME, name, other=other), torch.empty(0))

    def end_round(self) -> None:
        """Apply what all ranks have added since the last round; all must call it."""
        if self.ranks.size > 1:
            for label, value in self.ranks.in_order(self._waiting, self._place):
                self._apply(_Label(*label), value)
            self._waiting.clear()

    def shared(self) -> dict[str, Tensor]:
        """Every sum of squares, on every rank; names that share one have the same tensor."""
        if self.ranks.size > 1:
            for name, owner in self.owner.items():
                if owner != self.ranks.rank:
                    self.squares[name] = torch.empty(2 * [self._columns[name]], device=self.device)
                self.squares[name] = self.ranks.broadcast(self.squares[name], owner)
        return {name: self.squares[self.same.get(name, name)] for name in self.rows}

    def _note(self, label: _Label, value: Tensor) -> None:
        if self.ranks.size == 1:
            self._apply(label, value)
        else:
            self._waiting.append((label, value.detach().clone()))  # a block may overwrite what it has read

    def _place(self, given: list[Any], shape: list[int]) -> int | None:
        """The rank that gets something; a new sum of squares goes to the rank with the least work."""
        label = _Label(*given)
        if label.kind != _SQUARE:
            return None
        name = self.same.get(label.name, label.name)
        self._loads = self._loads or [0] * self.ranks.size
        if name not in self.owner:
            self.owner[name], self._columns[name] = self._loads.index(min(self._loads)), shape[1]
        self._loads[self.owner[name]] += shape[0] * shape[1] ** 2
        return self.owner[name]

    def _apply(self, label: _Label, value: Tensor | None) -> None:
        name = label.name
        if label.kind == _SAME:
            self.same[name] = self.same.get(label.other, label.other)
            self.rows[name] = self.rows[label.other]
        elif label.kind == _SQUARE:
            self.rows[name] = self.rows.get(name, 0) + label.rows
            self._add_square(self.same.get(name, name), value)
        elif label.kind == _VALUE and value is not None:
            self.values[name] = self.values[name] + value if name in self.values else value
        elif value is not None:
            self.items.setdefault(name, []).append(value)

    def _add_square(self, name: str, x: Tensor | None) -> None:
        if x is None:  # another rank keeps it
            return
        if name not in self.squares:
            self.squares[name] = torch.zeros(x.shape[1], x.shape[1], device=self.device)
        if self.columns_in_8_bits is not None and x.shape[1] >= self.columns_in_8_bits:
            self.in_8_bits.setdefault(name, []).append(in_8_bits(x.float()))
        add_square(self.squares[name], x.to(self.device))


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [n, C] int8, scales [n] float32) on the CPU, with x [n, C] about codes * scales; the largest is 127."""
    scales = x.abs().amax(dim=1) / 127
    codes = (x / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return codes.to(torch.int8).cpu(), scales.cpu()
