"""The blocks of a dense model, one in memory at a time, and the activations between them.

A block is called with the arguments that the model itself would pass: they are recorded, block by block, while
stand-ins pass the embedded text from one to the next. Blocks may therefore be of different kinds (sliding windows,
different position embeddings), as long as each takes the output of the previous one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.calibrate.autocast import autocast
from pocketllm.calibrate.input_hessians import Collector, Inputs
from pocketllm.calibrate.window_sums import WindowSums
from pocketllm.errors import ConfigError, PocketError, reason_of
from pocketllm.plan.matrices import Matrix
from pocketllm.ranks import SOLO, Ranks
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_class import find_blocks, language_model_path, output_head, shared_modules

_BATCH_TOKENS = 4096

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block beside the activations
_Tell = Callable[[int, Tensor, _Call], Any]


class BlockStream:
    """The blocks of a dense model, loaded one after another, and the activations between them.

    Args:
        source: the dense model. windows: [N, context] token ids.
        device: where blocks run; activations between them are float32.
        batch: windows that run together; 0 takes about 4096 tokens.
        weights: of parameters outside the blocks, to use instead of the dense ones.
        ranks: among which the batches are divided; this stream runs those of its rank (`numbers`).
    """

    def __init__(
        self,
        source: DenseCheckpoint,
        windows: Tensor,
        device: str = "cpu",
        batch: int = 0,
        weights: Mapping[str, Tensor] | None = None,
        ranks: Ranks = SOLO,
    ) -> None:
        self.source, self.device, self.ranks = source, device, ranks
        self.model = source.skeleton()
        # Experts one by one, so that the inputs of each are seen.
        self.model.set_experts_implementation("eager")
        for module in self.model.modules():
            for leaf, value in module._buffers.items():
                module._buffers[leaf] = None if value is None else value.to(device)
        self.path, self.blocks = block_list(self.model)
        check_shared(self.model, self.path)
        self.text_path = language_model_path(self.model)
        head = output_head(self.model)
        if head is None:
            raise _refusal(self.model, "has no head that gives the logits of tokens")
        for name in source.names():
            parent, inside = name.rpartition(".")[0], f"{self.text_path}." if self.text_path else ""
            is_outside = name.startswith(inside) and not name.startswith(f"{self.path}.")
            if is_outside and self.model.get_submodule(parent) is not head:
                self._load(name, (weights or {}).get(name, source.read(name)))
        self.batch = batch or max(1, _BATCH_TOKENS // windows.shape[1])
        batches = windows.split(self.batch)
        self.numbers = range(ranks.rank, len(batches), ranks.size)
        self.rounds = -(-len(batches) // ranks.size)
        batches = tuple(batches[number] for number in self.numbers)
        self.calls: list[list[_Call]] = []  # by block, then by batch
        self.hidden: list[Tensor] = []
        self.as_tuple = self.in_float32 = False
        if not self._capture(batches):
            self.as_tuple = True
            if not self._capture(batches):
                raise _refusal(self.model, "has blocks that do not form a simple chain")
        self.current = self.calls[0]  # arguments of the block that is loaded

    def _load(self, name: str, value: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        value = value.to(self.device, torch.float32 if value.is_floating_point() else None)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def _capture(self, batches: tuple[Tensor, ...]) -> bool:
        """Run what lies before the blocks, and keep the arguments of every block.

        Returns whether each block received the output of the previous one.
        """
        self.calls, self.hidden = [[] for _ in self.blocks], []
        passed: list[Tensor] = []

        def record(number: int, hidden: Tensor, call: _Call) -> Any:
            if number == 0:
                self.hidden.append(hidden)
            self.calls[number].append(call)
            passed.append(hidden)
            if number == len(self.blocks) - 1:
                raise _CaughtError
            return self._output(hidden)

        with self._standing_in(record):
            for batch in batches:
                passed.clear()
                try:
                    self._text_model(batch.to(self.device), use_cache=False)
                except _CaughtError:
                    pass
                except (
                    Exception
                ):  # whatever a model makes of stand-ins that return something else than its blocks
                    return False
                handed_on = all(hidden is passed[0] for hidden in passed)
                if len(passed) != len(self.blocks) or not handed_on or passed[0].ndim != 3:
                    return False
        return True

    @property
    def _text_model(self) -> nn.Module:
        """The part that runs the blocks, from token ids to the final norm."""
        return self.model.get_submodule(self.text_path)

    @contextmanager
    def _standing_in(self, tell: _Tell) -> Iterator[None]:
        """Replace the blocks by stand-ins for a while."""
        real = list(self.blocks)
        for number, block in enumerate(real):
            self.blocks[number] = _StandIn(block, number, tell)
        try:
            yield
        finally:
            for number, block in enumerate(real):
                self.blocks[number] = block

    def _output(self, hidden: Tensor) -> Any:
        """Activations in the form in which the model's blocks return them."""
        return (hidden,) if self.as_tuple else hidden

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with dense weights, one block in memory at a time.

        The caller puts encoded weights into the block, then sets `hidden` to its outputs.
        """
        for number in range(len(self.blocks)):
            with self.loaded(number) as entry:
                yield entry

    @contextmanager
    def loaded(self, number: int) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with its dense weights, which are dropped afterwards."""
        path, block = f"{self.path}.{number}", self.blocks[number]
        self.current = self.calls[number]
        for name in self.source.names():
            if name.startswith(f"{path}."):
                self._load(name, self.source.read(name))
        yield path, block
        for module in block.modules():  # buffers that no file holds stay
            for leaf, value in module._parameters.items():
                if value is not None:
                    module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return any(target in self.source.parts for target in self.source.tied.values())

    def load_head(self) -> None:
        """Load the output head, or tie it to the embedding."""
        head = self.model.get_output_embeddings()
        for name in self.source.names():
            if self.model.get_submodule(name.rpartition(".")[0]) is head:
                self._load(name, self.source.read(name))
        if head.weight.is_meta:
            head._parameters["weight"] = self.model.get_input_embeddings().weight
        path = next(name for name, module in self.model.named_modules() if module is head)
        for leaf, value in head._parameters.items():  # a bias that is stored under another name
            source = self.source.tied.get(f"{path}.{leaf}")
            if value is not None and value.is_meta and source is not None:
                head._parameters[leaf] = nn.Parameter(
                    self.source.read(source).to(self.device, torch.float32), requires_grad=False
                )

    def after_blocks(self, hidden: Tensor) -> Tensor:
        """The head's input for an output of the last block [1, context, C]: the final norm."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with self._standing_in(lambda number, start, call: self._output(hidden)), autocast(self.device):
            out = getattr(self._text_model(ids, use_cache=False), "last_hidden_state", None)
        return self._activations(out)

    @torch.no_grad()
    def has_bare_head(self) -> bool:
        """Whether the head takes what the final norm gives: no layers with weights lie between them."""
        found: list[Tensor] = []

        def record(module: nn.Module, given: tuple[Any, ...]) -> None:
            found.append(given[0])
            raise _CaughtError

        head = output_head(self.model)
        assert head is not None
        hook, ids = head.register_forward_pre_hook(record), torch.zeros(1, 2, dtype=torch.int64)
        try:
            with (
                self._standing_in(lambda number, start, call: self._output(start)),
                suppress(_CaughtError),
            ):
                self.model(ids.to(self.device), use_cache=False)
        except Exception:  # weights that lie between are not loaded
            return False
        finally:
            hook.remove()
        return bool(found) and not found[0].is_meta

    def set_weight(self, name: str, value: Tensor) -> None:
        """Put another weight into the model."""
        self._load(name, value)

    def embedding_gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the looked-up rows of the embedding, one per position.

        What lies between them and the first block counts: scaled embeddings, norms.

        Args:
            ids: [1, context] token ids. gradient: [1, context, C] at the input of the first block.

        Returns:
            [context, columns of the embedding] float32.
        """
        embedding = self.model.get_input_embeddings()
        kept, padding = embedding._parameters["weight"], getattr(embedding, "padding_idx", None)
        rows = kept[ids[0]].float().detach().requires_grad_()
        positions = torch.arange(ids.shape[1], device=rows.device)[None]
        entered: list[Tensor] = []

        def record(number: int, hidden: Tensor, call: _Call) -> Any:
            entered.append(hidden)
            raise _CaughtError

        embedding._parameters["weight"], embedding.padding_idx = rows, None
        hook = embedding.register_forward_pre_hook(lambda module, given: (positions, *given[1:]))
        try:
            with self._standing_in(record), torch.enable_grad(), suppress(_CaughtError):
                self._text_model(ids.to(self.device), use_cache=False)
        finally:
            hook.remove()
            embedding._parameters["weight"], embedding.padding_idx = kept, padding
        (found,) = torch.autograd.grad(entered[0], rows, gradient.to(entered[0].dtype))
        return found

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        """Outputs of the loaded block for activations, batch by batch."""
        return [self.call(block, batch, number) for number, batch in enumerate(hidden)]

    def call(self, block: Callable[..., Any], hidden: Tensor, number: int) -> Tensor:
        """Output of the loaded block (or of a function in its place) for an input of batch `number`."""
        args, kwargs = self.current[number]
        try:
            with nullcontext() if self.in_float32 else autocast(self.device):
                result = block(hidden, *args, **kwargs)
        except RuntimeError as error:
            if self.in_float32 or not re.search("same (scalar |d)?type", str(error)):
                raise
            self.in_float32 = True  # some experts add up in place, which autocast does not convert
            return self.call(block, hidden, number)
        return self._activations(result[0] if isinstance(result, tuple) else result)

    def _activations(self, found: Any) -> Tensor:
        if not isinstance(found, Tensor):
            raise _refusal(self.model, "has blocks that return something else than activations")
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


