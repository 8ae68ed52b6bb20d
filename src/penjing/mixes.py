"""Mixes of GGUF types, a type per tensor by what it does and where it stands, as llama.cpp's `llama-quantize` chooses.

A recipe names a mix like any type, `type: q4_k_m`; a plan turns the step into one step per type. With i the number of
the block, n that of all blocks, and "early or late" short for i < n/8, or i >= 7n/8, or (i - n/8) mod 3 = 2:

    mix      most    attn_v                           attn_output  ffn_down                      head
    q2_k_m   q2_k    q3_k; q4_k from 4 queries a key  q3_k         q3_k                          q6_k
    q3_k_m   q3_k    q5_k, from i = 2 q4_k            q4_k         q5_k for i < n/16, then q4_k  q6_k
    q3_k_l   q3_k    q5_k                             q5_k         q5_k                          q6_k
    q4_k_s   q4_k    q5_k for i < 4                   q4_k         q5_k for i < n/8              q6_k
    q4_k_m   q4_k    q6_k early or late               q4_k         q6_k early or late            q6_k
    q5_k_m   q5_k    q6_k early or late               q5_k         q6_k early or late            q6_k

Where query, key and value are one matrix, it is of the type of attn_v. The head is the embedding where they are tied;
another embedding is of the type of most. Rows that do not divide into blocks of 256 get what `llama-quantize` gives
them (`FALLBACK`), unless the recipe's `fallback` says otherwise; as with any type, the plan tells. `llama-quantize`
calls the first mix Q2_K, which is a type here.

Worked example: q4_k_m on 8 blocks: n/8 = 1, so attn_v is q6_k in blocks 0, 3, 6 and 7, and q4_k in the others.

The table is read off what llama.cpp writes; a test compares every tensor's type.
"""

from __future__ import annotations

from collections.abc import Mapping

from penjing.checkpoint.gguf_names import ARCHITECTURES, WRITTEN_AS
from penjing.errors import PlanError
from penjing.methods.typed_grid import MIXES, NumberType, TypedGridOptions
from penjing.models.layout import Layout, ModuleSpec
from penjing.recipe import Recipe, Step
from penjing.targets import selected

FALLBACK: Mapping[str, NumberType] = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0", "q2_k": "q4_0"}
"""What rows that are no whole blocks of 256 get in a mix."""


def written_out(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe with a step per type in the place of each step whose type is a mix. Raises PlanError."""
    steps: list[Step] = []
    for step in recipe.steps:
        mix = getattr(step.options, "type", None)
        steps += [step] if mix not in MIXES else _parts(step, layout, recipe.format)
    return recipe.model_copy(update={"steps": tuple(steps)})


def _parts(step: Step, layout: Layout, format: str) -> list[Step]:
    """The step once per type, in the order in which the types come up in the model."""
    options = step.options
    assert isinstance(options, TypedGridOptions)
    if format != "gguf":
        raise PlanError(f"{step.label}: {options.type} is a mix of GGUF's types; use `format: gguf`")
    members: dict[NumberType, list[str]] = {}
    for name in selected(step, layout):
        members.setdefault(type_in_mix(options.type, layout.by_name[name], layout), []).append(name)
    parts = []
    for kind, names in members.items():
        own = options.of_type(kind, options.fallback or FALLBACK[kind])
        parts.append(step.model_copy(update={"options": own, "targets": tuple(names), "ignore": ()}))
    return parts


def type_in_mix(mix: str, module: ModuleSpec, layout: Layout) -> NumberType:
    """The type of one module's weight in a mix."""
    most = MIXES[mix]
    if module.kind == "head" or (module.kind == "embedding" and layout.tied and module == layout.embedding):
        return "q6_k"
    if module.block is None:
        return most
    stored = ARCHITECTURES[WRITTEN_AS[layout.model_type]].stored_name(module.name) or ""
    block, blocks = module.block, layout.blocks
    eighth = blocks // 8
    more = block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
    values: NumberType
    down: NumberType
    if mix in ("q4_k_m", "q5_k_m"):
        values, output, down = ("q6_k", most, "q6_k") if more else (most, most, most)
    elif mix == "q4_k_s":
        values, output, down = "q5_k" if block < 4 else most, most, "q5_k" if block < eighth else most
    elif mix == "q3_k_m":
        values, output, down = "q5_k" if block < 2 else "q4_k", "q4_k", "q5_k" if block < blocks // 16 else "q4_k"
    elif mix == "q3_k_l":
        values, output, down = "q5_k", "q5_k", "q5_k"
    else:
        values, output, down = "q4_k" if _queries_per_key(layout, block) >= 4 else "q3_k", "q3_k", "q3_k"
    by_role = {"attn_v": values, "attn_qkv": values, "attn_output": output, "ffn_down": down}
    return by_role.get(stored.rpartition(".")[2], most)


def _queries_per_key(layout: Layout, block: int) -> int:
    """Query heads per key head: outputs of the query linear over those of the value linear."""
    names = ARCHITECTURES[WRITTEN_AS[layout.model_type]]
    found = {(names.stored_name(module.name) or "").rpartition(".")[2]: module for module in layout.of_block(block)}
    queries = found["attn_output"].shape[1]
    return queries // (found["attn_v"].shape[0] if "attn_v" in found else (found["attn_qkv"].shape[0] - queries) // 2)
