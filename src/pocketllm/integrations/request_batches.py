"""Running the requests of a server: all together by transformers' continuous batching, or one after another.

Batching is the default. When the server starts, a few tokens generated in a batch are compared with the model's own
logits; a model that batches cannot run (recurrent layers, attention without a paged form) is served one request at a
time.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
)
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.utils import (
    drain_queue,
    find_head_dim,
    find_num_key_value_heads,
)

from pocketllm.config.serve_config import ServeConfig
from pocketllm.errors import ConfigError, LoadError, reason_of
from pocketllm.integrations.request_sampling import RequestSampler
from pocketllm.integrations.serve_answers import Answering, AnswerQueue, stream_error
from pocketllm.integrations.serve_requests import RequestError

_PAGE = 64  # tokens of the cache that are given out together
_TRIAL_TOKENS, _TRIAL_SECONDS = 4, 120
_LEAST_MARGIN = 0.05  # of the range between the mean and the largest logit: what rounding may change


class _BatchStreamer(CBStreamer):
    """Keeps the ids of the new tokens."""

    ids: tuple[int, ...] | list[int] = ()

    def put(self, output: Any) -> None:
        self.ids = output.generated_tokens
        super().put(output)


class Batches(Answering, CBGenerateManager):  # type: ignore[misc]
    """Requests computed together, tokens of all in one step; the key-value cache has a fixed size.

    Raises:
        ConfigError: the key-value cache does not fit into memory. LoadError: batches cannot run this model.
    """

    _cb: Any  # transformers' manager

    def __init__(self, model: Any, tokenizer: Any, config: ServeConfig) -> None:
        super().__init__(model, config)
        self.sampler = RequestSampler()
        self.ends = _end_tokens(model, tokenizer)
        settings = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=self._blocks(),
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=config.max_requests,
            auto_switch_to_flash=False,  # it may fetch kernels from the Hub
            use_cuda_graph=False,  # the sampler looks up each row's request
            use_async_batching=False,
        )
        cb = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=self.ends),
            continuous_batching_config=settings,
        )
        cb.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self.sampler]))
        cb.logit_processor.tensors_required = 1
        self._cb = cb
        cb.start()
        try:
            self._try_out(tokenizer)
        except BaseException:
            self.stop()
            raise
        self.cache_tokens = infer_max_single_request_tokens(cb.batch_processor.cache)
        self.room = min(self.room or self.cache_tokens, self.cache_tokens)

    def _blocks(self) -> int:
        """Blocks of the cache: what the given size holds, but no more than all requests can fill."""
        affordable = int(self.config.kv_cache_gb * 1e9) // _block_bytes(self.model)
        if self.room is not None:
            affordable = min(affordable, self.config.max_requests * -(-self.room // _PAGE))
        return max(1, affordable)

    def _try_out(self, tokenizer: Any) -> None:
        """Generate a few tokens, and check that the model without batches finds them likeliest, up to rounding."""
        prompt = tokenizer("A short text to try it with.")["input_ids"][:16] or [0]
        self._cb.add_request(prompt, max_new_tokens=_TRIAL_TOKENS, eos_token_id=-1)
        done = self._cb.get_result(timeout=_TRIAL_SECONDS)
        if done is None or done.error is not None:
            self.stop()  # the engine's own error is known once its thread has ended
            error = self.fatal_error() or (
                done.error if done else f"no token within {_TRIAL_SECONDS} seconds"
            )
            if isinstance(error, MemoryError):
                raise ConfigError(
                    f"kv_cache_gb: {self.config.kv_cache_gb:g} GB do not fit into memory; choose a smaller value"
                )
            raise LoadError(str(error))
        with torch.inference_mode():
            ids = torch.tensor([prompt + done.generated_tokens[:-1]], device=self.model.device)
            logits = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(done.generated_tokens, device=logits.device)[:, None])[:, 0]
        most = logits.amax(dim=1)
        if not bool((most - chosen <= _LEAST_MARGIN * (most - logits.mean(dim=1))).all()):
            raise LoadError("tokens generated in a batch are not the most likely ones without batching")

    def _start(
        self, processor: Any, inputs: Any, queue: AnswerQueue, request_id: str, response_parser: Any
    ) -> Any:
        loop, tokenizer = asyncio.get_running_loop(), processor._tokenizer
        streamer = _BatchStreamer(self._cb, request_id, tokenizer, loop, queue, response_parser)

        def on_output(output: Any) -> None:
            streamer.put(output)
            if output.error is not None:
                queue.put_nowait(stream_error(output.error))
            elif output.is_finished():
                streamer.end()

        self.sampler.add(request_id, queue.wanted, self.model.device)
        self._cb.register_result_handler(request_id, on_output)
        longest = queue.wanted.max_new_tokens
        added = self._cb.add_request(
            inputs["input_ids"], request_id, longest, streaming=True, eos_token_id=self.ends
        )
        if added is None:
            self.end(request_id)
            raise RequestError("the engine has stopped; restart the server", status=503)
        return streamer

    def end(self, request_id: str) -> None:
        super().end(request_id)
        self.sampler.draws.pop(request_id, None)
        self._cb.output_router.result_handlers.pop(request_id, None)
        drain_queue(self._cb.output_router.output_queue)  # what came after its handler was gone

    def fatal_error(self) -> Exception | None:
        """What ended the engine, if it has ended."""
        return self._cb.background_thread_status.fatal_error

    def stop(self) -> None:
        """Stop after the current step; running requests fail."""
        if self._cb.is_running():
            self._cb.stop(block=True, timeout=10, hard_stop=True)


class _SingleStreamer(DirectStreamer):
    """Keeps the ids of the new tokens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += [] if self._first else value.tolist()
        super().put(value)


