"""The blocks of a dense model, one in memory at a time, and the activations between them.

A block is called with the arguments that the model itself would pass: they are recorded, block by block, while
stand-ins pass the embedded text from one to the next. Blocks may therefore be of different kinds (sliding windows,
different position embeddings), as long as each takes the output of the previous one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.calibrate.activations import Activations, SpooledActivations
from pocketllm.calibrate.autocast import autocast
from pocketllm.calibrate.block_list import (
    Call,
    CaughtError,
    block_list as block_list,
    refusal,
    refused,
    shared_with,
    standing_in,
)
from pocketllm.calibrate.block_weights import BlockWeights, OtherWeights
from pocketllm.calibrate.input_hessians import Collector, Inputs
from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.errors import PocketError, reason_of
from pocketllm.plan.matrices import Matrix
from pocketllm.ranks import SOLO, Ranks
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_class import output_head

BATCH_TOKENS = 4096


class BlockStream(BlockWeights):
    """The blocks of a dense model, loaded one after another, and the activations between them.

    Args:
        source: the dense model. windows: [N, context] token ids.
        device: where blocks run; activations between them are float32.
        batch: windows that run together; 0 takes about 4096 tokens.
        weights: of parameters outside the blocks.
        ranks: among which the batches are divided; this stream runs those of its rank (`numbers`).
        folder: for the activations; None keeps them in memory.
    """

    def __init__(
        self,
        source: DenseCheckpoint,
        windows: Tensor,
        device: str = "cpu",
        batch: int = 0,
        weights: OtherWeights = lambda name, rows: None,
        ranks: Ranks = SOLO,
        folder: Path | None = None,
    ) -> None:
        super().__init__(source, device, windows, weights)
        self.ranks, self.folder = ranks, folder
        self.batch = batch or max(1, BATCH_TOKENS // windows.shape[1])
        batches = windows.split(self.batch)
        self.numbers = range(ranks.rank, len(batches), ranks.size)
        self.rounds = -(-len(batches) // ranks.size)
        batches = tuple(batches[number] for number in self.numbers)
        self.calls: list[list[Call]] = []  # by block, then by batch
        self.hidden = self.activations()
        self.as_tuple = self.in_float32 = False
        if not self._capture(batches):
            self.as_tuple = True
            if not self._capture(batches):
                raise refusal(self.model, "has blocks that do not form a simple chain")

    @torch.no_grad()
    def _capture(self, batches: tuple[Tensor, ...]) -> bool:
        """Run what lies before the blocks, and keep the arguments of every block.

        Returns whether each block received the output of the previous one.
        """
        self.calls, self.hidden = [[] for _ in self.blocks], self.activations()
        passed: list[Tensor] = []

        def record(number: int, hidden: Tensor, call: Call) -> Any:
            if number == 0:
                self.hidden.append(hidden)
            self.calls[number].append(shared_with(call, next(reversed(self.calls[number]), None)))
            passed.append(hidden)
            if number == len(self.blocks) - 1:
                raise CaughtError
            return self._output(hidden)

        with standing_in(self.blocks, record):
            for batch in batches:
                passed.clear()
                try:
                    self.text_model(batch.to(self.device), use_cache=False)
                except CaughtError:
                    pass
                except Exception:  # of a model that gets something else from stand-ins than from its blocks
                    return False
                handed_on = all(hidden is passed[0] for hidden in passed)
                if len(passed) != len(self.blocks) or not handed_on or passed[0].ndim != 3:
                    return False
        return True

    def _output(self, hidden: Tensor) -> Any:
        """Activations in the form in which the model's blocks return them."""
        return (hidden,) if self.as_tuple else hidden

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with dense weights, one block in memory at a time.

        The caller puts encoded weights into the block, then sets `hidden` to its outputs.
        """
        for number in range(len(self.blocks)):
            with self.loaded(number, number + 1) as entry:
                yield entry

    def after_blocks(self, hidden: Tensor) -> Tensor:
        """The head's input for an output of the last block [1, context, C]: the final norm."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with (
            standing_in(self.blocks, lambda number, start, call: self._output(hidden)),
            autocast(self.device),
        ):
            out = getattr(self.text_model(ids, use_cache=False), "last_hidden_state", None)
        return self._activations(out)

    @torch.no_grad()
    def has_bare_head(self) -> bool:
        """Whether the head takes what the final norm gives: no layers with weights lie between them."""
        found: list[Tensor] = []

        def record(module: nn.Module, given: tuple[Any, ...]) -> None:
            found.append(given[0])
            raise CaughtError

        head = output_head(self.model)
        assert head is not None
        hook, ids = head.register_forward_pre_hook(record), torch.zeros(1, 2, dtype=torch.int64)
        try:
            with (
                standing_in(self.blocks, lambda number, start, call: self._output(start)),
                suppress(CaughtError),
            ):
                self.model(ids.to(self.device), use_cache=False)
        except Exception:  # weights that lie between are not loaded
            return False
        finally:
            hook.remove()
        return bool(found) and not found[0].is_meta

    def embedding_gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the looked-up rows of the embedding, one per position.

        What lies between them and the first block counts: scaled embeddings, norms.

        Args:
            ids: [1, context] token ids of the windows. gradient: [1, context, C] at the input of the first block.

        Returns:
            [context, columns of the embedding] float32.
        """
        embedding = self.model.get_input_embeddings()
        kept, padding = embedding._parameters["weight"], getattr(embedding, "padding_idx", None)
        rows = self.embedding_rows(ids[0]).float().detach().requires_grad_()
        positions = torch.arange(ids.shape[1], device=rows.device)[None]
        entered: list[Tensor] = []

        def record(number: int, hidden: Tensor, call: Call) -> Any:
            entered.append(hidden)
            raise CaughtError

        embedding._parameters["weight"], embedding.padding_idx = rows, None
        hook = embedding.register_forward_pre_hook(lambda module, given: (positions, *given[1:]))
        try:
            with standing_in(self.blocks, record), torch.enable_grad(), suppress(CaughtError):
                self.text_model(ids.to(self.device), use_cache=False)
        finally:
            hook.remove()
            embedding._parameters["weight"], embedding.padding_idx = kept, padding
        (found,) = torch.autograd.grad(entered[0], rows, gradient.to(entered[0].dtype))
        return found

    def activations(self) -> Activations:
        """An empty list of batches, in memory or on disk."""
        return [] if self.folder is None else SpooledActivations(self.folder, self.device)

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: Activations) -> Activations:
        """Outputs of the loaded block for activations, batch by batch."""
        found = self.activations()
        for number, batch in enumerate(hidden):
            found.append(self.call(block, batch, number))
        return found

    def call(self, block: Callable[..., Any], hidden: Tensor, number: int) -> Tensor:
        """Output of the loaded block (or of a function in its place) for an input of batch `number`."""
        args, kwargs = self.calls[self.number][number]
        try:
            with nullcontext() if self.in_float32 else autocast(self.device):
                result = block(hidden, *args, **kwargs)
        except RuntimeError as error:
            if self.in_float32 or not re.search("same (scalar |d)?type|dtypes match", str(error)):
                raise
            self.in_float32 = True  # some experts add up in place, which autocast does not convert
            return self.call(block, hidden, number)
        return self._activations(result[0] if isinstance(result, tuple) else result)

    def _activations(self, found: Any) -> Tensor:
        if not isinstance(found, Tensor):
            raise refusal(self.model, "has blocks that return something other than activations")
        return found.float()

    def inputs(
        self, block: nn.Module, matrices: list[Matrix], token_weights: Mapping[str, Tensor] | None = None
    ) -> Inputs:
        """The inputs of the loaded block's matrices, for the activations in `hidden`.

        Args:
            token_weights: [N, context] that inputs of a matrix are multiplied by, by name.
        """
        sums, given = WindowSums(self.device, self.ranks), token_weights or {}
        collector = Collector(self.model, matrices, sums)
        own = {m.name: given[m.name].to(self.device) for m in matrices if m.name in given}
        with torch.no_grad(), collector.watching():
            for turn in range(self.rounds):
                for number in self.numbers[turn : turn + 1]:
                    some = slice(number * self.batch, (number + 1) * self.batch)
                    with collector.batch({name: weights[some].flatten() for name, weights in own.items()}):
                        self.call(block, self.hidden[turn], turn)
                sums.end_round()
        return collector.inputs(self.device)


def check_blocks(source: DenseCheckpoint, windows: Tensor, device: str = "cpu") -> None:
    """Check that the blocks of a model can be run one after another, on a few tokens and the first block.

    Args:
        windows: [N, context] token ids.

    Raises:
        ConfigError: they cannot.
    """
    path, _ = block_list(source.model)
    if any(name.startswith(f"{path}.") for name in source.tied):
        raise refusal(source.model, "has blocks that share weights")
    try:
        stream = BlockStream(source, windows[:1, :16], device)
        with stream.loaded(0) as (_, block):
            (out,) = stream.run(block, stream.hidden)
        if out.shape != stream.hidden[0].shape:
            raise refusal(stream.model, "has blocks that change the shape of activations")
        with (
            torch.enable_grad(),
            refused(stream.model, "needs more than the output of its blocks after them"),
        ):
            final = stream.after_blocks(out.detach().requires_grad_())
        if not final.requires_grad:
            raise refusal(stream.model, "runs its blocks without gradients")
        with refused(stream.model, "runs what lies before its blocks without gradients"):
            stream.embedding_gradient(windows[:1, :16], torch.zeros_like(out))
        if not stream.has_bare_head():
            raise refusal(stream.model, "has layers between its blocks and its head")
    except PocketError:
        raise
    except Exception as error:  # whatever a model makes of being run in parts
        raise refusal(source.model, f"cannot be run block by block ({reason_of(error)})") from error
