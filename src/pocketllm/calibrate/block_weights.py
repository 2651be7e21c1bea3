"""The weights of a dense model on a skeleton: those outside the blocks stay, those of a block come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pocketllm.calibrate.block_list import block_list, check_shared, refusal
from pocketllm.format.mapped_pages import drop_files
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_class import language_model_path, output_head


class BlockWeights:
    """A dense model with the weights that lie outside its blocks, except for those of the head.

    Args:
        source: the dense model. device: where weights are kept, in float32.
        weights: of parameters outside the blocks, to use instead of the dense ones.

    Raises:
        ConfigError: a model without one list of blocks, with blocks that share modules, or without a head.
    """

    def __init__(
        self, source: DenseCheckpoint, device: str, weights: Mapping[str, Tensor] | None = None
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
        for name in source.names():
            parent, inside = name.rpartition(".")[0], f"{self.text_path}." if self.text_path else ""
            is_outside = name.startswith(inside) and not name.startswith(f"{self.path}.")
            if is_outside and self.model.get_submodule(parent) is not head:
                given = (weights or {}).get(name)
                self.set_weight(name, source.read(name) if given is None else given)
        self._files = {part.file for parts in source.parts.values() for part in parts}
        drop_files(self._files)

    def set_weight(self, name: str, value: Tensor) -> None:
        """Put a weight or buffer into the model, floating-point values in float32."""
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        value = value.to(self.device, torch.float32 if value.is_floating_point() else None)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @property
    def text_model(self) -> nn.Module:
        """The part that runs the blocks, from token ids to the final norm."""
        return self.model.get_submodule(self.text_path)

    @contextmanager
    def loaded(self, number: int) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with its dense weights, which are dropped afterwards."""
        path, block = f"{self.path}.{number}", self.blocks[number]
        self.number = number
        for name in self.source.names():
            if name.startswith(f"{path}."):
                self.set_weight(name, self.source.read(name))
        yield path, block
        for module in block.modules():  # buffers that no file holds stay
            for leaf, value in module._parameters.items():
                if value is not None:
                    module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)
        drop_files(self._files)

    def drop_embedding(self) -> None:
        """Free the token embedding, which is the largest of the weights outside the blocks and comes before them."""
        embedding = self.model.get_input_embeddings()
        embedding._parameters["weight"] = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return any(target in self.source.parts for target in self.source.tied.values())

    def load_head(self) -> None:
        """Load the output head, or tie it to the embedding."""
        head = self.model.get_output_embeddings()
        for name in self.source.names():
            if self.model.get_submodule(name.rpartition(".")[0]) is head:
                self.set_weight(name, self.source.read(name))
        if head.weight.is_meta:
            head._parameters["weight"] = self.model.get_input_embeddings().weight
        path = next(name for name, module in self.model.named_modules() if module is head)
        for leaf, value in head._parameters.items():  # a bias that is stored under another name
            source = self.source.tied.get(f"{path}.{leaf}")
            if value is not None and value.is_meta and source is not None:
                head._parameters[leaf] = nn.Parameter(
                    self.source.read(source).to(self.device, torch.float32), requires_grad=False
                )
