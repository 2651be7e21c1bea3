"""Settings of `pocketllm serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from pocketllm.config.checks import at_least, one_of, positive
from pocketllm.errors import ConfigError

ENGINES = ("auto", "transformers", "vllm")


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served.

    host: Address to listen on; others than this machine's own need an API key.
    port: Port to listen on; 0 takes a free one.
    api_key: Key that clients must send.
    engine: transformers, vllm, or auto (vllm where it can read compressed models).
    max_requests: Requests computed together; more wait.
    max_waiting: Requests that may wait; more are refused (429).
    kv_cache_gb: Size of the key-value cache that all requests share, in GB (10^9 bytes).
    max_batch_tokens: Tokens computed in one step, prompts included.
    max_new_tokens: Tokens to generate where a request sets no limit.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False, metadata={"envvar": "POCKETLLM_API_KEY"})
    engine: str = "auto"
    max_requests: int = 32
    max_waiting: int = 256
    kv_cache_gb: float = 1.0
    max_batch_tokens: int = 512
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        """Raises ConfigError: a value out of range, or an address that others reach without a key."""
        one_of("engine", self.engine, ENGINES)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: got {self.port}, wanted 0 (a free one) to 65535")
        for name, least in (("max_requests", 1), ("max_waiting", 0), ("max_new_tokens", 1)):
            at_least(name, getattr(self, name), least)
        at_least("max_batch_tokens", self.max_batch_tokens, self.max_requests)
        positive("kv_cache_gb", self.kv_cache_gb)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ConfigError("api_key: is empty or has characters outside ASCII; choose another")
        if self.api_key is None and not _is_loopback(self.host):
            raise ConfigError(
                f"host: {self.host} can be reached from other machines; set an API key "
                "(POCKETLLM_API_KEY in the environment), or listen on 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
