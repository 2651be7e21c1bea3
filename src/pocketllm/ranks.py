"""Processes that work on one result together, launched by torchrun: who does what, and how results are exchanged.

Nothing that is exchanged depends on the number of ranks: what is summed arrives in a fixed order. Messages are JSON
and raw tensors (gloo), never pickles. Ranks need not share a file system: files that some of them lack are sent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pocketllm.errors import ConfigError, PocketError, RankError, reason_of
from pocketllm.rank_join import connect_store, join
from pocketllm.rank_watch import Watch

if TYPE_CHECKING:
    from torch import Tensor

_Item = TypeVar("_Item")
_LONGEST_WAIT = timedelta(days=7)  # for the slowest rank; a dead one is noticed at once
_TIMEOUT = "POCKETLLM_RANK_TIMEOUT"
_UNSET = "launch with torchrun, or unset WORLD_SIZE to run a single process"


def launched() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun gives them; (0, 1) for a process of its own.

    Raises:
        ConfigError: environment variables that torchrun would not set like this.
    """
    size = _number("WORLD_SIZE", 1, None, "1")
    if size == 1 or "RANK" not in os.environ:
        return 0, 1
    rank = _number("RANK", 0, size - 1)
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"MASTER_ADDR: not set, but WORLD_SIZE is {size}; {_UNSET}")
    _number("MASTER_PORT", 1, 65535)
    return rank, size