class _StandIn(nn.Module):
    """Has the attributes of a block, and calls `tell` with (number, hidden, other arguments) instead."""

    def __init__(self, block: nn.Module, number: int, tell: _Tell) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in block.__dict__.items() if not k.startswith("_")})
        self._modules.update(block._modules)
        self.__dict__["tell"] = lambda hidden, call: tell(number, hidden, call)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["tell"](hidden, (args, kwargs))


class _CaughtError(Exception):
    """Raised when the last block is reached."""


def check_blocks(source: DenseCheckpoint, windows: Tensor, device: str = "cpu") -> None:
    """Check that the blocks of a model can be run one after another, on a few tokens and the first block.

    Args:
        windows: [N, context] token ids.

    Raises:
        ConfigError: they cannot.
    """
    path, _ = block_list(source.model)
    if any(name.startswith(f"{path}.") for name in source.tied):
        raise _refusal(source.model, "has blocks that share weights")
    try:
        stream = BlockStream(source, windows[:1, :16], device)
        with stream.loaded(0) as (_, block):
            (out,) = stream.run(block, stream.hidden)
        if out.shape != stream.hidden[0].shape:
            raise _refusal(stream.model, "has blocks that change the shape of activations")
        with torch.enable_grad():
            final = stream.after_blocks(out.detach().requires_grad_())
        if not final.requires_grad:
            raise _refusal(stream.model, "runs its blocks without gradients")
        stream.embedding_gradient(windows[:1, :16], torch.zeros_like(out))
        if not stream.has_bare_head():
            raise _refusal(stream.model, "has layers between its blocks and its head")
    except PocketError:
        raise
    except Exception as error:  # whatever a model makes of being run in parts
        raise _refusal(source.model, f"cannot be run block by block ({reason_of(error)})") from error


def check_shared(model: Any, path: str) -> None:
    """See that no module belongs to several blocks, or to a block and what lies outside.

    Args:
        path: of the list of blocks.

    Raises:
        ConfigError: one does; names its paths.
    """

    def block(name: str) -> str:
        return name.removeprefix(f"{path}.").partition(".")[0] if name.startswith(f"{path}.") else ""

    for name, first in shared_modules(model).items():
        if block(name) != block(first) and model.get_submodule(first)._parameters:
            raise _refusal(model, f"runs one module as {first} and as {name}")


def _refusal(model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"calibration: {type(model).__name__} {reason}; use a preset without calibration (lookup-8x)"
    )


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The blocks of a model that is calibrated, with their path.

    Raises:
        ConfigError: a model without such a list.
    """
    found = find_blocks(model)
    if found is None:
        raise _refusal(model, "has no single list of blocks")
    return found
