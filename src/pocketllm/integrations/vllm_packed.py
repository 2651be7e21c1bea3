"""vLLM's layers with weights that stay packed, where the processor has kernels for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from pocketllm.integrations.vllm_parts import Parts


class PackedMethod(LinearMethodBase):  # type: ignore[misc] # where vllm is not installed, it has no type
    """Linear layers, embeddings and heads that multiply straight from the packed streams of their parts.

    names: of the matrices, in the dense checkpoint.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """A `weight` without numbers that takes the packed parts."""
        parts = Parts(" and ".join(self.names))
        weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": parts.take})
        layer.register_parameter("weight", weight)
        layer.packed_parts, layer.packed_dtype = parts, params_dtype
        layer.packed_rows = getattr(layer, "org_vocab_size", sum(output_partition_sizes))

    def process_weights_after_loading(self, layer: Any) -> None:
        """See that every part is there. A tied head shares those of the embedding."""
        if not layer.packed_parts.products:
            layer.packed_parts.complete(layer.packed_rows)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        found: Tensor = layer.packed_parts.linear(x, bias)
        return found

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """Rows of W."""
        found: Tensor = layer.packed_parts.look_up(ids, layer.packed_dtype)
        return found

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head use the packed matrix of the embedding."""
        layer.weight, layer.packed_parts = embed_tokens.weight, embed_tokens.packed_parts
        return layer


def packed_names(model: nn.Module) -> set[str]:
    """Names of the matrices that the layers of a model take packed."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    return {name for method in methods if isinstance(method, PackedMethod) for name in method.names}
