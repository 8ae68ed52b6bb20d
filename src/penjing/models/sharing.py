"""Linears that compute with the weight of a linear in an earlier block: what config.json says of them, and a layout.

    "shared_weights": {"linears": {"model.layers.5.mlp.up_proj": "model.layers.4.mlp.up_proj"}, "scaled": true}

The first linear has no weight of its own, only its bias and, where `scaled`, a factor per output:

    y = output_scale * (W x) + bias        W of the second linear, output_scale (N,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penjing.errors import CheckpointError
from penjing.models.layout import Layout, ModuleSpec

CONFIG_KEY = "shared_weights"
SCALE = "output_scale"


def sharing_entry(owners: Mapping[str, str], *, scaled: bool) -> dict[str, Any]:
    """What goes into config.json. owners: linear -> the linear whose weight it uses."""
    return {CONFIG_KEY: {"linears": dict(sorted(owners.items())), "scaled": scaled}}


def with_sharing(layout: Layout, entry: Mapping[str, Any] | None) -> Layout:
    """`layout` after what config.json says under `shared_weights`; unchanged without it. Raises CheckpointError.

    A linear that borrows is no `linear` any more, so that steps pass it over; and no scale can be moved between a norm
    and linears of which one borrows or is borrowed, as other blocks have other norms.
    """
    if entry is None:
        return layout
    owners: Mapping[str, str] = entry["linears"]
    for name, owner in owners.items():
        _check(layout, name, owner, owners)
    modules = tuple(
        _borrowing(module, owners[module.name], scaled=entry["scaled"]) if module.name in owners else module
        for module in layout.modules
    )
    tied = {*owners, *owners.values()}
    groups = tuple(
        tuple(
            group
            for group in found
            if not any(f"{layout.block_name(index)}.{name}" in tied for name in (group.source, *group.linears))
        )
        for index, found in enumerate(layout.groups)
    )
    return replace(layout, modules=modules, groups=groups)


def _check(layout: Layout, name: str, owner: str, owners: Mapping[str, str]) -> None:
    found = [layout.by_name.get(each) for each in (name, owner)]
    if found[0] is None or found[1] is None:
        raise CheckpointError(f"config.json: {name} shares the weight of {owner}, and the model lacks one of them")
    (first, second), places = (found[0], found[1]), [-1 if each is None else each.block for each in found]
    if owner in owners or places[0] is None or places[1] is None or places[1] >= places[0]:
        raise CheckpointError(f"config.json: {name} cannot share the weight of {owner}, which is not in a block before")
    if first.tensors["weight"] != second.tensors["weight"] or first.transposed != second.transposed:
        raise CheckpointError(f"config.json: {name} cannot share the weight of {owner}, which has another shape")


def _borrowing(module: ModuleSpec, owner: str, *, scaled: bool) -> ModuleSpec:
    scale = {SCALE: (module.shape[0],)} if scaled else {}
    own = {key: shape for key, shape in module.tensors.items() if key != "weight"}
    return replace(module, kind="other", tensors={**scale, **own}, owner=owner)
