"""A model with fewer units: what its config.json says, which shapes its tensors have, and how tensors are sliced.

The one place that removes anything, for every architecture. Widths are the same in all blocks, because config.json
has one number for them. A config is only accepted when the layout that follows from it has exactly the shapes that
slicing gives, so a family whose config cannot say a width (GPT-2 derives the width of a head from the number of heads)
is refused before any weight is read, with the tensor that would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penjing.errors import CheckpointError, PlanError
from penjing.models import layout_of
from penjing.models.build import check_config, complete_config
from penjing.models.couplings import Coupling, Couplings, UnitKind
from penjing.models.layout import Layout, ModuleSpec

INNER = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim")
HEADS = ("num_attention_heads", "n_head", "num_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
HIDDEN = ("hidden_size", "n_embd", "d_model")
"""Names under which configs keep widths."""

Shapes = dict[str, tuple[int, ...]]
"""Full tensor name -> shape as stored."""

Kept = Mapping[tuple[UnitKind, int], int]
"""Kind and number of units of a coupling -> how many of them stay."""


@dataclass(frozen=True)
class Narrowed:
    """The model that is left. `config` is the whole of config.json; `notes` are for whoever reads the plan."""

    layout: Layout
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def narrow_units(
    config: Mapping[str, Any],
    layout: Layout,
    couplings: Sequence[Couplings],
    kept: Kept,
    *,
    trust_remote_code: bool = False,
) -> Narrowed:
    """The model of `config` with `kept` units in every block. Raises PlanError where no config says so."""
    wanted = shapes(layout)
    for index, block in enumerate(couplings):
        prefix = f"{layout.block_name(index)}."
        for coupling in block.found:
            if (coupling.kind, coupling.units) in kept:
                _shrink(wanted, layout, prefix, coupling, kept[coupling.kind, coupling.units])
    changes: dict[str, Any] = {}
    for (kind, units), count in kept.items():
        changes |= _inner(config, units, count) if kind == "neurons" else _heads(config, couplings, units, count)
    return _accept(config, changes, wanted, trust_remote_code)


def narrow_stream(
    config: Mapping[str, Any], layout: Layout, hidden: int, *, trust_remote_code: bool = False
) -> Narrowed:
    """The model of `config` with `hidden` channels in the residual stream. Raises PlanError where that cannot be.

    An RMSNorm divides by a mean over the channels. So that it does what it would with zeros in the channels removed,
    its epsilon grows by D / d, and whoever slices its weight multiplies it by sqrt(D / d) (`norm_factor`).
    """
    if layout.family == "inferred" or layout.heads is None:
        raise PlanError(
            f"where the residual stream of {layout.model_type} is scaled or normalised is not known, so its channels "
            "cannot be removed; remove neurons, heads or blocks"
        )
    full = layout.embedding.shape[1]
    changes: dict[str, Any] = {key: hidden for key in HIDDEN if config.get(key) == full}
    changes["head_dim"] = layout.heads.size
    narrow = layout_of({**config, **changes})
    other = layout_of({**config, **changes, **{key: 2 * full for key in HIDDEN if key in changes}})
    if other.heads is None or other.heads.size != layout.heads.size:
        raise PlanError(
            f"the residual stream of {layout.model_type} cannot be narrowed: its heads are a fixed fraction of it, and "
            "its LayerNorm subtracts the mean over all channels; remove neurons or blocks"
        )
    changes["rms_norm_eps"] = complete_config(config)["rms_norm_eps"] * full / hidden
    return _accept(config, changes, shapes(narrow), trust_remote_code)


def norm_factor(layout: Layout, narrow: Layout) -> float:
    """sqrt(D / d): what the weight of a norm over the stream is multiplied by when channels are removed."""
    return math.sqrt(layout.embedding.shape[1] / narrow.embedding.shape[1])


def stream_sides(layout: Layout, narrow: Layout, name: str) -> tuple[bool, bool]:
    """Whether the rows and the columns of a module (as methods see them) are channels of the stream.

    They are where the `narrow` model of `narrow_stream` has fewer.
    """
    specs = (layout.by_name[name], narrow.by_name[name])
    if not specs[0].tensors:
        return False, False
    old, new = (spec.tensors["weight"][:: -1 if spec.transposed else 1] for spec in specs)
    return old[0] != new[0], len(old) == 2 and old[1] != new[1]


def shapes(layout: Layout) -> Shapes:
    """Every tensor of a model."""
    return {
        name: shape
        for module in layout.modules
        for name, shape in zip(module.tensor_names(), module.tensors.values(), strict=True)
    }


def sliced(
    module: ModuleSpec, tensors: Mapping[str, Tensor], rows: Tensor | None, columns: Tensor | None
) -> dict[str, Tensor]:
    """What stays of a module's tensors, as stored: the outputs `rows` and the inputs `columns`, None for all."""
    result = {}
    for key, tensor in tensors.items():
        outputs = 1 if module.transposed and key == "weight" else 0
        if rows is not None:
            tensor = tensor.index_select(outputs, rows)
        if columns is not None and tensor.ndim == 2:
            tensor = tensor.index_select(1 - outputs, columns)
        result[key] = tensor.contiguous()
    return result


