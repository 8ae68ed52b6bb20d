"""Removing blocks by what hidden states or losses say, with a linear map in their place where the method has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penjing.methods.pruning.greedy_layers import GreedyOptions
from penjing.methods.pruning.layer_cut import LayerCut, last_linears
from penjing.methods.pruning.replaceme import folded
from penjing.models import find, layout_of
from penjing.models.shorter import shortened
from penjing.pipeline.dense_writer import DenseWriter
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.subset import BlockSubset
from penjing.pipeline.weights import Weights
from penjing.planning import storage_dtype

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask

SAMPLED = 64
"""Tokens of each window whose states are compared, evenly spaced."""


def cut_layers(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model without some blocks; returns which they were."""
    return _LayerCutter(task).run()


class _LayerCutter:
    def __init__(self, task: RemakeTask) -> None:
        remake = task.step.definition.remake
        assert isinstance(remake, LayerCut)
        self.task, self.remake, self.options = task, remake, task.step.options
        live = Weights(task.source, task.layout).live
        self.stream = StreamedModel(task.source.config, task.layout, live, trust_remote_code=task.trust_remote_code)

    def run(self) -> Mapping[str, Any]:
        task, blocks = self.task, self.task.layout.blocks
        if self.remake.named is not None:
            removed = self.remake.named(self.options)
        elif self.remake.by_states is not None:
            removed = self.remake.by_states(self._states(), self.options)
        else:
            assert self.remake.by_losses is not None
            removed = self.remake.by_losses(blocks, self.options, self._losses)
        keep = [index for index in range(blocks) if index not in removed]
        changed = self._bridge(removed) if self.remake.bridge is not None else {}
        view = BlockSubset(task.source, task.layout, keep)
        config = shortened(task.source.config, blocks, keep)
        layout = layout_of(config, trust_remote_code=task.trust_remote_code)
        writer = DenseWriter(task.directory, config, layout, storage_dtype(task.source.config, task.recipe))
        for number in range(layout.blocks + 1):
            names = [name for spec in layout.of_block(number - 1 if number else None) for name in spec.tensor_names()]
            writer.write(number, partial(_load, view, names, changed))
        writer.finish(task.source.files())
        return {"removed_blocks": removed}

    @torch.no_grad()
    def _states(self) -> Tensor:
        """Hidden states of sampled tokens between blocks: fp32 (L + 1, T, D)."""
        task = self.task
        places = torch.linspace(0, task.tokens.shape[1] - 1, min(SAMPLED, task.tokens.shape[1])).long()
        states = self.stream.embed(task.tokens, task.dtype)
        found = [states[:, places].flatten(0, 1).float()]
        for index in range(task.layout.blocks):
            task.progress("compare blocks", index, task.layout.blocks, task.layout.block_name(index))
            with self.stream.block(index, task.dtype) as block:
                self.stream.advance(block, index, states)
            found.append(states[:, places].flatten(0, 1).float())
        task.progress("compare blocks", task.layout.blocks, task.layout.blocks, "")
        return torch.stack(found)

    @torch.no_grad()
    def _losses(self, keep: Sequence[int]) -> list[float]:
        """Loss of the model of blocks `keep` without each of them. Every block is loaded once."""
        task = self.task
        assert isinstance(self.options, GreedyOptions)
        tokens = task.tokens[: self.options.windows]
        whole = self.stream.embed(tokens, task.dtype)
        without: list[Tensor] = []
        for number, index in enumerate(keep):
            task.progress("leave out blocks", number, len(keep), task.layout.block_name(index))
            with self.stream.block(index, task.dtype) as block:
                before = whole.clone()
                for states in (whole, *without):
                    self.stream.advance(block, index, states)
            without.append(before)
        if len(keep) == task.layout.blocks:
            self._original = whole
        with self.stream.head(task.dtype) as logits:
            return [
                sum(
                    _loss(self.options.loss, logits, *window)
                    for window in zip(tokens, states, self._original, strict=True)
                )
                for states in without
            ]

    @torch.no_grad()
    def _bridge(self, removed: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the block before the run `removed`, by full name in the shorter model."""
        task, first = self.task, removed[0] - 1
        module, linears = last_linears(task.source.config, task.layout, first)
        states = self.stream.embed(task.tokens, task.dtype)
        for index in range(first):
            with self.stream.block(index, task.dtype) as block:
                self.stream.advance(block, index, states)
        with self.stream.block(first, task.dtype) as block:
            added = self._advance_watching(block, first, states, module)
        base = states - added
        for index in removed:
            with self.stream.block(index, task.dtype) as block:
                self.stream.advance(block, index, states)
        width = states.shape[-1]
        gram, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        for mlp, residual, target in zip(added, base, states, strict=True):
            gram += mlp.double().T @ mlp.double()
            cross += mlp.double().T @ (target - residual).double()
        assert self.remake.bridge is not None
        matrix = self.remake.bridge(gram, cross, self.options)
        return {name: tensor for linear in linears for name, tensor in self._folded(matrix, first, linear)}

    def _advance_watching(self, block: nn.Module, index: int, states: Tensor, module: str) -> Tensor:
        """Advance the states; what a module of the block adds to them, (S, T, D)."""
        added = torch.empty_like(states)
        outputs: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = find(block, module).register_forward_hook(hook)
        for batch, place in zip(batches(states), batches(added), strict=True):
            batch.copy_(self.stream.run(block, index, batch))
            place.copy_(outputs.pop().view_as(batch))
        handle.remove()
        return added

    def _folded(self, matrix: Tensor, index: int, linear: str) -> list[tuple[str, Tensor]]:
        spec = self.task.layout.by_name[f"{self.task.layout.block_name(index)}.{linear}"]
        result = []
        for key, name in zip(spec.tensors, spec.tensor_names(), strict=True):
            tensor = self.task.source.load(name)
            turned = spec.transposed and key == "weight"
            new = folded(matrix, tensor.T if turned else tensor)
            result.append((name, new.T.contiguous() if turned else new))
        return result


def _loss(kind: str, logits: Callable[[Tensor], Tensor], ids: Tensor, states: Tensor, original: Tensor) -> float:
    """Mean loss over the tokens (T,) of a window, from states (T, D) after the last block."""
    found = torch.log_softmax(logits(states.unsqueeze(0)), 1)
    if kind == "perplexity":
        return float(nn.functional.nll_loss(found[:-1], ids[1:]))
    meant = torch.log_softmax(logits(original.unsqueeze(0)), 1)
    return float(nn.functional.kl_div(found, meant, log_target=True, reduction="batchmean"))


def _load(view: BlockSubset, names: Sequence[str], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: changed[name] if name in changed else view.load(name) for name in names}
