"""The training loop of every recovery method: steps, validation, checkpoints, log.

A step is a function of the seed and its number, so an interrupted run resumes from its last checkpoint to the
same bytes. Processes launched by `accelerate launch` share each batch and add up their gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.nn.utils import get_total_norm

from pocketllm.compression.progress import Event
from pocketllm.config import LoopConfig
from pocketllm.errors import ConfigError, TrainingError
from pocketllm.format.workspace import Workspace
from pocketllm.recover.run_log import RunLog

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    learning_rate: float
    parameters: list[torch.nn.Parameter]


class Task(Protocol):
    """What is trained, and on what.

    items: number of training items; each step takes a batch of them.
    """

    items: int

    def groups(self) -> list[Group]:
        """Trained parameters."""

    def weight(self, numbers: Tensor) -> float:
        """Weight of these items in the loss, usually their scored tokens."""

    def backward(self, numbers: Tensor, scale: float) -> float:
        """Add the gradient of scale * (loss summed over these items); returns that value."""

    def validate(self) -> float:
        """Mean loss on the validation items."""


@dataclass
class Progress:
    """State of a run. history: (step, validation loss). waited: validations since the best one.

    seconds: duration of all steps and validations, including those before a resumption.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    waited: int = 0
    stopped_early: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """A finished step, for progress: its number of `steps`, training and latest validation loss, its duration."""

    step: int
    steps: int
    loss: float
    validation: float
    seconds: float


