"""What a training run tells: a line of JSON per step, the curve read back from it, and when it has gone astray."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penjing.checkpoint import write_bytes
from penjing.errors import TrainingError

WINDOW = 20
"""Steps whose mean loss is compared with that of the first as many."""


@dataclass(frozen=True)
class Curve:
    """The loss of every step, from the log. `steps` are counted from 1."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]


def read_curve(log: Path) -> Curve:
    """The curve of a run from its `train.jsonl`."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    columns = (tuple(row[key] for row in rows) for key in ("step", "loss", "seconds"))
    return Curve(*columns)


class Log:
    """The log of a run that has done `done` steps; what a killed run wrote beyond them is dropped."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if path.is_file() else []
        write_bytes(path, "".join(lines).encode())
        self.losses = [json.loads(line)["loss"] for line in lines]
        self._file = path.open("a", encoding="utf-8")

    def add(self, step: int, loss: float, values: Mapping[str, float]) -> None:
        """Note a step, counted from 1. Raises TrainingError when the loss is no number or runs away."""
        self.losses.append(loss)
        self._file.write(json.dumps({"step": step, "loss": loss, **values}) + "\n")
        self._file.flush()
        strange = [name for name, value in {"loss": loss, **values}.items() if not math.isfinite(value)]
        if strange:
            raise TrainingError(
                f"training step {step}: {', '.join(strange)} is not finite; lower `learning_rate`, set `clip`, or "
                f"look at the data of that step. The steps before it are in {self.path}"
            )
        first, last = _mean(self.losses[:WINDOW]), _mean(self.losses[-WINDOW:])
        if step >= 2 * WINDOW and last > first + max(1.0, 3 * abs(first)):
            raise TrainingError(
                f"training step {step}: the loss runs away, {last:.3g} over the last {WINDOW} steps after {first:.3g} "
                "over the first; lower `learning_rate` or lengthen `warm_up`"
            )

    def close(self) -> None:
        """Nothing more will be noted."""
        self._file.close()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
