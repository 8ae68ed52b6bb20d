"""Which blocks share weights, found by trying, and the model in which they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penjing.methods.weight_sharing.tie import (
    TieOptions,
    Ties,
    alike,
    choose,
    fitted_scale,
    owners,
    shared_linears,
    tied_config,
)
from penjing.models import find, layout_of
from penjing.models.sharing import SCALE
from penjing.pipeline.dense_writer import DenseWriter
from penjing.pipeline.observe import Observer
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.weights import Weights
from penjing.planning import storage_dtype
from penjing.statistics import Gram

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask


def tie_blocks(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model in which blocks share weights; returns which block borrows from which."""
    return _Tier(task).run()


class _Tier:
    """One model on the way to shared weights.

    _scales  borrower, owner, linear (by name inside the block) -> fitted factors (N,)
    """

    def __init__(self, task: RemakeTask) -> None:
        assert isinstance(task.step.options, TieOptions)
        self.task, self.options, self.layout = task, task.step.options, task.layout
        self.tokens = task.tokens[: self.options.windows]
        live = Weights(task.source, task.layout).live
        self.stream = StreamedModel(task.source.config, task.layout, live, trust_remote_code=task.trust_remote_code)
        self._scales: dict[tuple[int, int, str], Tensor] = {}
        self._dense = torch.empty(0)  # hidden states after the last block, once they are known

    def run(self) -> Mapping[str, Any]:
        errors = self._errors()
        ties = choose(errors, self.options, self._divergences)
        (kl,) = self._divergences([ties])
        self._write(ties)
        said = {f"{borrower}": owner for borrower, owner in sorted(ties.items())}
        return {"shared_blocks": said, "kl": kl, "errors": {f"{t}": errors[t, s] for t, s in sorted(ties.items())}}

    @torch.no_grad()
    def _errors(self) -> dict[tuple[int, int], float]:
        """|f'(x) - f(x)| / |f(x)| of every block under every possible partner, in the dense model."""
        task, errors = self.task, dict[tuple[int, int], float]()
        partners = {
            block: [other for other in kind if block - self.options.reach <= other < block]
            for kind in alike(self.layout, self.options)
            for block in kind
        }
        states = self.stream.embed(self.tokens, task.dtype)
        for index in range(self.layout.blocks):
            task.progress("try partners", index, self.layout.blocks, self.layout.block_name(index))
            with self.stream.block(index, task.dtype) as block:
                grams = self._observe(block, index, states) if partners.get(index) else {}
                before = states.clone()
                self.stream.advance(block, index, states)
                for owner in partners.get(index, ()):
                    weights = self._weights(index, owner, grams).items()
                    given = {name: tensor.to(task.dtype) for name, tensor in weights}
                    moved = sum(
                        float((self.stream.run_with(block, index, batch, given) - target).double().square().sum())
                        for batch, target in zip(batches(before), batches(states), strict=True)
                    )
                    errors[index, owner] = (moved / float(states.double().square().sum())) ** 0.5
        task.progress("try partners", self.layout.blocks, self.layout.blocks, "")
        self._dense = states
        return errors

    def _observe(self, block: nn.Module, index: int, states: Tensor) -> dict[str, Tensor]:
        """Gram matrices of the inputs of the linears that would borrow, by name inside the block."""
        prefix = f"{self.layout.block_name(index)}."
        names = [module.name.removeprefix(prefix) for module in shared_linears(self.layout, index, self.options)]
        with Observer(block, find, {name: [Gram] for name in names}) as observer:
            for batch in batches(states):
                with observer.forward():
                    self.stream.run(block, index, batch)
        return {name: observer.statistics[name][Gram].value for name in names}

    def _weights(self, borrower: int, owner: int, grams: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameters of a block that borrows, by name inside it, as the live modules hold them: fp32.

        grams  of its linears, when their scales are not fitted yet
        """
        prefix, found = f"{self.layout.block_name(borrower)}.", dict[str, Tensor]()
        for name, other in owners(self.layout, self.options, {borrower: owner}).items():
            spec, inside = self.layout.by_name[name], name.removeprefix(prefix)
            owned, own = (self._matrix(each, spec.transposed) for each in (other, name))
            if grams is not None and self.options.scale == "output":
                self._scales[borrower, owner, inside] = fitted_scale(own, owned, grams[inside])
            weight = owned * self._scale(borrower, owner, inside, len(owned)).unsqueeze(1)
            found[f"{inside}.weight"] = weight.T if spec.transposed else weight
        return found

    def _matrix(self, name: str, transposed: bool) -> Tensor:
        tensor = self.task.source.load(f"{name}.weight").float()
        return tensor.T if transposed else tensor

    def _scale(self, borrower: int, owner: int, linear: str, outputs: int) -> Tensor:
        scale = self._scales.get((borrower, owner, linear))
        return torch.ones(outputs) if scale is None else scale

    @torch.no_grad()
    def _divergences(self, trials: Sequence[Ties]) -> list[float]:
        """KL divergence, in nats per token, of the model under each of several sets of ties from the dense one.

        Every block is loaded once. Trials that agree so far are one: `trials` by their ties up to the current block.
        """
        task = self.task
        states: dict[tuple[tuple[int, int], ...], Tensor] = {(): self.stream.embed(self.tokens, task.dtype)}
        for index in range(self.layout.blocks):
            with self.stream.block(index, task.dtype) as block:
                after: dict[tuple[tuple[int, int], ...], Tensor] = {}
                for key in dict.fromkeys(_up_to(ties, index) for ties in trials):
                    given: dict[str, Tensor] = {}
                    if key and key[-1][0] == index:
                        weights = self._weights(*key[-1]).items()
                        given = {name: tensor.to(task.dtype) for name, tensor in weights}
                    after[key] = self._advanced(block, index, states[_up_to(dict(key), index - 1)], given)
                states = after
        with self.stream.head(task.dtype) as logits:
            return [self._divergence(logits, states[_up_to(ties, self.layout.blocks)]) for ties in trials]

    def _advanced(self, block: nn.Module, index: int, states: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self.stream.run_with(block, index, batch, given) for batch in batches(states)])

    def _divergence(self, logits: Any, states: Tensor) -> float:
        total = 0.0
        for found, meant in zip(states, self._dense, strict=True):
            ours, theirs = (torch.log_softmax(logits(each.unsqueeze(0)), 1) for each in (found, meant))
            total += float(nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))
        return total / len(states)

    def _write(self, ties: Ties) -> None:
        task = self.task
        config = tied_config(task.source.config, self.layout, self.options, ties)
        layout = layout_of(config, trust_remote_code=task.trust_remote_code)
        writer = DenseWriter(task.directory, config, layout, storage_dtype(task.source.config, task.recipe))
        scales = dict(self._named_scales(ties))
        for number in range(layout.blocks + 1):
            names = [name for spec in layout.of_block(number - 1 if number else None) for name in spec.tensor_names()]
            writer.write(number, partial(self._load, names, scales))
        writer.finish(task.source.files())

    def _load(self, names: Sequence[str], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: scales[name] if name in scales else self.task.source.load(name) for name in names}

    def _named_scales(self, ties: Ties) -> Iterator[tuple[str, Tensor]]:
        for (borrower, owner, linear), scale in self._scales.items():
            if ties.get(borrower) == owner:
                yield f"{self.layout.block_name(borrower)}.{linear}.{SCALE}", scale


def _up_to(ties: Ties, index: int) -> tuple[tuple[int, int], ...]:
    """Ties of blocks up to `index`, in order."""
    return tuple(sorted((borrower, owner) for borrower, owner in ties.items() if borrower <= index))
