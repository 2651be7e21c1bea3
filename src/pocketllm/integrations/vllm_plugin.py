"""The plug-in that vLLM loads in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging


def register() -> None:
    """Let vLLM load compressed models. Where that fails, vLLM must still load others, so nothing is raised."""
    try:
        from pocketllm.integrations.vllm_quantization import register_with_vllm

        register_with_vllm()
    except Exception as error:
        logging.getLogger("vllm.pocketllm").warning(
            "vLLM cannot load models compressed by pocketllm: %s: %s; "
            "install a version of pocketllm-codec for this version of vLLM, or uninstall it",
            type(error).__name__,
            error,
        )
