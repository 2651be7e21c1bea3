"""Which tensors of a model are compressed, and the reason for every other one."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.format.report import BY_OVERRIDE, IN_DENSE_BLOCK, IN_TOWER, KEPT_END
from pocketllm.plan.matrices import Dense, Matrix
from pocketllm.plan.stacked_experts import find_experts
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.linear_layers import LAYERS, linear_kind
from pocketllm.source.model_class import find_blocks, input_embedding, language_model_path, output_head

_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


def classify(source: DenseCheckpoint, config: CompressConfig) -> tuple[list[Matrix], list[Dense]]:
    """Split the model's tensors into matrices to compress and dense ones with their reason.

    Raises:
        ConfigError: settings that leave every block dense, or an override that fits no matrix.
    """
    parts = _Parts(source, config)
    if config.dense_first + config.dense_last >= parts.blocks > 0:
        raise ConfigError(
            f"dense_first={config.dense_first} and dense_last={config.dense_last} leave none of the model's "
            f"{parts.blocks} blocks to compress; lower them"
        )
    seen = {name: parts.matrix(name) for name in source.names()}
    names = [name for name, found in seen.items() if isinstance(found, Matrix)]
    for pattern, _ in config.overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"override {pattern!r}: matches no matrix that can be compressed; names look like "
                f"{names[-1] if names else None!r}"
            )
    matrices: list[Matrix] = []
    dense: list[Dense] = []
    for name, found in seen.items():
        reason = found if isinstance(found, str) else _left_dense(found, parts, config)
        if isinstance(found, Matrix) and not reason:
            matrices.append(found)
        else:
            dense.append(Dense(name, source.shape(name), reason))
    return matrices, dense


def override(name: str, config: CompressConfig) -> float | None:
    """Bits per weight that overrides set for a matrix by its name; the last matching pattern applies."""
    found = [bits for pattern, bits in config.overrides if fnmatch.fnmatchcase(name, pattern)]
    return found[-1] if found else None


def _left_dense(matrix: Matrix, parts: _Parts, config: CompressConfig) -> str:
    """Why the settings leave a matrix dense that could be compressed, or ''."""
    match = _BLOCK.match(matrix.name)
    number = int(match["number"]) if match else -1
    if (override(matrix.name, config) or 0) >= 16:
        return BY_OVERRIDE
    if (
        matrix.in_blocks
        and not matrix.in_tower
        and not config.dense_first <= number < parts.blocks - config.dense_last
    ):
        return IN_DENSE_BLOCK
    return KEPT_END if not matrix.in_blocks and config.keep_embeddings else ""


@dataclass(frozen=True)
class _Parts:
    """What the tensors of a model belong to."""

    source: DenseCheckpoint
    config: CompressConfig

    @cached_property
    def ends(self) -> tuple[Any, ...]:
        """Embedding and head."""
        return input_embedding(self.source.model), output_head(self.source.model)

    @cached_property
    def within(self) -> str:
        """What the names of the tensors of blocks begin with.

        Without calibration other lists of modules in the language model count as blocks, too; with it only those that
        are run block after block.
        """
        if self.config.calibration is None:
            path = language_model_path(self.source.model)
        else:
            path, _ = find_blocks(self.source.model) or ("", None)
        return f"{path}." if path else ""

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        names = [name for name in self.source.names() if name.startswith(self.within)]
        return max((int(m["number"]) for name in names if (m := _BLOCK.match(name))), default=-1) + 1

    def matrix(self, name: str) -> Matrix | str:
        """The tensor as a matrix, or the reason why it is not compressed."""
        parent, _, leaf = name.rpartition(".")
        shape, module = self.source.shape(name), self.source.model.get_submodule(parent)
        value = self.source.model.get_parameter_or_buffer(name)
        if not value.dtype.is_floating_point:
            return "integers or booleans"
        match = _BLOCK.match(name)
        in_tower = match is not None and not name.startswith(self.within)
        if in_tower and not self.config.towers:
            return IN_TOWER
        kind = match["rest"] if match else name
        kind = re.sub(r"\.\d+\.", ".*.", kind).removesuffix(".weight")
        if len(shape) > 1 and not isinstance(value, nn.Parameter):
            return "a buffer (computed by the model's class, not trained)"
        found = find_experts(module, name, shape, self._hidden_size) if match else None
        if found is not None:
            rows = found.count * found.rows
            return Matrix(
                name,
                shape,
                rows,
                found.columns,
                kind,
                True,
                transposed=found.transposed,
                in_tower=in_tower,
                experts=found.count,
            )
        if len(shape) != 2:
            return "norm, bias or other small tensor" if len(shape) < 2 else f"a {len(shape)}-D tensor"
        if leaf != "weight" or not isinstance(module, LAYERS):
            return f"a parameter of {type(module).__name__} (router or similar)"
        if any(module is end for end in self.ends):
            return Matrix(name, shape, *shape, kind, False)
        if isinstance(module, nn.Embedding):
            return "an embedding other than the token embedding"
        if not match:
            return "a linear layer outside the blocks"
        plain = linear_kind(type(module))
        if plain is None:
            return (
                f"a parameter of {type(module).__name__}, which is no plain linear layer (router or similar)"
            )
        rows, columns = shape if plain is nn.Linear else shape[::-1]
        return Matrix(name, shape, rows, columns, kind, True, plain is not nn.Linear, in_tower)

    @cached_property
    def _hidden_size(self) -> int | None:
        return getattr(self.source.model.config.get_text_config(), "hidden_size", None)
