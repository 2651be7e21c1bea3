"""Compressed models in vLLM: the quantization method `pocketllm`, and the tensors that its loader reads for it.

Matrices are decoded while a model is loaded (vllm_weights.py), so that its layers are vLLM's ordinary ones. In mode
`packed`, layers for which the processor has kernels take them packed (vllm_packed.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from pocketllm.codec.kernels import select
from pocketllm.errors import ConfigError
from pocketllm.format.checkpoint import read_layout
from pocketllm.format.layout import STORE, Layout
from pocketllm.integrations.vllm_packed import PackedMethod, packed_names
from pocketllm.integrations.vllm_parts import embedding_of, parts_of
from pocketllm.integrations.vllm_weights import DenseStream
from pocketllm.source.dense_checkpoint import resolve

LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")
HEAD = "lm_head.weight"
_OURS = "reads_compressed"


class PocketConfig(QuantizationConfig):  # type: ignore[misc] # where vllm is not installed, it has no type
    """The quantization method of a compressed model, as vLLM asks for it."""

    def get_name(self) -> str:
        """As in `quantization_config`."""
        return STORE

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Matrices are decoded to any of these."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has everything."""
        return []

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.layout: Layout | None = None
        self.has_tied_head = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PocketConfig:
        """From `quantization_config`; the layout in it is verified when the weights are read."""
        return cls(config.get("mode", "auto"))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the layout, which tells what can stay packed."""
        self.layout = read_layout(folder_of(model_name, revision))
        text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
        self.has_tied_head = bool(getattr(text, "tie_word_embeddings", False))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes.

        Raises:
            ConfigError: a load format whose loader does not read the tensors that this module supplies.
        """
        load_format = get_current_vllm_config().load_config.load_format
        if load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format: got {load_format}, wanted {' or '.join(LOAD_FORMATS)} for a compressed model"
            )
        names = self._packed_parts(layer, prefix) if self.mode == "packed" else ()
        if names:
            return PackedMethod(names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _packed_parts(self, layer: nn.Module, prefix: str) -> tuple[str, ...]:
        """Names of the matrices of a layer that stays packed."""
        has_kernels = current_platform.is_cpu() and select.packed_isa() is not None
        if self.layout is None or not has_kernels or get_tensor_model_parallel_world_size() > 1:
            return ()
        if isinstance(layer, LinearBase) or (isinstance(layer, ParallelLMHead) and not self.has_tied_head):
            return parts_of(self.layout, prefix, self.packed_modules_mapping)
        if not isinstance(layer, VocabParallelEmbedding):
            return ()
        shape = layer.org_vocab_size, layer.embedding_dim
        return embedding_of(self.layout, shape, heads=(HEAD,))


def register_with_vllm() -> None:
    """Add the method to vLLM's, and supply its loader with the tensors of compressed models."""
    register_quantization_config(STORE)(PocketConfig)
    read_all = DefaultModelLoader.get_all_weights
    if hasattr(read_all, _OURS):  # vLLM may register more than once in a process
        return

    @wraps(read_all)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if model_config.quantization != STORE:
            return read_all(self, model_config, model)
        self.enable_weights_track = True  # a parameter that no tensor fills is an error, as for a dense model
        return decoded_weights(model_config, model)

    setattr(get_all_weights, _OURS, True)
    DefaultModelLoader.get_all_weights = get_all_weights


def decoded_weights(model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a compressed model, less those of layers that other pipeline stages hold.

    Raises:
        FormatError: the folder is damaged or incomplete.
    """
    folder = folder_of(model_config.model, model_config.revision)
    stream = DenseStream.open(folder, model_config.dtype, model_config.trust_remote_code)
    packed = packed_names(model)
    return stream.tensors(
        is_read=lambda name: not is_pp_missing_parameter(name, model),
        stays_packed=lambda name: name in packed,
    )


def folder_of(name: str, revision: str | None) -> Path:
    """The folder of a model that vLLM names by path or Hub id."""
    return resolve(name if revision is None else f"{name}@{revision}")