def stays(coupling: Coupling, units: Tensor) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """(module, rows, columns) that stay when only `units` of a coupling do; names relative to the block."""
    yield coupling.consumer, None, coupling.columns[units].flatten().sort().values
    for name, rows in coupling.rows.items():
        yield name, rows[units].flatten().sort().values, None


def _shrink(wanted: Shapes, layout: Layout, prefix: str, coupling: Coupling, count: int) -> None:
    """Shapes of the modules of one coupling with `count` units."""
    sides = [(coupling.consumer, 1, coupling.columns)] + [(name, 0, rows) for name, rows in coupling.rows.items()]
    for name, side, indices in sides:
        module = layout.by_name[prefix + name]
        gone = (coupling.units - count) * indices.shape[1]
        for key in module.tensors:
            axis = 1 - side if module.transposed and key == "weight" else side
            full = f"{module.name}.{key}"
            if axis < len(wanted[full]):
                wanted[full] = tuple(size - gone * (number == axis) for number, size in enumerate(wanted[full]))


def _inner(config: Mapping[str, Any], units: int, count: int) -> dict[str, Any]:
    found = {key: count for key in INNER if config.get(key) == units}
    return found or {key: count for key in INNER if key in config and config[key] is None}


def _heads(config: Mapping[str, Any], couplings: Sequence[Couplings], units: int, count: int) -> dict[str, Any]:
    """Numbers of query and key-value heads; a unit is what shares a key-value head."""
    changes: dict[str, Any] = {}
    coupling = next(found for block in couplings for found in block.of("heads") if found.units == units)
    for key in HEADS:
        if heads := config.get(key):
            changes[key] = heads * count // units
            changes["head_dim"] = coupling.columns.numel() // heads
    for key in KEY_VALUE_HEADS:
        if heads := config.get(key):
            changes[key] = heads * count // units
    return changes


def _accept(config: Mapping[str, Any], changes: Mapping[str, Any], wanted: Shapes, trust_remote_code: bool) -> Narrowed:
    """The first way to write the model down whose tensors have the `wanted` shapes and which transformers takes."""
    reasons = []
    for candidate, note in _spellings({**config, **changes}):
        try:
            layout = layout_of(candidate, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        found = shapes(layout)
        wrong = next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None)
        if wrong is not None:
            reasons.append(
                f"{wrong} would have shape {list(wanted.get(wrong, ()))}, but config.json can only say "
                f"{list(found.get(wrong, ()))}"
            )
        elif problem := check_config(candidate, trust_remote_code=trust_remote_code):
            reasons.append(problem)
        else:
            return Narrowed(layout, candidate, (note,) if note else ())
    said = ", ".join(f"{key}: {value}" for key, value in changes.items()) or "no key for this width"
    raise PlanError(f"no {config['model_type']} model has these widths ({said}): {reasons[0]}")


def _spellings(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The config itself, and classes of transformers that compute the same from the same tensors.

    Llama refuses numbers of heads that do not divide the hidden size; Mistral without a window does not, and Granite
    with its multipliers at one does not either and can have biases.
    """
    yield config, ""
    plain = config["model_type"] == "llama" or (config["model_type"] == "mistral" and not config.get("sliding_window"))
    if not plain:
        return
    if not (config.get("attention_bias") or config.get("mlp_bias")):
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        yield {**config, **mistral}, "written as Mistral, the same function: Llama refuses this number of heads"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    granite = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    yield {**config, **granite}, "written as Granite with its multipliers at one, the same function"
