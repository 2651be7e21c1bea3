"""The stored bits of a plan while single matrices change their codec."""

from __future__ import annotations

from collections import Counter

from pocketllm.plan.budget import stored_bits
from pocketllm.plan.matrices import Matrix, Plan, Spec


class BitTally:
    """Counts the users of every codebook and decoder, so that a change costs the same in a model of any size.

    specs: of the plan as changed so far. bits: all stored bits with these.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.specs, self.bits = plan, dict(plan.specs), stored_bits(plan)
        self._users = Counter(key for m in plan.matrices for key in self._keys(m, plan.specs[m.name]))

    def added(self, matrix: Matrix, spec: Spec) -> int:
        """Bits that another codec for a matrix adds; negative where it saves bits."""
        now = self.specs[matrix.name]
        bits = matrix.own_bits(spec, False) - matrix.own_bits(now, False)
        gained = (key for key in self._keys(matrix, spec) if not self._users[key])
        lost = (key for key in self._keys(matrix, now) if self._users[key] == 1)
        return bits + sum(map(self._shared_bits, gained)) - sum(map(self._shared_bits, lost))

    def change(self, matrix: Matrix, spec: Spec) -> None:
        """Give a matrix another codec than the one it has."""
        self.bits += self.added(matrix, spec)
        self._users.subtract(self._keys(matrix, self.specs[matrix.name]))
        self._users.update(self._keys(matrix, spec))
        self.specs[matrix.name] = spec

    def _keys(self, matrix: Matrix, spec: Spec) -> list[tuple[Spec, str, str | None]]:
        """What identifies its codebook (which has no decoder's part) and its decoder."""
        codebook, decoder = self.plan.shared(matrix)
        return [(spec, codebook, None), (spec, codebook, decoder)]

    def _shared_bits(self, key: tuple[Spec, str, str | None]) -> int:
        spec, _, decoder = key
        if decoder is None:
            return self.plan.codebook_bits(spec)
        return self.plan.config.codec_for(spec.vector_len).decoder_bits
