"""Calibration: what the inputs of every layer look like, one block of the model in memory at a time.

Texts become windows of tokens; the windows run through embedding and blocks. Before a block is coded its
dense form sees the outputs of the coded blocks before it, and the Hessian H = E[x x^T] of the inputs of each
of its layers is taken; afterwards the coded form makes the inputs of the next one. So every block is coded
for the inputs it will get, the errors of its predecessors included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.errors import ConfigError, SourceError
from pocketllm.evaluate.perplexity import read_text
from pocketllm.model.compute import autocast
from pocketllm.model.plan import Matrix
from pocketllm.model.source import DenseCheckpoint

_BATCH_TOKENS = 4096


def default_text(held_out: bool = False) -> str:
    """English that every Python brings along: four in five topics of its own documentation (0.7 MB together).

    held_out: the fifth, which is for measuring.
    """
    from pydoc_data.topics import topics

    chosen = [key for number, key in enumerate(sorted(topics)) if (number % 5 == 4) is held_out]
    return "\n\n".join(topics[key] for key in chosen)


def read_calibration(path: str | Path) -> str:
    """Text of a UTF-8 file, a JSON or JSON-lines file (all strings of each entry), or all of those in a folder.

    Raises:
        SourceError: missing, not UTF-8, malformed, or no text in it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".md", ".raw"))
        if not files:
            raise SourceError(f"{path}: no *.txt, *.md, *.raw or *.jsonl file in this folder")
        return "\n\n".join(read_calibration(file) for file in files)
    text = read_text(path)
    if path.suffix not in (".jsonl", ".json"):
        return text
    is_lines = path.suffix == ".jsonl"
    try:
        rows = [json.loads(r) for r in text.splitlines() if r.strip()] if is_lines else json.loads(text)
    except ValueError as error:
        raise SourceError(f"{path}: not JSON{' lines' if is_lines else ''} ({error})") from error
    entries = rows if isinstance(rows, list) else [rows]
    return "\n\n".join("".join(_strings(row)) for row in entries)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def calibration_windows(tokenizer: Any, texts: list[str], tokens: int, context: int, seed: int) -> Tensor:
    """[windows, context] int64: as many random windows of each text, about `tokens` tokens together.

    Raises:
        ConfigError: the texts have fewer tokens than one window.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = max(1, tokens // context)
    chosen = []
    for position, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: len(ids) // context * context].reshape(-1, context)
        share = wanted // len(texts) + (1 if position < wanted % len(texts) else 0)
        order = torch.randperm(len(windows), generator=generator)[:share]
        chosen.append(windows[order.sort().values])
    found = torch.cat(chosen)
    if not len(found):
        raise ConfigError(
            f"calibration: the texts have fewer than {context} tokens, not one window; give more text"
        )
    return found


class BlockStream:
    """The blocks of a dense model, loaded one after another, and the activations between them.

    Args:
        source: the dense model. windows: [N, context] token ids.
        device: where blocks run; activations between them are float32.
        batch: windows that run together; 0 takes about 4096 tokens.
        coded: weights outside the blocks to use instead of the dense ones.
    """

    def __init__(
        self,
        source: DenseCheckpoint,
        windows: Tensor,
        device: str = "cpu",
        batch: int = 0,
        coded: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.source, self.device = source, device
        self.model = source.skeleton()
        self.path, self.blocks = _blocks(self.model)
        outside = [name for name in source.names() if not name.startswith(f"{self.path}.")]
        head = self.model.get_output_embeddings()
        for name in outside:
            if head is None or self.model.get_submodule(name.rpartition(".")[0]) is not head:
                self._load(name, (coded or {}).get(name, source.read(name)))
        per_batch = batch or max(1, _BATCH_TOKENS // windows.shape[1])
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        self._capture(windows.split(per_batch))

    def _load(self, name: str, value: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        value = value.to(self.device, torch.float32)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def _capture(self, batches: tuple[Tensor, ...]) -> None:
        """Run what lies before the blocks, and keep the arguments of the first block."""
        stream = self

        class Caught(nn.Module):
            def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                stream.hidden.append(hidden)
                stream.calls.append((args, kwargs))
                raise _CaughtError

        first = self.blocks[0]
        caught = Caught()
        caught.__dict__.update({k: v for k, v in first.__dict__.items() if not k.startswith("_")})
        self.blocks[0] = caught
        try:
            for batch in batches:
                try:
                    self.model.base_model(batch.to(self.device), use_cache=False)
                except _CaughtError:
                    continue
        finally:
            self.blocks[0] = first

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with dense weights, one block in memory at a time.

        The caller puts coded weights into the block, then sets `hidden` to what it puts out.
        """
        for number in range(len(self.blocks)):
            with self.loaded(number) as entry:
                yield entry

    @contextmanager
    def loaded(self, number: int) -> Iterator[tuple[str, nn.Module]]:
        """(path, block) with its dense weights, which are dropped afterwards."""
        path, block = f"{self.path}.{number}", self.blocks[number]
        for name in self.source.names():
            if name.startswith(f"{path}."):
                self._load(name, self.source.read(name))
        yield path, block
        block.to("meta")

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

    def after_blocks(self, hidden: Tensor) -> Tensor:
        """What the head gets to see for an output of the last block [1, context, C]: the final norm."""
        model = self.model.base_model
        parent, _, leaf = self.path.rpartition(".")
        owner = self.model.get_submodule(parent)

        class Given(nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                return hidden

        given = Given()
        given.__dict__.update({k: v for k, v in self.blocks[0].__dict__.items() if not k.startswith("_")})
        count = model.config.num_hidden_layers
        setattr(owner, leaf, nn.ModuleList([given]))
        model.config.num_hidden_layers = 1
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            with autocast(self.device):
                out = model(ids, use_cache=False).last_hidden_state
            assert isinstance(out, Tensor)
            return out.float()
        finally:
            model.config.num_hidden_layers = count
            setattr(owner, leaf, self.blocks)

    def set_weight(self, name: str, value: Tensor) -> None:
        """Put another weight into the model."""
        self._load(name, value)

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        """Outputs of a block for activations, batch by batch."""
        return [self.call(block, batch, number) for number, batch in enumerate(hidden)]

    def call(self, block: Callable[..., Any], hidden: Tensor, number: int) -> Tensor:
        """Output of a block for an input that belongs to batch `number`."""
        args, kwargs = self.calls[number]
        with autocast(self.device):
            result = block(hidden, *args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        assert isinstance(out, Tensor)
        return out.float()

    def hessians(self, path: str, block: nn.Module, matrices: list[Matrix]) -> dict[str, Tensor]:
        """H = E[x x^T] [columns, columns] float32 by matrix name; matrices with the same inputs share it.

        A matrix whose inputs are not seen (the second one of fused experts) has none.
        """
        with _collecting(self.model, matrices) as sums:
            self.run(block, self.hidden)
        tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)
        scaled: dict[int, Tensor] = {}
        return {name: scaled.setdefault(id(total), total / tokens) for name, total in sums.items()}


def add_square(total: Tensor, x: Tensor) -> None:
    """total [C, C] += x^T x for x [tokens, C] float32, in place."""
    if x.device.type == "cpu":
        # numpy sees that both sides are the same and computes one triangle.
        array = x.contiguous().numpy()
        total += torch.from_numpy(array.T @ array)
    else:
        total.addmm_(x.T, x)


class _CaughtError(Exception):
    """The first block was reached."""


@contextmanager
def _collecting(model: nn.Module, matrices: list[Matrix]) -> Iterator[dict[str, Tensor]]:
    """Sum x^T x of the inputs of each matrix's module while the block runs."""
    sums: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []  # the latest input and the first matrix that read it

    def hook(matrix: Matrix) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if x.shape[-1] != matrix.columns:
                return
            if last and last[0][0] is x:
                sums[matrix.name] = sums[last[0][1]]
                return
            last[:] = [(x, matrix.name)]
            flat = x.reshape(-1, x.shape[-1]).float()
            if matrix.name not in sums:
                sums[matrix.name] = torch.zeros(matrix.columns, matrix.columns, device=flat.device)
            add_square(sums[matrix.name], flat)

        return collect

    handles = [
        model.get_submodule(matrix.name.rpartition(".")[0]).register_forward_pre_hook(hook(matrix))
        for matrix in matrices
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The longest list of modules: the blocks of the model, with its path.

    Raises:
        ConfigError: a model whose blocks get different arguments, which is not supported.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["one"])
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [
        (name, m) for name, m in lists if not any(name.startswith(f"{o}.") for o, _ in lists if o != name)
    ]
    if not outer or len(kinds) > 1:
        raise ConfigError(
            f"calibration: {type(model).__name__} has no blocks in one list that are all called alike; "
            "use a preset without calibration (lookup-8x)"
        )
    return max(outer, key=lambda found: len(found[1]))
