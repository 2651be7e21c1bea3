"""The transformers class that opens a checkpoint, and the place of its language model."""

from __future__ import annotations

from typing import Any

from torch import nn


def model_class(config: Any) -> Any:
    """The class that `architectures` in a model's configuration names, or the Auto class that builds it.

    So a reward model keeps its own head, and a multimodal model its towers. `AutoModelForCausalLM` is used for
    the name of a causal language model, and for one that transformers does not know.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = str((getattr(config, "architectures", None) or [""])[0])
    for auto, code in (getattr(config, "auto_map", None) or {}).items():
        if auto.startswith("AutoModel") and str(code).rpartition(".")[2] == named:
            return getattr(transformers, auto, transformers.AutoModelForCausalLM)
    if named != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type):
        found = getattr(transformers, named, None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and isinstance(config, found.config_class or ()):  # type: ignore[union-attr]
            return found
    return transformers.AutoModelForCausalLM


def build(config: Any, trust_remote_code: bool, **options: Any) -> Any:
    """A model of its class with random weights, on the current default device."""
    cls = model_class(config)
    if hasattr(cls, "from_config"):  # an Auto class
        return cls.from_config(config, trust_remote_code=trust_remote_code, **options)
    return cls._from_config(config, **options)


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Path -> first path of the same module, for every further path under which a model holds it.

    Modules without tensors of their own, such as activation functions, are left out.
    """
    first: dict[int, str] = {}
    held = [
        (path, m) for path, m in model.named_modules(remove_duplicate=False) if m._parameters or m._buffers
    ]
    paths = [(first.setdefault(id(m), path), path) for path, m in held]
    return {path: original for original, path in paths if path != original}


def input_embedding(model: Any) -> nn.Module | None:
    """The token embedding of a model, if it declares one (models of audio have several)."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList) else None


def output_head(model: Any) -> nn.Module | None:
    """The head that gives the logits of tokens; None for a class that has another head, several, or none."""
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList) else None


def find_blocks(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The blocks of the language model and their path: the list of modules with the most weights.

    Lists within lists are left out, and so is what lies outside `language_model_path`.
    """
    scope = language_model_path(model)
    return max(_lists(model, scope), key=lambda found: _weights(found[1]), default=None)


def language_model_path(model: Any) -> str:
    """Path of the smallest module that holds both the token embedding and a list of modules; '' for all of it.

    The towers of a multimodal model (vision, audio) lie outside.
    """
    embedding = input_embedding(model)
    path = next((name for name, module in model.named_modules() if module is embedding), "")
    while path:
        path = path.rpartition(".")[0]
        if _lists(model, path):
            break
    return path


def _lists(model: nn.Module, scope: str) -> list[tuple[str, nn.ModuleList]]:
    """(path, list) of the lists of modules in a part of a model, lists within lists left out."""
    within = f"{scope}." if scope else ""
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and name.startswith(within)
    ]
    paths = {name for name, _ in lists}
    return [(name, m) for name, m in lists if not any(outer in paths for outer in _above(name))]


def _above(path: str) -> list[str]:
    """Paths of the modules that contain a module."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _weights(module: nn.Module) -> tuple[int, int]:
    """Number of weights, then of modules."""
    return sum(p.numel() for p in module.parameters()), len(list(module.children()))
