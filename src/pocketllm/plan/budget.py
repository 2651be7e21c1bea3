"""A budget of stored bits, and the search for the plan that spends it with the least predicted loss.

`MixedRates` and `UniformRates` are two ways to spend it; the form of index determines which applies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from pocketllm.codec.index_form import form_of
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError, TargetError
from pocketllm.plan.matrices import Dense, Matrix, Plan, Spec


@dataclass(frozen=True)
class Budget(ABC):
    """The matrices of a model and the bits to spend on them.

    importance: loss that a matrix causes per unit of its nmse, by name; None if all weights count equally.
    """

    matrices: tuple[Matrix, ...]
    dense: tuple[Dense, ...]
    config: CompressConfig
    importance: Mapping[str, float] | None = None

    slack = 1.0
    """The target may exceed the largest uniform plan by this factor; then that plan is good enough."""

    @abstractmethod
    def uniform(self) -> list[Plan]:
        """Plans with one codec for all matrices (or one each for blocks and ends), whatever their size."""

    @abstractmethod
    def refined(self, plans: list[Plan]) -> Plan:
        """A better plan than these uniform ones, all of which are within the budget."""

    @abstractmethod
    def value(self, matrix: Matrix) -> float:
        """Predicted loss per unit of nmse of a matrix."""

    def best(self) -> Plan:
        """The plan of least predicted loss.

        Raises:
            ConfigError: the model is too small for any codec. TargetError: the target is out of range.
        """
        target, plans = self.target, self.uniform()
        reached = [plan.bpw for plan in plans]
        within = [plan for plan, bpw in zip(plans, reached, strict=True) if bpw <= target]
        if within and target <= self.slack * max(reached):
            return self.refined(within)
        if not reached or min(reached) >= 16:
            raise ConfigError(
                "the model is too small for any codec (fewer subvectors than codewords); nothing to compress"
            )
        raise TargetError(
            f"target_bpw: {target} cannot be met with these settings; "
            f"the possible range is {min(reached):.3f} to {max(reached):.3f} bits per weight",
            min(reached),
            max(reached),
        )

    @property
    def target(self) -> float:
        """Bits per weight."""
        assert self.config.target_bpw is not None
        return self.config.target_bpw

    @property
    def weights(self) -> int:
        """Weights of all matrices."""
        return sum(m.weights for m in self.matrices)

    def plan(self, specs: dict[str, Spec], scope: str) -> Plan:
        """The plan that gives every matrix the spec of its name."""
        return Plan(self.matrices, specs, self.dense, scope, self.config)

    def offered(self) -> list[Spec]:
        """The codecs to choose from.

        Raises:
            ConfigError: there are none.
        """
        found = [
            Spec(d, form.codebook_size, form.stride, form.window)
            for d, form in form_of(self.config.codec).offered(self.config)
        ]
        if not found:
            raise ConfigError(
                f"vector_len: no codec has {self.config.vector_len} weights per index with trellis_width="
                f"{self.config.codec.trellis_width}; use another vector_len, or none"
            )
        return found

    def loss(self, specs: Mapping[str, Spec]) -> float:
        """The predicted loss of all matrices."""
        return sum(self.value(m) * specs[m.name].nmse for m in self.matrices)


def stored_bits(plan: Plan) -> int:
    """All stored bits of a plan's matrices."""
    return sum(plan.bits_by_part().values())
