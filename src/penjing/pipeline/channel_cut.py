"""Removing channels of the residual stream: one pass to see which matter, then every tensor is sliced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penjing.checkpoint import Checkpoint
from penjing.methods.pruning.channels import ChannelOptions
from penjing.methods.pruning.minitron import channel_scores, window_energy
from penjing.methods.pruning.slicing import normalised_covariance, principal_axes
from penjing.methods.pruning.units import kept_units
from penjing.methods.quantization.rotation import turned
from penjing.models import find, layout_of
from penjing.models.layout import Layout, ModuleSpec
from penjing.models.narrowing import norm_factor, sliced, stream_sides
from penjing.pipeline.dense_writer import DenseWriter
from penjing.pipeline.rewritten import RewrittenCheckpoint
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.weights import Weights
from penjing.planning import storage_dtype

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask

Look = Callable[[Tensor, Tensor], Tensor]
"""What is remembered of a norm's inputs and outputs (B, T, D) in one batch; summed over batches."""


def cut_channels(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model of `task.config`, whose source has more channels; returns how many stay."""
    narrow = layout_of(task.config, trust_remote_code=task.trust_remote_code)
    full, hidden = task.layout.embedding.shape[1], narrow.embedding.shape[1]
    source, layout = task.source, task.layout
    assert isinstance(task.step.options, ChannelOptions)
    if task.step.options.basis == "principal":
        seen = _watch_norms(task, narrow, lambda inputs, outputs: normalised_covariance(inputs))
        rewriting = turned(layout, principal_axes(torch.stack(seen).sum(0)), None)
        source, layout = RewrittenCheckpoint(source, rewriting, ""), rewriting.layout
        channels = torch.arange(hidden)
    else:
        energies = _watch_norms(task, narrow, lambda inputs, outputs: window_energy(outputs))
        channels = kept_units(channel_scores(energies), full - hidden)
    writer = DenseWriter(task.directory, task.config, narrow, storage_dtype(task.source.config, task.recipe))
    for number in range(layout.blocks + 1):
        modules = layout.of_block(number - 1 if number else None)
        writer.write(number, partial(_sliced, modules, source, layout, narrow, channels))
    writer.finish(task.source.files())
    return {"kept": {"channels": [hidden, full]}}


@torch.no_grad()
def _watch_norms(task: RemakeTask, narrow: Layout, look: Look) -> list[Tensor]:
    """What `look` sees at each norm over the stream, one after another through the blocks."""
    layout = task.layout
    live = Weights(task.source, layout).live
    stream = StreamedModel(task.source.config, layout, live, trust_remote_code=task.trust_remote_code)
    states = stream.embed(task.tokens, task.dtype)
    seen: list[Tensor] = []
    for index in range(layout.blocks):
        task.progress("score channels", index, layout.blocks, layout.block_name(index))
        norms = [
            spec.name
            for spec in layout.of_block(index)
            if spec.kind == "norm" and stream_sides(layout, narrow, spec.name)[0]
        ]
        with stream.block(index, task.dtype) as block:
            seen += _block(stream, block, index, states, [find(stream.model, name) for name in norms], look)
    task.progress("score channels", layout.blocks, layout.blocks, "")
    return seen


def _block(
    stream: StreamedModel, block: nn.Module, index: int, states: Tensor, norms: Sequence[nn.Module], look: Look
) -> list[Tensor]:
    """Advance the states through one block; what was seen at each of its norms."""
    sums: dict[nn.Module, Tensor] = {}

    def hook(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found = look(args[0].float(), output.float())
        sums[norm] = sums[norm] + found if norm in sums else found

    hooks = [norm.register_forward_hook(hook) for norm in norms]
    for batch in batches(states):
        batch.copy_(stream.run(block, index, batch))
    for handle in hooks:
        handle.remove()
    return [sums[norm] for norm in norms]


def _sliced(
    modules: Sequence[ModuleSpec], source: Checkpoint, layout: Layout, narrow: Layout, channels: Tensor
) -> dict[str, Tensor]:
    """What is left of modules, by full tensor name."""
    result: dict[str, Tensor] = {}
    for module in modules:
        if not module.tensors:
            continue
        rows, columns = stream_sides(layout, narrow, module.name)
        stored = {key: source.load(name) for key, name in zip(module.tensors, module.tensor_names(), strict=True)}
        left = sliced(module, stored, channels if rows else None, channels if columns else None)
        factor = _factor(module, layout, narrow) if rows or columns else 1.0
        offset = layout.norm_offset if module.kind == "norm" else 0.0
        if factor != 1:
            left["weight"] = (left["weight"].double() + offset) * factor - offset
        result |= {f"{module.name}.{key}": tensor for key, tensor in left.items()}
    return result


def _factor(module: ModuleSpec, layout: Layout, narrow: Layout) -> float:
    """What a module's weight is multiplied by, so that the narrow model computes what zeros in the stream would."""
    factor = norm_factor(layout, narrow)
    if module.kind == "embedding":
        return factor if layout.scaled else 1.0
    if module.kind != "norm":
        return 1.0
    tied_and_scaled = module.block is None and layout.scaled and layout.tied
    return 1.0 if tied_and_scaled else factor
