"""The loop: batches in, gradients of the objective, steps of the optimiser, a log, and a point to continue from.

    for each step:      seed by (seed, step, device)
        micro-batches:  loss = objective(model, batch);  backward of loss * count      (bf16 where the machine has it)
        gradients / sum of counts over micro-batches and devices, clipped;  optimiser;  after_step

A step's gradient is that of the mean over all its items, however they are split into micro-batches and devices.
accelerate places the model, casts, and sums gradients over the processes in which a script that calls `train` runs
(`accelerate launch`); a whole recipe runs in one process.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import MissingDependency, TrainingError
from penjing.methods.training import Batch, Loss, Objective, Training, TrainOptions
from penjing.numerics.precision import compute_dtype
from penjing.progress import Progress
from penjing.training import saving
from penjing.training.data import Batches
from penjing.training.log import Curve, Log, read_curve
from penjing.training.optimizers import make_optimizer, set_rate, share_of_rate

STATE, LOG = "state.pt", "train.jsonl"
"""Names of the files in a training's directory: where to continue, and the log."""


@dataclass(frozen=True)
class Course:
    """Steps, and how often they begin again at step `rewind`."""

    steps: int
    repeats: int
    rewind: int

    @property
    def length(self) -> int:
        """Steps of the optimiser in all."""
        return self.steps + self.repeats * (self.steps - self.rewind)

    def place(self, step: int) -> int:
        """Where in the course a step is: what decides its data, its rate and its random numbers."""
        return step if step < self.steps else self.rewind + (step - self.steps) % (self.steps - self.rewind)

    def begins_again(self, step: int) -> bool:
        """Whether the course begins again with this step."""
        return step >= self.steps and (step - self.steps) % (self.steps - self.rewind) == 0


class _Learner(nn.Module):
    """Model and objective as one module, whose forward is the loss: what is moved, cast and wrapped as a whole."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch)


def train(
    training: Training,
    batches: Batches,
    options: TrainOptions,
    directory: Path,
    *,
    marks: Mapping[str, str],
    progress: Progress = lambda stage, done, total, detail: None,
    name: str = "train",
) -> Curve:
    """Run `options.steps` steps (and repeats), or what a killed run in `directory` left of them; the curve of all.

    The parameters of `training` that require a gradient are changed in place; at the end they are on the CPU and the
    model is in evaluation mode. `marks` are digests of what decides the course (recipe, model, data).

    Raises TrainingError naming the step when the loss is no number or runs away, ResumeError when `directory` holds a
    training with other marks, MissingDependency without accelerate.
    """
    return _Loop(training, options, directory, marks).run(batches, name, progress)


class _Loop:
    """One training: model, optimiser and accelerator."""

    def __init__(self, training: Training, options: TrainOptions, directory: Path, marks: Mapping[str, str]) -> None:
        self.options, self.training = options, training
        self.directory = directory
        _seed(options.seed, 0, 0)
        if options.gradient_checkpointing:
            _keep_less(training.model)
        self.accelerator = _accelerator()
        learner = _Learner(training.model, training.objective).train()
        self.learner = self.accelerator.prepare(learner)
        named = [(name, value) for name, value in learner.named_parameters() if value.requires_grad]
        if not named:
            raise TrainingError("nothing to train: no parameter requires a gradient; check `targets`")
        self.parameters = [value for _, value in named]
        self.optimizer = make_optimizer(named, options, training.rates)
        self.bare = learner
        self.marks = saving.fingerprint(learner, {**marks, "options": options.model_dump_json()})

    def run(self, batches: Batches, name: str, progress: Progress) -> Curve:
        """All the steps that are not done yet."""
        state = self.directory / STATE
        course = Course(self.options.steps, self.training.repeats, self.training.rewind)
        steps = course.length
        first = saving.restore(state, self.bare, self.optimizer, self.marks)
        log = Log(self.directory / LOG, first) if self.accelerator.is_main_process else None
        begin = time.perf_counter()
        for step in range(first, steps):
            started = time.perf_counter()
            place = course.place(step)
            if course.begins_again(step):
                self.optimizer.state.clear()
            loss, values = self.step(place, batches(place))
            self.training.after_step(step + 1)
            self.optimizer.zero_grad(set_to_none=True)
            values["seconds"] = round(time.perf_counter() - started, 4)
            if log is None:
                continue
            log.add(step + 1, loss, values)
            if (step + 1) % self.options.save_every == 0 or step + 1 == steps:
                saving.save(state, step + 1, self.bare, self.optimizer, self.marks)
            each = (time.perf_counter() - begin) / (step + 1 - first)
            left = _minutes(each * (steps - step - 1))
            progress(name, step + 1, steps, f"loss {loss:.4f}, {each:.2f} s a step, {left} left")
        if log is not None:
            log.close()
        self.accelerator.wait_for_everyone()
        self.bare.to("cpu").eval()
        return read_curve(self.directory / LOG)

    def step(self, step: int, batch: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """One step of the optimiser: its loss, and the other means for the log. Gradients are left in place."""
        accelerator, options = self.accelerator, self.options
        if len(batch) % accelerator.num_processes:
            raise TrainingError(
                f"{len(batch)} micro-batches per step cannot be shared by {accelerator.num_processes} devices; choose "
                "`batch_size` as a multiple of `micro_batch` times the devices"
            )
        _seed(options.seed, step, accelerator.process_index)
        rate = options.learning_rate * share_of_rate(step, options.steps, options.warm_up)
        set_rate(self.optimizer, rate)
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=accelerator.device)
        for number, micro in enumerate(mine, 1):
            last = number == len(mine)
            with nullcontext() if last else accelerator.no_sync(self.learner):
                loss = self.learner({key: value.to(accelerator.device) for key, value in micro.items()})
                accelerator.backward(loss.value * loss.count)
            count += loss.count
            for key, value in {"loss": loss.value, **loss.parts}.items():
                sums[key] = sums.get(key, 0) + value.detach().float() * loss.count
        total = accelerator.reduce(count)
        norm = self._apply(accelerator.num_processes / total)
        means = {key: float(accelerator.reduce(value) / total) for key, value in sums.items()}
        loss_value = means.pop("loss")
        return loss_value, {**means, "rate": rate, "gradient_norm": norm, "count": int(total)}

    def _apply(self, factor: Tensor) -> float:
        """Step the optimiser with gradients times `factor`, clipped; the norm before clipping.

        A gradient that is not finite changes nothing: the log raises.
        """
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(factor.device) * factor
        if self.options.clip is not None:
            factor = factor * (self.options.clip / (norm + 1e-6)).clamp(max=1.0)
        if norm.isfinite():
            torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        return float(norm)


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingDependency("training needs accelerate: pip install 'penjing[training]'") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Accelerator(mixed_precision="bf16" if compute_dtype(device) == torch.bfloat16 else "no")


def _keep_less(model: Any) -> None:
    """Let every block compute its activations again in the backward pass. (The name changed in transformers 5.)"""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _seed(seed: int, step: int, device: int) -> None:
    """Random numbers of a step are a function of the step, so there is nothing about them to save."""
    number = (seed * 1_000_003 + step) * 4_099 + device
    random.seed(number)
    torch.manual_seed(number)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
