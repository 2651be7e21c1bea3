"""Choose the codec of every matrix: the least predicted loss within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pocketllm.codec.hashed_table import ENTRIES
from pocketllm.config import SCOPES, CompressConfig
from pocketllm.config.constants import BUDGET_LEFT, DEAR_CODEBOOKS, HASHED_NMSE, TRELLIS_STEPS, VECTOR_LENS
from pocketllm.errors import ConfigError, TargetError
from pocketllm.plan.matrices import Dense, Matrix, Plan, Spec
from pocketllm.plan.selection import classify, override
from pocketllm.source.dense_checkpoint import DenseCheckpoint


def make_plan(
    source: DenseCheckpoint,
    config: CompressConfig,
    importance: Mapping[str, float] | None = None,
    strip_rows: Mapping[str, int] | None = None,
) -> Plan:
    """Decide for every tensor of the model.

    Args:
        importance: loss that a matrix causes per unit of its nmse, by name, as measured by calibration. Bits
            on a trellis go where they reduce the total loss most; without it all weights count equally.
        strip_rows: rows of the strips of a matrix, by name, if not the default.

    Returns:
        A spec for every matrix, a reason for every other tensor.

    Raises:
        ConfigError: nothing to compress, the target cannot be met (the message names the smallest and
            largest possible), or a codebook larger than the number of subvectors that share it.
    """
    matrices, dense = classify(source, config)
    if strip_rows:
        matrices = [replace(m, strip_rows=strip_rows.get(m.name, m.strip_rows)) for m in matrices]
    while True:
        if not matrices:
            raise ConfigError(
                "no tensor is left to compress; the model is too small for these settings, "
                "or too many blocks or matrices are left dense"
            )
        if config.codec.trellis_width is not None:
            plan = _by_importance(matrices, dense, config, importance)
        else:
            plan = _uniform(matrices, dense, config)
        useless = [m for m in matrices if plan.own_bits(m) >= 16 * m.weights]
        if not useless:
            return plan
        for matrix in useless:
            matrices.remove(matrix)
            dense.append(Dense(matrix.name, matrix.shape, "coding it would not make it smaller than 16 bit"))


def _by_importance(
    matrices: list[Matrix], dense: list[Dense], config: CompressConfig, importance: Mapping[str, float] | None
) -> Plan:
    """Trellis codecs, each matrix with its own number of bits.

    Every codec in use has a codebook. If codebooks take a large share of the bits, as in small models, fewer may
    be better.
    """
    assert config.target_bpw is not None
    value = {m.name: importance[m.name] if importance else float(m.weights) for m in matrices}
    budget = _Budget(matrices, dense, config, value)
    choices = {m.name: _choices(m, config) for m in matrices}
    sizes = [budget.bits(specs) / budget.weights for specs in _single_codec(choices)]
    best = budget.best(choices)
    if best is None or config.target_bpw > 1.01 * max(sizes):
        raise _unreachable(config.target_bpw, sizes)
    if budget.codebook_share(best) > DEAR_CODEBOOKS:
        every = {spec for own in choices.values() for spec in own}
        families = [
            {spec for spec in every if spec.vector_len == d}
            for d in sorted({spec.vector_len for spec in every})
        ]
        starts = [best, *filter(None, (budget.best(_of(choices, some)) for some in families))]
        best = min((_fewer(budget, choices, start) for start in starts), key=budget.loss)
    return budget.plan(best)


@dataclass(frozen=True)
class _Budget:
    """Codecs for matrices within a number of bits. value: loss per unit of nmse, by matrix."""

    matrices: list[Matrix]
    dense: list[Dense]
    config: CompressConfig
    value: Mapping[str, float]

    @property
    def weights(self) -> int:
        return sum(m.weights for m in self.matrices)

    @property
    def most(self) -> float:
        """The budget of stored bits."""
        assert self.config.target_bpw is not None
        return self.config.target_bpw * self.weights

    def plan(self, specs: dict[str, Spec]) -> Plan:
        scope = "model" if self.config.codebook_scope == "auto" else self.config.codebook_scope
        return Plan(tuple(self.matrices), specs, tuple(self.dense), scope, self.config)

    def bits(self, specs: dict[str, Spec]) -> int:
        return sum(self.plan(specs).bits_by_part().values())

    def codebook_share(self, specs: dict[str, Spec]) -> float:
        parts = self.plan(specs).bits_by_part()
        return parts["codebooks"] / sum(parts.values())

    def loss(self, specs: dict[str, Spec]) -> float:
        """Predicted."""
        return sum(self.value[m.name] * specs[m.name].nmse for m in self.matrices)

    def best(self, choices: Mapping[str, list[Spec]]) -> dict[str, Spec] | None:
        """The specs of least loss within the budget; None if there are none.

        For a price per bit every matrix takes the codec with the least importance * nmse + price * bits; the price
        is bisected until the budget is met, and the remaining bits are spent matrix by matrix.
        """

        def at(price: float) -> dict[str, Spec]:
            return {
                m.name: min(
                    choices[m.name],
                    key=lambda spec: self.value[m.name] * spec.nmse + price * spec.index_bpw * m.weights,
                )
                for m in self.matrices
            }

        cheap, dear = -80.0, 80.0  # base-2 logarithms of the price
        best = min(_single_codec(choices), key=self.bits)
        if self.bits(best) > self.most:
            return None
        for _ in range(40):
            middle = (cheap + dear) / 2
            specs = at(2.0**middle)
            if self.bits(specs) <= self.most:
                dear, best = middle, specs
            else:
                cheap = middle
        while True:
            spent = self._spend(best, choices)
            if spent == best or self.bits(spent) > (1 - BUDGET_LEFT) * self.most:
                return spent
            best = spent

    def _spend(self, specs: dict[str, Spec], choices: Mapping[str, list[Spec]]) -> dict[str, Spec]:
        """Raise single matrices to their next codec, most useful first, while the budget lasts.

        First to codecs already in use, which need no additional codebook, then to any.
        """
        for allowed in (set(specs.values()), None):
            steps = []
            for m in self.matrices:
                now = specs[m.name]
                higher = [
                    s
                    for s in choices[m.name]
                    if s.index_bpw > now.index_bpw and (allowed is None or s in allowed)
                ]
                if higher:
                    gain = self.value[m.name] * (now.nmse - higher[0].nmse)
                    steps.append(
                        (gain / (higher[0].index_bpw - now.index_bpw) / m.weights, m.name, higher[0])
                    )
            for _, name, spec in sorted(steps, key=lambda step: (-step[0], step[1])):
                raised = {**specs, name: spec}
                if self.bits(raised) <= self.most:
                    specs = raised
        return specs


def _fewer(budget: _Budget, choices: Mapping[str, list[Spec]], best: dict[str, Spec]) -> dict[str, Spec]:
    """Drop codecs in use one by one, as long as the others use the freed bits to lower the loss."""
    while True:
        used = set(best.values())
        tried = [budget.best(_of(choices, used - {spec})) for spec in sorted(used)]
        better = min(filter(None, tried), key=budget.loss, default=best)
        if budget.loss(better) >= budget.loss(best):
            return best
        best = better


def _of(choices: Mapping[str, list[Spec]], some: set[Spec]) -> dict[str, list[Spec]]:
    """The choices restricted to some codecs, for matrices that may take one of them."""
    return {name: [spec for spec in own if spec in some] or own for name, own in choices.items()}


def _choices(matrix: Matrix, config: CompressConfig) -> list[Spec]:
    """The codecs a matrix may take, by rising bits."""
    width = config.codec.trellis_width
    assert width is not None
    lens = None if config.vector_len is None else (config.vector_len,)
    size, window = (ENTRIES, width) if config.codec.hashed else (1 << width, 0)
    steps = HASHED_NMSE if config.codec.hashed else TRELLIS_STEPS
    specs = [
        Spec(d, size, stride, window)
        for d, stride in steps
        if stride <= width and (lens is None or d in lens)
    ]
    wanted = override(matrix.name, config)
    if wanted is not None:
        below = [spec for spec in specs if spec.index_bpw <= wanted]
        specs = [max(below, key=lambda spec: spec.index_bpw)] if below else specs[:1]
    return sorted(specs, key=lambda spec: spec.index_bpw)


def _single_codec(choices: Mapping[str, list[Spec]]) -> list[dict[str, Spec]]:
    """Each codec for all matrices that may take it: with few weights, codebooks cost more than indices."""
    every = dict.fromkeys(spec for specs in choices.values() for spec in specs)
    return [{name: spec if spec in own else own[0] for name, own in choices.items()} for spec in every]


def _uniform(matrices: list[Matrix], dense: list[Dense], config: CompressConfig) -> Plan:
    """The same codec for every matrix of the blocks, a finer one for embedding and head."""

    def plan(specs: dict[str, Spec], scope: str) -> Plan:
        return Plan(tuple(matrices), specs, tuple(dense), scope, config)

    scopes = SCOPES if config.codebook_scope == "auto" else (config.codebook_scope,)
    if config.codebook_size is not None:
        assert config.vector_len is not None
        spec = Spec(config.vector_len, config.codebook_size)
        fixed = [plan({m.name: spec for m in matrices}, scope) for scope in scopes]
        usable = [candidate for candidate in fixed if _fits_samples(candidate)]
        if not usable:
            most = max(min(_subvectors(group, spec) for group in p.groups().values()) for p in fixed)
            raise ConfigError(
                f"codebook_size: got {spec.codebook_size}, but only {most} subvectors share the smallest "
                f"codebook (scope {fixed[-1].codebook_scope}); lower it or widen the scope"
            )
        return min(usable, key=lambda candidate: candidate.bpw)
    assert config.target_bpw is not None
    best: tuple[float, Plan] | None = None
    reached: list[float] = []
    for scope in scopes:
        for blocks, ends in _uniform_specs(matrices, config):
            candidate = plan({m.name: blocks if m.in_blocks else ends for m in matrices}, scope)
            if not _fits_samples(candidate):
                continue
            reached.append(candidate.bpw)
            if candidate.bpw <= config.target_bpw:
                loss = _predicted_loss(candidate)
                if best is None or loss < best[0]:
                    best = loss, candidate
    if best is None:
        raise _unreachable(config.target_bpw, reached)
    filled = _fill(best[1])
    if config.target_bpw > 1.5 * max(reached, default=0.0):
        raise _unreachable(config.target_bpw, reached)
    return filled


def _unreachable(target: float, reached: list[float]) -> ConfigError:
    if not reached or min(reached) >= 16:
        return ConfigError(
            "the model is too small for any codec (fewer subvectors than codewords); nothing to compress"
        )
    return TargetError(
        f"target_bpw: {target} cannot be met with these settings; "
        f"the possible range is {min(reached):.3f} to {max(reached):.3f} bits per weight",
        min(reached),
        max(reached),
    )


def _uniform_specs(matrices: list[Matrix], config: CompressConfig) -> Iterable[tuple[Spec, Spec]]:
    """Pairs (spec of the blocks, spec of embedding and head) worth comparing."""
    widths = range(1, config.max_index_bits + 1)
    lens = VECTOR_LENS if config.vector_len is None else (config.vector_len,)
    ends_lens = sorted({*VECTOR_LENS, *lens})
    has_ends = any(not m.in_blocks for m in matrices)
    has_blocks = any(m.in_blocks for m in matrices)
    for d in lens:
        for width in widths:
            spec = Spec(d, 1 << width)
            if not has_ends or not has_blocks:
                yield spec, spec
                continue
            # Embedding and head: the finest codec that is about `embedding_extra_bits` finer.
            wanted = spec.nmse * 4.0**-config.embedding_extra_bits
            options = [Spec(e, 1 << w) for e in ends_lens for w in widths]
            close = [o for o in options if o.nmse <= wanted * 1.05]
            rate = [(math.log2(o.codebook_size) / o.vector_len, o.codebook_size, o) for o in close]
            if rate:
                yield spec, min(rate)[2]


def _subvectors(group: list[Matrix], spec: Spec) -> int:
    return sum(m.subvectors(spec.vector_len) for m in group)


def _fits_samples(plan: Plan) -> bool:
    """Every codebook is at most as large as the number of subvectors that share it."""
    return all(
        plan.specs[group[0].name].codebook_size <= _subvectors(group, plan.specs[group[0].name])
        for group in plan.groups().values()
    )


def _predicted_loss(plan: Plan) -> float:
    """Predicted nmse summed over weights; embedding and head count more, according to their extra bits."""
    weight = 4.0**plan.config.embedding_extra_bits
    return sum(m.weights * plan.specs[m.name].nmse * (1.0 if m.in_blocks else weight) for m in plan.matrices)


def _fill(plan: Plan) -> Plan:
    """Spend the remaining budget: matrices take a codebook of twice the size while it fits."""
    target = plan.config.target_bpw
    assert target is not None
    budget = target * plan.weights

    def upgraded(count: int) -> Plan:
        chosen = {m.name for m in order[:count]}
        specs = {
            name: Spec(spec.vector_len, 2 * spec.codebook_size) if name in chosen else spec
            for name, spec in plan.specs.items()
        }
        return Plan(plan.matrices, specs, plan.dense, plan.codebook_scope, plan.config)

    def fits(candidate: Plan) -> bool:
        return sum(candidate.bits_by_part().values()) <= budget and _fits_samples(candidate)

    blocks = [m for m in plan.matrices if m.in_blocks] or list(plan.matrices)
    if 2 * plan.specs[blocks[0].name].codebook_size > 1 << (plan.config.max_index_bits + 1):
        return plan
    # Kinds in turn, then single matrices: the largest prefix of that order that fits (bisection).
    order = sorted(blocks, key=lambda m: m.kind)
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(upgraded(middle)):
            low = middle
        else:
            high = middle - 1
    candidate = upgraded(low)
    return candidate if low and _predicted_loss(candidate) < _predicted_loss(plan) else plan
