"""transformers plug-in: `AutoModelForCausalLM.from_pretrained` reads and `save_pretrained` writes the format.

Two ways to run a model: `packed` keeps indices packed in memory, and layers multiply straight from them where there
is a kernel (others decode their weight each time they run); `dense` decodes every weight once at load into ordinary
layers. `auto` is `packed` where every layer has a kernel, `dense` elsewhere.
"""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pocketllm.errors import ConfigError, OutputError
from pocketllm.format import checkpoint as ckpt
from pocketllm.runtime.layers import (
    PackedMatrix,
    Store,
    attach_tied,
    compute_weights,
    decode_in_place,
    packed_matrices,
    reason_to_decode,
    replace_parameters,
)
from pocketllm.runtime.load_checks import (
    check_shapes,
    give_back_missing,
    is_named,
    take_over_missing,
    verify_before_building,
    verify_before_reading,
    verify_loaded,
)
from pocketllm.runtime.model_methods import (
    initialize,
    resize,
    run_experts_one_by_one,
    save,
    stored_once,
    tie,
)
from pocketllm.runtime.stored_tensors import Unread

MODES = ("auto", "dense", "packed")

logger = logging.getLogger(__name__)


@register_quantization_config(ckpt.STORE)
class PocketQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model; see FORMAT.md for its keys."""

    def __init__(
        self,
        mode: str = "auto",
        producer: dict[str, str] | str = "",
        quant_method: str = ckpt.STORE,
        **layout: Any,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode: got {mode!r}, wanted one of {', '.join(MODES)}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.mode = mode
        if isinstance(producer, str):  # as version 0.1.0 wrote it: "pocketllm-codec 0.1.0"
            name, _, version = producer.partition(" ")
            producer = {"name": name, "version": version}
        self.producer = producer
        ckpt.Layout.from_dict(layout)
        self.__dict__.update(layout)

    def __deepcopy__(self, memo: Any) -> PocketQuantizationConfig:
        """The entries of a layout are replaced, never modified, so copies share them: there are thousands."""
        return copy(self)

    def layout(self) -> ckpt.Layout:
        """The typed form."""
        own = ("quant_method", "mode", "producer")
        return ckpt.Layout.from_dict({k: v for k, v in self.__dict__.items() if k not in own})

    def set_layout(self, layout: ckpt.Layout) -> None:
        """Describe another form than the one that was read."""
        self.__dict__.update(layout.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All keys, with entries that copies share; see `__deepcopy__`."""
        return dict(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """All keys; there is no default layout to compare with."""
        return self.to_dict()


@register_quantizer(ckpt.STORE)
class PocketQuantizer(HfQuantizer):
    """Swaps parameters for packed ones before loading, verifies and (mode `dense`) decodes them after."""

    quantization_config: PocketQuantizationConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._tied: dict[str, str] = {}
        self._decoded: tuple[dict[str, PackedMatrix], Store] | None = None
        self._verified: Path | None = None
        self._unread: Unread | None = None
        self._layout: ckpt.Layout | None = None
        self.needs_no_conversion = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Only models that are already compressed can be loaded."""
        if not self.pre_quantized:
            raise ConfigError(
                "a dense model cannot be compressed while loading; use pocketllm.compress first"
            )
        places = kwargs.get("device_map")
        if "disk" in (places.values() if isinstance(places, dict) else ()):
            raise ConfigError("device_map: offloading to disk is not supported; remove `disk`")

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the configuration before a model of its sizes is built: the files are verified here."""
        self._verified = verify_before_building(config)
        return config

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works in both modes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained in both modes; transformers' Trainer refuses a model without any."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile holds packed products as one operator, so `generate` may compile the forward pass."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from transformers import modeling_utils  # which is still being imported when this module is

        verify_before_reading(kwargs.get("checkpoint_files"), self._verified)
        stored = self.quantization_config.layout()
        layout, names = layout_for(model, stored)
        self._layout = layout
        if layout.matrices.keys() != stored.matrices.keys():
            self.quantization_config.set_layout(layout)
        check_shapes(model, layout)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        replace_parameters(model, layout, dtype)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        known = layout.matrices
        self._tied = {n: source for n, source in tied.items() if source in known and n not in known}
        for name, source in self._tied.items():
            attach_tied(model, name, source)
        if tied:
            model.all_tied_weights_keys = {n: s for n, s in tied.items() if n not in self._tied}
        self._unread = Unread.of(model, kwargs.get("checkpoint_files"), kwargs.get("device_map"), names)
        hidden = set() if self._unread is None else self._unread.stored_names()
        self.needs_no_conversion = self._unread is not None and self._unread.are_others_of(model, hidden)
        vars(modeling_utils)["get_model_conversion_mapping"] = _conversions_of  # what is called next
        model.initialize_weights = partial(initialize, model)
        take_over_missing(model, self._tied, hidden)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.initialize_weights
        give_back_missing(model)
        is_mapped = self._unread is not None
        if self._unread is not None:
            self._unread.read(model)
        self._unread, store = None, getattr(model, ckpt.STORE)
        assert self._layout is not None
        verify_loaded(model, self._layout, is_mapped)
        model.save_pretrained = partial(save, model)
        if self._decodes(model):
            self._decoded = decode_in_place(model), store
            model.all_tied_weights_keys = {**(model.all_tied_weights_keys or {}), **self._tied}
        else:
            compute_weights(model)
            run_experts_one_by_one(model)
            model.tie_weights = partial(tie, model)
            model.resize_token_embeddings = partial(resize, model)
        return model

    def _decodes(self, model: Any) -> bool:
        """Whether the weights are decoded now."""
        if self.quantization_config.mode != "auto":
            return self.quantization_config.mode == "dense"
        reason = reason_to_decode(model)
        if reason:
            logger.warning(
                "%s is decoded at load, as in mode dense: %s", model.name_or_path or "the model", reason
            )
        return bool(reason)

    def packed(self, model: Any) -> dict[str, PackedMatrix]:
        """The packed matrices by parameter name; in mode `dense` those its weights were decoded from."""
        return packed_matrices(model) if self._decoded is None else self._decoded[0]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """What `save_pretrained` writes: the packed form, in mode `dense`, too.

        An embedding or head that was resized is written dense, and no longer described in config.json.
        """
        state = None if self._decoded is None else self._packed_state(model)
        state = stored_once(model, state)
        kept, config = self.packed(model), model.config.quantization_config
        layout = config.layout()
        matrices = {name: entry for name, entry in layout.matrices.items() if name in kept}
        config.set_layout(replace(layout, matrices=matrices))
        return state, {}

    def _packed_state(self, model: Any) -> dict[str, Tensor]:
        """The packed form of a model in mode `dense`."""
        assert self._decoded is not None
        state = dict(model.state_dict())
        packed, store = self._decoded
        for name in [name for name, matrix in packed.items() if state[name].shape != matrix.entry.shape]:
            del packed[name]
        for name, matrix in packed.items():
            current = state.pop(name)
            if not torch.equal(matrix().to(current.device, current.dtype), current):
                raise OutputError(
                    f"{name}: was changed after decoding, and the packed form would lose the change; "
                    "delete model.hf_quantizer and model.config.quantization_config to save it dense"
                )
            state[f"{name}.indices"] = _buffer(matrix, "indices")
            if "row_scale" in matrix._buffers:
                state[f"{name}.row_scale"] = _buffer(matrix, "row_scale")
        for name, source in self._tied.items():
            if source in packed:
                state.pop(name, None)
        for name, value in store.state_dict().items():
            state[f"{ckpt.STORE}.{name}"] = value
        return state


def _conversions_of(model: Any, key_mapping: Any = None, hf_quantizer: Any = None, **options: Any) -> Any:
    """transformers' conversions of the tensors that a checkpoint stores: none if they are stored as the model has them.

    To find those of one model, transformers builds those of all that it knows, which takes long.
    """
    if key_mapping is None and isinstance(hf_quantizer, PocketQuantizer) and hf_quantizer.needs_no_conversion:
        return []
    return conversion_mapping.get_model_conversion_mapping(model, key_mapping, hf_quantizer, **options)


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer = module.get_buffer(name)
    assert isinstance(buffer, Tensor)
    return buffer


def layout_for(model: Any, layout: ckpt.Layout) -> tuple[ckpt.Layout, dict[str, str]]:
    """The layout under the names that a class of the same model has, as transformers renames stored tensors.

    `AutoModel` leaves out the prefix of the base model. A class that config.json does not name may lack what lies
    outside the base model: a head of its own takes the place of the one that is stored.

    Returns:
        The layout, and parameter -> its name in the files.
    """
    names, prefix = model.state_dict(), model.base_model_prefix
    matrices, stored = {}, {}
    for name, entry in layout.matrices.items():
        found = rename_source_key(name, [], [], prefix, names)[0] if prefix else name
        if found in names or is_named(model) or name.startswith(f"{prefix}."):
            matrices[found], stored[found] = entry, name
    return replace(layout, matrices=matrices), stored
