"""The measured KL divergence of whole mixtures of choices, many at a time, for the search that refines an allocation.

Every choice of every unit is kept in a file as it was compressed on dense inputs. A block is loaded once for all
mixtures, and mixtures that agree so far share their hidden states: one costs what comes after its first difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from penjing.evaluation.metrics import Comparison
from penjing.methods.allocation.evopress import Assignment
from penjing.models.layout import Layout
from penjing.pipeline.stream import StreamedModel, batches


@dataclass
class Database:
    """Weights (N, K) of linears under every choice, in bf16, one file per linear and choice.

    It takes as many times the size of the model in 16 bits as there are choices.
    """

    folder: Path
    names: dict[tuple[str, int], Path] = field(default_factory=dict)

    def add(self, name: str, choice: int, weight: Tensor) -> None:
        """Keep what `choice` made of a linear."""
        path = self.folder / f"{len(self.names)}.safetensors"
        save_file({"weight": weight.to(torch.bfloat16).contiguous()}, path)
        self.names[name, choice] = path

    def load(self, name: str, choice: int) -> Tensor:
        """It back, fp32."""
        with safe_open(self.names[name, choice], "pt") as file:
            return file.get_tensor("weight").float()


class Mixtures:
    """Measures assignments of choices to units.

    units   linears by full name, those that share a choice together
    dense   choices that leave a unit as it is
    stages  windows (S, T) of tokens for every stage of selection
    gone    blocks that no mixture has
    """

    def __init__(
        self,
        stream: StreamedModel,
        units: Sequence[Sequence[str]],
        dense: Sequence[bool],
        database: Database,
        stages: Sequence[Tensor],
        gone: Sequence[int] = (),
    ) -> None:
        self._stream, self._dense, self._database, self._stages = stream, dense, database, stages
        self._layout: Layout = stream.layout
        self._gone = frozenset(gone)
        self._blocks: list[list[tuple[int, str]]] = [[] for _ in range(self._layout.blocks)]
        for unit, names in enumerate(units):
            for name in names:
                self._blocks[self._layout.by_name[name].block or 0].append((unit, name))
        self._logits: dict[int, list[Tensor]] = {}

    def losses(self, assignments: Sequence[Assignment], stage: int) -> list[float]:
        """KL(dense || mixture) in nats per token on the text of a stage."""
        tokens = self._stages[stage]
        if stage not in self._logits:
            states = self._run([None], tokens)[None]
            self._logits[stage] = self._head(states)
        found = self._run(assignments, tokens)
        results = []
        for assignment in assignments:
            comparison = Comparison()
            for window, logits in enumerate(self._head(found[assignment])):
                comparison.update(logits[:-1], tokens[window, 1:], self._logits[stage][window][:-1])
            results.append(float(comparison.result().kl or 0.0))
        return results

    def _head(self, states: Tensor) -> list[Tensor]:
        with self._stream.head(torch.float32) as logits:
            return [logits(states[place : place + 1]) for place in range(len(states))]

    def _run(self, assignments: Sequence[Assignment | None], tokens: Tensor) -> dict[Assignment | None, Tensor]:
        """Last hidden states of every mixture; None: of the dense model."""
        shared: dict[tuple[int, ...], Tensor] = {(): self._stream.embed(tokens, torch.float32)}
        prefix: dict[Assignment | None, tuple[int, ...]] = dict.fromkeys(assignments, ())
        for index, members in enumerate(self._blocks):
            with self._stream.block(index, torch.float32) as block, torch.no_grad():
                after: dict[tuple[int, ...], Tensor] = {}
                for assignment, before in prefix.items():
                    if index in self._gone and assignment is not None:
                        after[before] = shared[before]
                        continue
                    chosen = tuple(-1 if assignment is None else assignment[unit] for unit, _ in members)
                    key = (*before, *chosen)
                    prefix[assignment] = key
                    if key not in after:
                        given = self._parameters(index, members, chosen)
                        parts = [
                            self._stream.run_with(block, index, batch, given).clone()
                            for batch in batches(shared[before])
                        ]
                        after[key] = torch.cat(parts)
                shared = after
        return {assignment: shared[key] for assignment, key in prefix.items()}

    def _parameters(self, index: int, members: Sequence[tuple[int, str]], chosen: Sequence[int]) -> dict[str, Tensor]:
        """Live parameters of a block that differ from the dense model's."""
        found = {}
        for (_, name), choice in zip(members, chosen, strict=True):
            if choice >= 0 and not self._dense[choice]:
                weight = self._database.load(name, choice)
                inside = name.removeprefix(f"{self._layout.block_name(index)}.")
                found[f"{inside}.weight"] = weight.T.contiguous() if self._layout.by_name[name].transposed else weight
        return found
