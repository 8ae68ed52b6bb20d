"""Removing blocks as a step that makes another model: which go, and what makes up for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penjing.methods.base import Remake
from penjing.methods.pruning.angular_layers import RunOptions, nearest_run
from penjing.methods.pruning.greedy_layers import GreedyOptions, greedy
from penjing.methods.pruning.named_blocks import NamedOptions, config_without
from penjing.methods.pruning.replaceme import ReplaceMeOptions, transform
from penjing.models.couplings import find_couplings
from penjing.models.layout import Layout
from penjing.models.shorter import shortened

Losses = Callable[[Sequence[int]], Sequence[float]]
"""Loss of the model of some blocks without each of them in turn."""


@dataclass(frozen=True, kw_only=True)
class LayerCut(Remake):
    """A model with fewer blocks; one of the first three says which go.

    named      the options -> blocks to remove
    by_states  hidden states between blocks, fp32 (L + 1, T, D), and the options -> blocks to remove
    by_losses  number of blocks, the options, and losses -> blocks to remove
    bridge     M^T M and M^T (L - Y) of the MLP before the run that goes (see replaceme.py) -> T (D, D)
    """

    named: Callable[[Any], list[int]] | None = None
    by_states: Callable[[Tensor, Any], list[int]] | None = None
    by_losses: Callable[[int, Any, Losses], list[int]] | None = None
    bridge: Callable[[Tensor, Tensor, Any], Tensor] | None = None


def last_linears(config: Mapping[str, Any], layout: Layout, index: int) -> tuple[str, list[str]]:
    """What ends the MLP of block `index`: the module whose output is added to the stream, and the linears in it.

    Names are relative to the block. ValueError where something stands between the MLP and the stream.
    """
    block = find_couplings(config, layout)[index]
    linears = [coupling.consumer for coupling in block.of("neurons")]
    if not linears:
        raise ValueError(f"{layout.block_name(index)} has no MLP into which a matrix could be folded")
    writers = block.writers | set(layout.residual[index].writers if layout.residual else ())
    if wrong := next((name for name in linears if name not in writers), None):
        raise ValueError(
            f"{layout.block_name(index)}.{wrong}.weight: a norm stands between it and the residual stream, so no "
            "matrix can be folded into it; use a method that only removes blocks"
        )
    return linears[0].partition(".experts.")[0], linears


def _shorter(config: Mapping[str, Any], layout: Layout, options: Any) -> Mapping[str, Any]:
    if not options.drop:
        raise ValueError("how many blocks go is worked out before a plan is made; give `drop`")
    if options.drop >= layout.blocks:
        raise ValueError(f"drop: {options.drop} leaves none of {layout.blocks} blocks; at least one must stay")
    if options.drop > len(free := options.free_blocks(layout.blocks)):
        raise ValueError(f"drop: {options.drop} is more than the {len(free)} blocks that are not protected")
    return shortened(config, layout.blocks, range(layout.blocks - options.drop))


def _bridged(config: Mapping[str, Any], layout: Layout, options: ReplaceMeOptions) -> Mapping[str, Any]:
    last_linears(config, layout, 0)
    _shorter(config, layout, options.model_copy(update={"protect_first": max(1, options.protect_first)}))
    return _shorter(config, layout, options)


def _inner_run(states: Tensor, options: ReplaceMeOptions) -> list[int]:
    """The nearest run that has a block before it."""
    free = options.free_blocks(len(states) - 1)
    return nearest_run(states, options.drop, range(max(1, free.start), free.stop))


def _greedy(blocks: int, options: GreedyOptions, losses: Losses) -> list[int]:
    return greedy(blocks, options.drop, losses, options.free_blocks(blocks))


def _nearest(states: Tensor, options: RunOptions) -> list[int]:
    return nearest_run(states, options.drop, options.free_blocks(len(states) - 1))


def _bridge(gram: Tensor, cross: Tensor, options: ReplaceMeOptions) -> Tensor:
    return transform(gram, cross, ridge=options.ridge)


def _listed(options: NamedOptions) -> list[int]:
    return list(options.blocks)


NAMED = LayerCut(config=config_without, keeps_zeros=lambda options: False, named=_listed)
ANGULAR = LayerCut(config=_shorter, keeps_zeros=lambda options: False, by_states=_nearest)
GREEDY = LayerCut(config=_shorter, keeps_zeros=lambda options: False, by_losses=_greedy)
REPLACEME = LayerCut(config=_bridged, keeps_zeros=lambda options: False, by_states=_inner_run, bridge=_bridge)