def _number(name: str, least: int, most: int | None, default: str = "nothing", mend: str = _UNSET) -> int:
    """An environment variable."""
    text = os.environ.get(name, default)
    found = int(text) if text.isdecimal() else -1
    if found < least or (most is not None and found > most):
        wanted = f"a number from {least}{'' if most is None else f' to {most}'}"
        raise ConfigError(f"{name}: got {text!r}, wanted {wanted}; {mend}")
    return found


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them; all call the same methods in the same order.

    group: of torch.distributed, None for a single process. watch: notices ranks that fail.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that shows progress and writes the result."""
        return self.rank == 0

    def split(self, costs: Sequence[float]) -> list[int]:
        """A rank for each of some jobs: the most expensive first, each for the rank with the least to do."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda n: -costs[n]):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += costs[number]
        return owners

    def mine(self, items: Sequence[_Item], cost: Callable[[_Item], float]) -> list[_Item]:
        """This rank's share of some items."""
        owners = self.split([cost(item) for item in items])
        return [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]

    def map(self, jobs: Sequence[Callable[[], Any]], costs: Sequence[float]) -> list[Any]:
        """Results (JSON) of jobs, each run by one rank."""
        owners = self.split(costs)
        own = [job() for job, owner in zip(jobs, owners, strict=True) if owner == self.rank]
        found = [iter(results) for results in self.gather(own)]
        return [next(found[owner]) for owner in owners]

    def gather(self, value: Any) -> list[Any]:
        """The value (JSON) of every rank."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._exchange():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
            most = max(int(size) for size in sizes)
            parts = [torch.empty(most, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.nn.functional.pad(data, (0, most - len(data)))
            dist.all_gather(parts, padded, group=self.group)
        texts = [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """A value (JSON) that the first rank makes."""
        return self.gather(make() if self.is_first else None)[0]

    def first_goes_first(self, make: Callable[[], _Item]) -> _Item:
        """A value that every rank makes, the others after the first, of which they find what it has done."""
        found = make() if self.is_first else None
        self.wait()
        return make() if found is None else found

    def wait(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def in_order(
        self, own: Sequence[tuple[Any, Tensor]], to: Callable[[Any, list[int]], int | None]
    ) -> Iterator[tuple[Any, Tensor | None]]:
        """(label, tensor) of all ranks, those of the first rank first.

        Args:
            own: JSON labels and tensors of this rank.
            to: (label, shape) -> the rank that gets the tensor, None for all; called for every item in order.
                Other ranks get None instead of it.
        """
        if self.size == 1:
            yield from own
            return
        import torch
        import torch.distributed as dist

        heads = self.gather([[label, list(x.shape), str(x.dtype).removeprefix("torch.")] for label, x in own])
        places = [[to(label, shape) for label, shape, _ in items] for items in heads]
        sent: list[tuple[Any, Tensor]] = []  # tensors must live until they have arrived
        with self._exchange():
            for (_, tensor), place in zip(own, places[self.rank], strict=True):
                others = [r for r in range(self.size) if r != self.rank and place in (None, r)]
                data = tensor.detach().cpu().contiguous() if others and tensor.numel() else None
                sent += (
                    [] if data is None else [(dist.isend(data, r, group=self.group), data) for r in others]
                )
        for source, items in enumerate(heads):
            for number, (label, shape, dtype) in enumerate(items):
                if places[source][number] not in (None, self.rank):
                    yield label, None
                elif source == self.rank:
                    yield label, own[number][1]
                else:
                    received = torch.empty(shape, dtype=getattr(torch, dtype))
                    if received.numel():
                        with self._exchange():
                            dist.recv(received, source, group=self.group)
                    yield label, received
        with self._exchange():
            for work, _ in sent:
                work.wait()

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of one rank; the others give one of its shape and dtype, which is overwritten."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        data = tensor.cpu().contiguous()
        with self._exchange():
            dist.broadcast(data, source, group=self.group)
        return data.to(tensor.device)

    def sync_files(self, folder: Path, names: Sequence[str]) -> None:
        """Send files to the ranks whose file system lacks them; names that no rank has are ignored."""
        if self.size == 1:
            return
        import torch

        self.wait()  # until they are written
        have = self.gather([(folder / name).is_file() for name in names])
        for name, holders in zip(names, zip(*have, strict=True), strict=True):
            if all(holders) or not any(holders):
                continue
            source, path = holders.index(True), folder / name
            content = bytearray(path.read_bytes()) if self.rank == source else bytearray()
            size = self.gather(len(content))[source]
            data = (
                torch.frombuffer(content, dtype=torch.uint8)
                if content
                else torch.empty(size, dtype=torch.uint8)
            )
            data = self.broadcast(data, source)
            if not holders[self.rank]:
                folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{name}.{self.rank}-{os.getpid()}.tmp")
                temporary.write_bytes(data.numpy().tobytes())
                temporary.replace(path)

    def sync_folder(self, folder: Path) -> None:
        """`sync_files` of those that the first rank has in a folder."""
        names = self.from_first(lambda: sorted(path.name for path in folder.iterdir()))
        self.sync_files(folder, names)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Say which rank has failed if an exchange breaks off."""
        try:
            yield
        except RuntimeError as error:
            cause = None if self.watch is None else self.watch.failure()
            raise RankError(
                cause or f"the connection to the other ranks broke off ({reason_of(error)})"
            ) from error


REPORTED = "the first rank reports this error"
"""Note of an error that need not be shown here."""
SOLO = Ranks()
"""A process of its own."""


@contextmanager
def joined(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks that torchrun has launched, for a run; `SOLO` without torchrun.

    Raises:
        RankError: another rank has failed.
    """
    rank, size = launched()
    if size == 1:
        yield SOLO
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    timeout = _number(_TIMEOUT, 5, None, "120", f"unset {_TIMEOUT} for 120 seconds")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    is_own = not dist.is_initialized()
    store = connect_store(rank, size) if is_own else dist.distributed_c10d._get_default_store()
    launch = join(rank, size, store)
    watch = Watch(rank, size, launch.peers, timeout)
    try:
        if is_own:  # under a prefix of its own: keys of an earlier run may still be in the store
            mine = PrefixStore(launch.token, store)
            dist.init_process_group("gloo", store=mine, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
        group = dist.group.WORLD if is_own else dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        ranks = Ranks(rank, size, group, watch)
        yield ranks
        ranks.wait()
    except BaseException as error:
        watch.fail(None if isinstance(error, RankError) else _text(error))
        if rank:
            error.add_note(REPORTED)
        raise
    watch.close()
    dist.destroy_process_group(group)


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, PocketError) else f"{type(error).__name__}: {reason_of(error)}"
