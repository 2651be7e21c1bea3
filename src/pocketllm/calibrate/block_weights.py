"""The weights of a dense model on a skeleton: those outside the blocks stay, those of a block come and go.

Of the token embedding only the rows that the text uses are loaded: vocabularies are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.calibrate.block_list import block_list, check_shared, refusal
from pocketllm.format.mapped_pages import drop_files
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_class import language_model_path, output_head
from pocketllm.source.read_ahead import read_ahead

OtherWeights = Callable[[str, Tensor | None], Tensor | None]
"""(name, rows) -> a weight to use instead of the dense one, or of its rows those in `rows`; None for the dense one."""


class BlockWeights:
    """A dense model with the weights that lie outside its blocks, except for those of the head.

    Args:
        source: the dense model. device: where weights are kept, in float32.
        tokens: ids that will be looked up in the embedding.
        weights: of parameters outside the blocks.

    Raises:
        ConfigError: a model without one list of blocks, with blocks that share modules, or without a head.
    """

    def __init__(
        self,
        source: DenseCheckpoint,
        device: str,
        tokens: Tensor,
        weights: OtherWeights = lambda name, rows: None,
    ) -> None:
        self.source, self.device = source, device
        self.number = 0  # of the block that is loaded
        self.model = source.skeleton()
        # Experts one by one, so that the inputs of each are seen.
        self.model.set_experts_implementation("eager")
        for module in self.model.modules():
            for leaf, value in module._buffers.items():
                module._buffers[leaf] = None if value is None else value.to(device)
        self.path, self.blocks = block_list(self.model)
        check_shared(self.model, self.path)
        self.text_path = language_model_path(self.model)
        head = output_head(self.model)
        if head is None:
            raise refusal(self.model, "has no head that gives the logits of tokens")
        self.positions: Tensor | None = (
            None  # [vocabulary] of each token among the loaded rows of the embedding
        )
        self.embedding_name = ""
        for name in source.names():
            parent, inside = name.rpartition(".")[0], f"{self.text_path}." if self.text_path else ""
            is_outside = name.startswith(inside) and not name.startswith(f"{self.path}.")
            module = self.model.get_submodule(parent)
            if is_outside and module is not head:
                rows = self._looked_up(name, module, tokens) if name.endswith(".weight") else None
                given = weights(name, rows)
                if given is None:
                    given = source.read(name) if rows is None else source.read(name)[rows]
                self.set_weight(name, given)
        drop_files(source.files)

    def _looked_up(self, name: str, module: nn.Module, tokens: Tensor) -> Tensor | None:
        """The rows to load of the token embedding, which from now on looks up a token at its position among them.

        None for any other weight.
        """
        if module is not self.model.get_input_embeddings():
            return None
        self.embedding_name = name
        if not isinstance(module, nn.Embedding):
            return None
        rows = tokens.unique()
        positions = torch.zeros(module.num_embeddings, dtype=torch.int64)
        positions[rows] = torch.arange(len(rows))
        self.positions = positions = positions.to(self.device)
        module.padding_idx = None  # changes nothing but gradients
        module.register_forward_pre_hook(lambda _, given: (positions[given[0]], *given[1:]))
        return rows

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the token embedding [len(ids), columns] float32, for tokens that were given when it was loaded."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight[ids if self.positions is None else self.positions[ids]]

    def set_weight(self, name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Put a weight or buffer into the model, floating-point values in `dtype`."""
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        value = value.to(self.device, dtype if value.is_floating_point() else None)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @property
    def text_model(self) -> nn.Module:
        """The part that runs the blocks, from token ids to the final norm."""
        return self.model.get_submodule(self.text_path)

    @contextmanager
    def loaded(self, number: int, following: int = -1) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with its dense weights, which are dropped afterwards.

        Args:
            following: number of the block that will be loaded next, which the system reads meanwhile; -1 for none.
        """
        path, block = f"{self.path}.{number}", self.blocks[number]
        self.number = number
        for name in self.source.names():
            if name.startswith(f"{path}."):
                self.set_weight(name, self.source.read(name))
        if 0 <= following < len(self.blocks):
            own = (name for name in self.source.parts if name.startswith(f"{self.path}.{following}."))
            read_ahead(part for name in own for part in self.source.parts[name])
        yield path, block
        for module in block.modules():
            _drop(module)
        drop_files(self.source.files)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return any(target in self.source.parts for target in self.source.tied.values())

    def load_head(self) -> None:
        """Load the output head, or tie it to the embedding; its matrix stays in the stored dtype."""
        head, path = self._head()
        for name in self.source.names():
            if self.model.get_submodule(name.rpartition(".")[0]) is head:
                self._set_head(name, name)
        for leaf, value in head._parameters.items():  # tied, or a bias that is stored under another name
            stored = self.source.tied.get(f"{path}.{leaf}")
            if value is not None and value.is_meta and stored is not None:
                self._set_head(f"{path}.{leaf}", stored)
        if head.weight.is_meta:
            self._set_head(f"{path}.weight", self.embedding_name)

    def _head(self) -> tuple[Any, str]:
        """The output head and its path."""
        head = self.model.get_output_embeddings()
        return head, next(name for name, module in self.model.named_modules() if module is head)

    def _set_head(self, name: str, stored: str) -> None:
        """Give a parameter of the head the value of a stored one."""
        value = self.source.read(stored)
        self.set_weight(name, value, value.dtype if value.ndim == 2 else torch.float32)

    def drop_head(self) -> None:
        """Free the output head, which is large."""
        head, _ = self._head()
        _drop(head)
        drop_files(self.source.files)


def _drop(module: nn.Module) -> None:
    """Free the parameters of a module; buffers stay, since no file may hold them."""
    for leaf, value in module._parameters.items():
        if value is not None:
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)
