"""Compressed models in vLLM: the quantization method `pocketllm`, and the tensors that its loader reads for it.

The matrices are decoded while a model is loaded (vllm_weights.py), so its layers are vLLM's ordinary ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from pocketllm.errors import ConfigError
from pocketllm.format.layout import STORE
from pocketllm.integrations.vllm_weights import DenseStream
from pocketllm.source.dense_checkpoint import resolve

LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")


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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PocketConfig:
        """From `quantization_config`, which is verified when the weights are read."""
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """That of an ordinary layer.

        Raises:
            ConfigError: a load format whose loader does not read the tensors that this module supplies.
        """
        load_format = get_current_vllm_config().load_config.load_format
        if load_format not in LOAD_FORMATS:
            raise ConfigError(
                f"load_format: got {load_format}, wanted {' or '.join(LOAD_FORMATS)} for a compressed model"
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register_with_vllm() -> None:
    """Add the method to vLLM's, and supply its loader with the tensors of compressed models."""
    register_quantization_config(STORE)(PocketConfig)
    read_all = DefaultModelLoader.get_all_weights
    if hasattr(read_all, "__wrapped__"):
        return

    @wraps(read_all)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        if model_config.quantization != STORE:
            return read_all(self, model_config, model)
        self.enable_weights_track = True  # a parameter that no tensor fills is an error, as for a dense model
        return decoded_weights(model_config, model)

    DefaultModelLoader.get_all_weights = get_all_weights


def decoded_weights(model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a compressed model, less those of layers that other pipeline stages hold.

    Raises:
        FormatError: the folder is damaged or incomplete.
    """
    name, revision = model_config.model, model_config.revision
    folder = resolve(name if revision is None else f"{name}@{revision}")
    stream = DenseStream.open(folder, model_config.dtype, model_config.trust_remote_code)
    return stream.tensors(is_read=lambda name: not is_pp_missing_parameter(name, model))
