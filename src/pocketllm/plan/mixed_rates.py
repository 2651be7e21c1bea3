"""Every matrix with bits of its own: they go where they lower the predicted loss most.

Every codec in use has a codebook for the model. If codebooks take a large share of the bits, as in small models,
fewer may be better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pocketllm.config.constants import BUDGET_LEFT, DEAR_CODEBOOKS
from pocketllm.plan.bit_tally import BitTally
from pocketllm.plan.budget import Budget, stored_bits
from pocketllm.plan.matrices import Matrix, Plan, Spec
from pocketllm.plan.selection import override

Choices = Mapping[str, list[Spec]]
"""The codecs that each matrix may take, by rising bits."""


@dataclass(frozen=True)
class MixedRates(Budget):
    """Chooses among all combinations of codecs; see `Budget`."""

    slack = 1.01

    @cached_property
    def most(self) -> float:
        """The budget of stored bits."""
        return self.target * self.weights

    @cached_property
    def choices(self) -> Choices:
        """What the settings and overrides allow."""
        specs = self.offered()
        return {m.name: self._choices(m, specs) for m in self.matrices}

    def value(self, matrix: Matrix) -> float:
        return self.importance[matrix.name] if self.importance else float(matrix.weights)

    def uniform(self) -> list[Plan]:
        return [self._plan(specs) for specs in _single_codec(self.choices)]

    def refined(self, plans: list[Plan]) -> Plan:
        best = self._least_loss(self.choices)
        assert best is not None, "a uniform plan is within the budget"
        parts = self._plan(best).bits_by_part()
        if parts["codebooks"] > DEAR_CODEBOOKS * sum(parts.values()):
            every = {spec for own in self.choices.values() for spec in own}
            families = [
                {spec for spec in every if spec.vector_len == d}
                for d in sorted({s.vector_len for s in every})
            ]
            starts = [best, *filter(None, (self._least_loss(self._restricted(some)) for some in families))]
            best = min(map(self._with_fewer_codebooks, starts), key=self.loss)
        return self._plan(best)

    def _choices(self, matrix: Matrix, specs: list[Spec]) -> list[Spec]:
        wanted = override(matrix.name, self.config)
        if wanted is not None:
            below = [spec for spec in specs if spec.index_bpw <= wanted]
            specs = [max(below, key=lambda spec: spec.index_bpw)] if below else specs[:1]
        return sorted(specs, key=lambda spec: spec.index_bpw)

    def _plan(self, specs: dict[str, Spec]) -> Plan:
        return self.plan(
            specs, "model" if self.config.codebook_scope == "auto" else self.config.codebook_scope
        )

    def _bits(self, specs: dict[str, Spec]) -> int:
        return stored_bits(self._plan(specs))

    def _restricted(self, some: set[Spec]) -> Choices:
        """The choices restricted to some codecs, for matrices that may take one of them."""
        return {name: [spec for spec in own if spec in some] or own for name, own in self.choices.items()}

    def _least_loss(self, choices: Choices) -> dict[str, Spec] | None:
        """The specs of least loss within the budget; None if there are none.

        For a price per bit every matrix takes the codec with the least value * nmse + price * bits; the price
        is bisected until the budget is met, and the remaining bits are spent matrix by matrix.
        """
        best = min(_single_codec(choices), key=self._bits)
        if self._bits(best) > self.most:
            return None
        cheap, dear = -80.0, 80.0  # base-2 logarithms of the price
        over: dict[str, Spec] = {}
        for _ in range(40):
            middle = (cheap + dear) / 2
            specs = self._at_price(2.0**middle, choices)
            # Near the end most prices give the specs of one before, whose bits are known.
            if specs != over and (specs == best or self._bits(specs) <= self.most):
                dear, best = middle, specs
            else:
                cheap, over = middle, specs
        while True:
            spent = self._spend(best, choices)
            if spent == best or self._bits(spent) > (1 - BUDGET_LEFT) * self.most:
                return spent
            best = spent

    def _at_price(self, price: float, choices: Choices) -> dict[str, Spec]:
        def cheapest(matrix: Matrix) -> Spec:
            value, weights = self.value(matrix), matrix.weights
            return min(
                choices[matrix.name],
                key=lambda spec: value * spec.nmse + price * spec.index_bpw * weights,
            )

        return {m.name: cheapest(m) for m in self.matrices}

    def _spend(self, specs: dict[str, Spec], choices: Choices) -> dict[str, Spec]:
        """Raise single matrices to their next codec, most useful first, while the budget lasts.

        First to codecs already in use, which need no additional codebook, then to any.
        """
        tally = BitTally(self._plan(specs))
        for allowed in (set(specs.values()), None):
            steps = [
                step
                for m in self.matrices
                for step in self._next_step(m, tally.specs[m.name], choices, allowed)
            ]
            for _, matrix, spec in sorted(steps, key=lambda step: (-step[0], step[1].name)):
                if tally.bits + tally.added(matrix, spec) <= self.most:
                    tally.change(matrix, spec)
        return tally.specs

    def _next_step(
        self, matrix: Matrix, now: Spec, choices: Choices, allowed: set[Spec] | None
    ) -> list[tuple[float, Matrix, Spec]]:
        """(gain per bit, matrix, codec) of the next codec of a matrix; empty if there is none."""
        for spec in choices[matrix.name]:
            if spec.index_bpw > now.index_bpw and (allowed is None or spec in allowed):
                gain = self.value(matrix) * (now.nmse - spec.nmse)
                return [(gain / (spec.index_bpw - now.index_bpw) / matrix.weights, matrix, spec)]
        return []

    def _with_fewer_codebooks(self, best: dict[str, Spec]) -> dict[str, Spec]:
        """Drop codecs in use one by one, as long as the others use the freed bits to lower the loss."""
        while True:
            used = set(best.values())
            tried = [self._least_loss(self._restricted(used - {spec})) for spec in sorted(used)]
            better = min(filter(None, tried), key=self.loss, default=best)
            if self.loss(better) >= self.loss(best):
                return best
            best = better


def _single_codec(choices: Choices) -> list[dict[str, Spec]]:
    """Each codec for all matrices that may take it: with few weights, codebooks cost more than indices."""
    every = dict.fromkeys(spec for specs in choices.values() for spec in specs)
    return [{name: spec if spec in own else own[0] for name, own in choices.items()} for spec in every]
