"""Choosing tokens in a batch whose requests each have settings of their own.

Continuous batching in transformers takes the largest score of every row, or draws with one setting for all. Here it
takes the largest, and rows of requests that sample get noise first: argmax(l / T + g) with independent standard
Gumbel numbers g is a draw from softmax(l / T) (the Gumbel-max trick; Maddison et al., arXiv 1411.0030, section 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from pocketllm.integrations.serve_requests import Wanted


class Draw:
    """Draws the tokens of one request; with a seed, the same ones each time for the same logits."""

    def __init__(self, wanted: Wanted, device: torch.device) -> None:
        self.wanted = wanted
        self.generator = torch.Generator(device)
        if wanted.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(wanted.seed)

    def scores(self, logits: Tensor) -> Tensor:
        """Scores, the largest of which is the token that is drawn. logits: float32 [vocabulary]."""
        scores = logits / max(self.wanted.temperature, 1e-6)  # colder ones overflow, and choose the same
        if 0 < self.wanted.top_k < len(scores):
            least = scores.topk(self.wanted.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.wanted.top_p < 1:
            ordered, order = scores.sort(descending=True)
            shares = ordered.softmax(dim=-1)
            beyond = shares.cumsum(dim=-1) - shares >= self.wanted.top_p  # the likeliest is never beyond
            beyond[0] = False
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log()


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """A logits processor that gives each row of a batch what its request asked for; greedy rows stay as they are."""

    def __init__(self) -> None:
        self.supported_kwargs: dict[str, type] = {}
        self.ignored_kwargs: tuple[str, ...] = ()
        self.draws: dict[str, Draw] = {}
        self._rows: list[Draw | None] = []

    def add(self, request_id: str, wanted: Wanted, device: torch.device) -> None:
        """Note how a request's tokens are chosen."""
        if wanted.temperature > 0:
            self.draws[request_id] = Draw(wanted, device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill a buffer that is not used: the settings of a row are looked up by its request."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Note which request each row of the next call belongs to."""
        self._rows = [self.draws.get(request.state.request_id) for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores whose largest is the chosen token, float32 [rows, vocabulary]."""
        for number, draw in enumerate(self._rows):
            if draw is not None:
                scores[number] = draw.scores(scores[number])
        return scores
