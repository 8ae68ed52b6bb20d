"""Removing channels of the residual stream as a step of a recipe, in the model's own basis or in a turned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field

from penjing.methods.base import Remake, Size
from penjing.methods.pruning.sizes import SizeOptions, parse_count
from penjing.methods.quantization.rotation import require_free_stream
from penjing.models import layout_of
from penjing.models.layout import Layout
from penjing.models.narrowing import narrow_stream
from penjing.numerics.masks import dropped_of


class ChannelOptions(SizeOptions):
    """Recipe keys of removing channels of the residual stream."""

    basis: Literal["own", "principal"] = Field(
        "principal",
        description="`principal`: turn the stream onto its principal axes first (SliceGPT), which unties the head; "
        "`own`: remove the channels with the smallest activations (Minitron)",
    )
    multiple: int = Field(8, ge=1, description="the hidden size becomes a multiple of it")


@dataclass(frozen=True, kw_only=True)
class StreamCut(Remake):
    """A model with fewer channels in the residual stream."""


def _config(config: Mapping[str, Any], layout: Layout, options: ChannelOptions) -> Mapping[str, Any]:
    """config.json of the model that is left. Raises PlanError or ValueError when there is none."""
    config, layout = _prepared(config, layout, options)
    full, step = layout.embedding.shape[1], options.multiple
    if options.sparsity is not None:
        hidden = max(1, round((full - dropped_of(full, options.sparsity)) / step)) * step
        return narrow_stream(config, layout, min(hidden, full)).config
    if options.params is None:
        raise ValueError("a `speedup` is worked out on the machine before a plan is made; give `sparsity` or `params`")
    target = parse_count(options.params)
    for hidden in range(full // step * step, 0, -step):
        narrow = narrow_stream(config, layout, hidden)
        if narrow.layout.parameters <= target:
            return narrow.config
    raise ValueError(
        f"params: {options.params} cannot be reached by removing channels alone: {step} channels have "
        f"{narrow_stream(config, layout, step).layout.parameters:,} parameters"
    )


def _sizes(config: Mapping[str, Any], layout: Layout, options: ChannelOptions) -> list[Size]:
    """The models that the step could leave, the largest first."""
    config, layout = _prepared(config, layout, options)
    full, step = layout.embedding.shape[1], options.multiple
    narrow = [narrow_stream(config, layout, hidden) for hidden in range(full // step * step, 0, -step)]
    return [
        Size(made.layout.parameters, layout.blocks, {"params": made.layout.parameters}, partial(dict, made.config))
        for made in narrow
    ]


def _prepared(config: Mapping[str, Any], layout: Layout, options: ChannelOptions) -> tuple[Mapping[str, Any], Layout]:
    """The model before channels go, with a head of its own if the stream is turned. PlanError where none can go."""
    narrow_stream(config, layout, layout.embedding.shape[1])  # refuses a model whose channels cannot go at all
    if options.basis == "principal":
        require_free_stream(layout, "use `basis: own`")
        config = {**config, "tie_word_embeddings": False}
        layout = layout_of(config)
    return config, layout


STREAM_CUT = StreamCut(config=_config, sizes=_sizes, keeps_zeros=lambda options: options.basis == "own")
"""The row of the method."""