class Loop:
    """Trains a task for a number of steps.

    Args:
        work: holds checkpoints; a run resumes from the one that is there.
        log: gets a line per step.
        state: this process among those launched together.
    """

    def __init__(
        self, task: Task, config: LoopConfig, steps: int, work: Workspace, log: RunLog, state: PartialState
    ) -> None:
        self.task, self.config, self.steps = task, config, steps
        self.work, self.log, self.state = work, log, state
        self.groups = [g for g in task.groups() if g.learning_rate > 0 and g.parameters]
        self.parameters = [p for g in self.groups for p in g.parameters]
        if not self.parameters:
            raise ConfigError("nothing to train: every learning rate is 0; raise one")
        self.optimizer = torch.optim.Adam(
            [{"params": g.parameters, "lr": g.learning_rate} for g in self.groups]
        )
        self.best: list[Tensor] = []
        self.at = Progress()
        self._saved_step: int | None = None  # of the checkpoint

    def trained(self) -> dict[str, int]:
        """Number of trained parameters by name of the group."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.name] = counts.get(group.name, 0) + sum(p.numel() for p in group.parameters)
        return counts

    def run(self, on_progress: Callable[[StepDone], None]) -> Progress:
        """Train; afterwards the parameters are those of the best validation.

        Raises:
            TrainingError: a loss or gradient that is not finite; the last checkpoint stays as it is.
        """
        if self.work.has(CHECKPOINT):
            self._restore()
        self.log.resume_at(self.at.step)
        if not self.at.history:
            self.at.seconds += _timed(self._validate)
        while self.at.step < self.steps and not self.at.stopped_early:
            started = time.monotonic()
            loss, norm = self._step()
            step = self.at.step
            validated = step % self.config.eval_every == 0 or self._begin(step) == step
            if validated:
                self._validate()
            seconds = time.monotonic() - started
            self.at.seconds += seconds
            latest = self.at.history[-1][1]
            facts = {"step": step, "loss": loss, "grad_norm": norm, "lr_factor": self._rate(step - 1)}
            self.log.add(
                {**facts, **({"validation": latest} if validated else {}), "seconds": round(seconds, 3)}
            )
            if step == self.steps or self.at.stopped_early:
                self._save()
            on_progress(StepDone(step=step, steps=self.steps, loss=loss, validation=latest, seconds=seconds))
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
        return self.at

    def _step(self) -> tuple[float, float]:
        """One step of the optimizer; returns loss and gradient norm.

        If a checkpoint is due, the state before the step is saved, once its loss has turned out to be finite.
        """
        config, number = self.config, self.at.step
        if number and self._begin(number) == number:
            self._restart()
        torch.manual_seed(hash((config.seed, number)) & 0x7FFFFFFF)
        batch = self._batch(number)
        scale = 1.0 / max(1e-9, self.task.weight(batch))
        mine = batch[self.state.process_index :: self.state.num_processes]
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for numbers in mine.split(config.micro_batch or max(1, len(mine))):
            if len(numbers):
                loss += self.task.backward(numbers, scale)
        loss, norm = self._agree(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(f"the loss is {loss}, the gradient norm {norm}", number + 1)
        if number % config.checkpoint_every == 0 and number:
            self._save()
        if config.max_grad_norm and norm > config.max_grad_norm:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(config.max_grad_norm / norm)
        for group, chosen in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = chosen.learning_rate * self._rate(number)
        self.optimizer.step()
        self.at.step += 1
        return loss, norm

    def _stop(self, reason: str, step: int) -> NoReturn:
        """Raise TrainingError for a step; 0 is before the first one."""
        if step == 0:
            raise TrainingError(f"{reason} before the first step; check the model, its teacher and the text")
        kept = "no checkpoint had been written yet to"
        if self._saved_step is not None:
            kept = f"the last good state, after step {self._saved_step}, is kept in"
        raise TrainingError(
            f"step {step}: {reason}; stopped, {kept} {self.work.folder}. Delete that folder and start again "
            "with lower learning rates, or in float32"
        )

    def _agree(self, loss: float) -> tuple[float, float]:
        """Add up losses and gradients of all processes; returns the loss and the gradient's norm."""
        if self.state.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = reduce(parameter.grad, "sum")
            loss = float(reduce(torch.tensor(loss, device=self.state.device), "sum"))
        return loss, float(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def _begin(self, number: int) -> int:
        """First step of the cycle that a step belongs to; `steps` is the begin of one more."""
        cycles = self.config.cycles
        cycle = (cycles * (number + 1) - 1) // self.steps
        return cycle * self.steps // cycles

    def _restart(self) -> None:
        """Go back to the best parameters, with fresh moments."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
        self.optimizer.state.clear()
        self.at.waited = 0

    def _rate(self, number: int) -> float:
        """Factor on the learning rates in a step: linear warm-up, then the schedule, in each cycle anew."""
        config, steps = self.config, -(-self.steps // self.config.cycles)
        number, warmup = number - self._begin(number), math.ceil(config.warmup * steps)
        if number < warmup:
            return (number + 1) / warmup
        done, rest = number - warmup, max(1, steps - warmup)
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done / rest))
        return 1.0 if config.schedule == "constant" else 1 - done / rest

    def _batch(self, number: int) -> Tensor:
        """Items of a step: every epoch takes all of them in another order."""
        size, items = self.config.batch_size, self.task.items
        wanted = torch.arange(number * size, (number + 1) * size)
        orders = {
            epoch: torch.randperm(
                items, generator=torch.Generator().manual_seed(self.config.seed * 1000003 + epoch)
            )
            for epoch in set((wanted // items).tolist())
        }
        return torch.stack([orders[g // items][g % items] for g in wanted.tolist()])

    def _validate(self) -> None:
        """Validate, and keep the parameters if they are the best so far."""
        loss = self.task.validate()
        if self.state.num_processes > 1:
            loss = float(reduce(torch.tensor(loss, device=self.state.device), "mean"))
        at = self.at
        if not math.isfinite(loss):
            self._stop(f"the validation loss is {loss}", at.step)
        at.history.append((at.step, loss))
        if loss < at.best_loss or not self.best:
            at.best_loss, at.best_step, at.waited = loss, at.step, 0
            self.best = [p.detach().clone() for p in self.parameters]
        else:
            at.waited += 1
            at.stopped_early = bool(self.config.patience) and at.waited >= self.config.patience

    def _save(self) -> None:
        if not self.state.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for n, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors[f"parameter.{n}"], tensors[f"best.{n}"] = parameter.detach(), best
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{n}"] = value
        self.work.save(CHECKPOINT, tensors, dict(vars(self.at)))
        self._saved_step = self.at.step

    def _restore(self) -> None:
        tensors, facts = self.work.load(CHECKPOINT)
        self.at = Progress(**facts)
        self._saved_step = self.at.step
        self.at.history = [(step, loss) for step, loss in facts["history"]]
        device = self.parameters[0].device
        self.best = [tensors[f"best.{n}"].to(device) for n in range(len(self.parameters))]
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{n}"])
                state: dict[str, Any] = {
                    key: tensors[f"{key}.{n}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{n}" in tensors
                }
                if state:
                    moved = {k: v if k == "step" else v.to(device) for k, v in state.items()}
                    self.optimizer.state[parameter] = moved


def _timed(act: Callable[[], None]) -> float:
    """Duration of a call in seconds."""
    started = time.monotonic()
    act()
    return time.monotonic() - started


def step_event(done: StepDone) -> Event:
    """A finished step as a progress event."""
    detail = f"step {done.step} of {done.steps}, loss {done.loss:.4g}, validation {done.validation:.4g}"
    return Event("train", done.step / done.steps, f"{detail}, {done.seconds:.1f} s per step")
