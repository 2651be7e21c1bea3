"""The same codec for every matrix of the blocks, a finer one for embedding and head (the published method)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pocketllm.config import SCOPES
from pocketllm.errors import ConfigError
from pocketllm.plan.budget import Budget, stored_bits
from pocketllm.plan.matrices import Matrix, Plan, Spec


@dataclass(frozen=True)
class UniformRates(Budget):
    """Compares codecs and scopes; remaining bits double the codebooks of some kinds of matrices; see `Budget`."""

    slack = 1.5

    @property
    def scopes(self) -> tuple[str, ...]:
        """What may share a codebook."""
        return SCOPES if self.config.codebook_scope == "auto" else (self.config.codebook_scope,)

    def value(self, matrix: Matrix) -> float:
        """Embedding and head count more, according to their extra bits."""
        return matrix.weights * (1.0 if matrix.in_blocks else 4.0**self.config.embedding_extra_bits)

    def best(self) -> Plan:
        return super().best() if self.config.codebook_size is None else self._fixed(self.config.codebook_size)

    def _fixed(self, codebook_size: int) -> Plan:
        """The smallest plan with the codec that the settings name."""
        assert self.config.vector_len is not None
        spec = Spec(self.config.vector_len, codebook_size)
        plans = [self.plan({m.name: spec for m in self.matrices}, scope) for scope in self.scopes]
        usable = list(filter(_has_enough, plans))
        if not usable:
            most = max(min(_subvectors(group, spec) for group in plan.groups().values()) for plan in plans)
            raise ConfigError(
                f"codebook_size: got {codebook_size}, but only {most} subvectors share the smallest "
                f"codebook (scope {plans[-1].codebook_scope}); lower it or widen the scope"
            )
        return min(usable, key=lambda plan: plan.bpw)

    def uniform(self) -> list[Plan]:
        pairs = list(self._pairs())
        plans = [
            self.plan({m.name: blocks if m.in_blocks else ends for m in self.matrices}, scope)
            for scope in self.scopes
            for blocks, ends in pairs
        ]
        return list(filter(_has_enough, plans))

    def refined(self, plans: list[Plan]) -> Plan:
        return self._filled(min(plans, key=lambda plan: self.loss(plan.specs)))

    def _pairs(self) -> Iterator[tuple[Spec, Spec]]:
        """Pairs (spec of the blocks, spec of embedding and head) worth comparing."""
        specs = self.offered()
        if len({m.in_blocks for m in self.matrices}) < 2:
            yield from ((spec, spec) for spec in specs)
            return
        anywhere = replace(self, config=replace(self.config, vector_len=None)).offered()
        for spec in specs:
            # Embedding and head: the finest codec that is about `embedding_extra_bits` finer.
            wanted = spec.nmse * 4.0**-self.config.embedding_extra_bits
            close = [other for other in {*anywhere, *specs} if other.nmse <= wanted * 1.05]
            rate = [(math.log2(o.codebook_size) / o.vector_len, o.codebook_size, o) for o in close]
            if rate:
                yield spec, min(rate)[2]

    def _filled(self, plan: Plan) -> Plan:
        """Spend the remaining budget: matrices take a codebook of twice the size while it fits."""

        def upgraded(count: int) -> Plan:
            chosen = {m.name for m in order[:count]}
            specs = {
                name: replace(spec, codebook_size=2 * spec.codebook_size) if name in chosen else spec
                for name, spec in plan.specs.items()
            }
            return replace(plan, specs=specs)

        def fits(candidate: Plan) -> bool:
            return stored_bits(candidate) <= self.target * self.weights and _has_enough(candidate)

        blocks = [m for m in plan.matrices if m.in_blocks] or list(plan.matrices)
        if 2 * plan.specs[blocks[0].name].codebook_size > 1 << (self.config.max_index_bits + 1):
            return plan
        # Kinds in turn, then single matrices: the largest prefix of that order that fits (bisection).
        order = sorted(blocks, key=lambda m: m.kind)
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(upgraded(middle)) else (low, middle - 1)
        candidate = upgraded(low)
        return candidate if low and self.loss(candidate.specs) < self.loss(plan.specs) else plan


def _subvectors(group: list[Matrix], spec: Spec) -> int:
    return sum(m.subvectors(spec.vector_len) for m in group)


def _has_enough(plan: Plan) -> bool:
    """Whether every codebook can be fitted to the subvectors that share it."""
    firsts = ((group, plan.specs[group[0].name]) for group in plan.groups().values())
    return all(spec.form.has_enough(_subvectors(group, spec)) for group, spec in firsts)