class OneByOne(Answering, GenerateManager):  # type: ignore[misc]
    """Requests one after another, by `model.generate`."""

    def __init__(self, model: Any, tokenizer: Any, config: ServeConfig) -> None:
        Answering.__init__(self, model, config)
        GenerateManager.__init__(self)
        self.ends = _end_tokens(model, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else max(self.ends[0], 0)

    def _start(
        self, processor: Any, inputs: Any, queue: AnswerQueue, request_id: str, response_parser: Any
    ) -> Any:
        loop, wanted = asyncio.get_running_loop(), queue.wanted
        streamer = _SingleStreamer(processor._tokenizer, loop, queue, response_parser)
        sampling = {"temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": wanted.top_k}
        settings = GenerationConfig(
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.pad,
            **({"do_sample": True, **sampling} if wanted.temperature > 0 else {"do_sample": False}),
        )

        prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}

        def run() -> None:
            last: Any = None
            try:
                if wanted.seed is not None:
                    torch.manual_seed(wanted.seed)
                self.model.generate(**prompt, generation_config=settings, streamer=streamer)
            except _GenerationCancelled:
                pass
            except Exception as error:
                last = stream_error(reason_of(error))
            loop.call_soon_threadsafe(queue.put_nowait, last)

        self.submit(run)
        return streamer

    def fatal_error(self) -> Exception | None:
        """Nothing ends it."""
        return None

    def stop(self) -> None:
        """Cancel what still runs."""
        for request_id in list(self.running):
            self.end(request_id)


def start(model: Any, tokenizer: Any, config: ServeConfig) -> tuple[Batches | OneByOne, str]:
    """Batches if they can run the model, else one request at a time, and the reason.

    Raises:
        ConfigError: as `Batches`.
    """
    attention = model.config._attn_implementation
    try:
        return Batches(model, tokenizer, config), ""
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers raises for a model that it does not know
        model.set_attn_implementation(attention)
        return OneByOne(model, tokenizer, config), reason_of(error)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text; [-1] if there are none."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [-1 if ends is None else ends]


def _block_bytes(model: Any) -> int:
    """Bytes of `_PAGE` tokens of keys and values in all layers."""
    config = model.config.get_text_config()
    heads, dim = find_num_key_value_heads(config), find_head_dim(config)
    page: int = FullAttentionCacheAllocator.get_bytes_per_page(heads, dim, model.dtype, _PAGE)
    return page * int(config.num_hidden_layers)
