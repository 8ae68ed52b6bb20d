"""Does a checkpoint hold the tensors that its layout says?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from penjing.checkpoint.base import Checkpoint, TensorSpec
from penjing.errors import CheckpointError
from penjing.models.families import read_family
from penjing.models.layout import Layout

LISTED = 8

BUFFERS = r".*\.rotary_emb\.inv_freq"
"""Written by old versions of transformers, computed from the config since."""


def check_specs(layout: Layout, specs: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError when tensors are missing, unexpected or of another shape than the config implies.

    Known leftovers are passed over: attention masks and rotary tables that old checkpoints carry, and a copy of the
    embedding under the name of a tied head.
    """
    expected = {
        name: shape
        for module in layout.modules
        for name, shape in zip(module.tensor_names(), module.tensors.values(), strict=True)
    }
    missing = [name for name in expected if name not in specs]
    if missing:
        raise CheckpointError(f"the checkpoint lacks tensors that its config implies: {_listed(missing)}")
    for name, shape in expected.items():
        if specs[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(specs[name].shape)} but the config implies {list(shape)}; "
                "config.json and the weights do not belong together"
            )
    leftover = re.compile("|".join((BUFFERS, *_ignored(layout))))
    unexpected = [name for name in specs if name not in expected and not leftover.fullmatch(name)]
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds tensors that have no place in a {layout.model_type} model of this config: "
            f"{_listed(unexpected)}"
        )


def check_tied_head(layout: Layout, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when a model that ties its head to the embedding also stores a head, and another one.

    transformers then unties them, other engines do not; the config has to say which is meant. Reads both matrices,
    but only of a checkpoint that stores the head twice.
    """
    if not layout.tied:
        return
    head, embedding = (f"{module.name}.weight" for module in (layout.head, layout.embedding))
    if head not in checkpoint.specs():
        return
    if not checkpoint.load(head).equal(checkpoint.load(embedding)):
        raise CheckpointError(
            f"{checkpoint.path}: the config ties the head to the embedding, but {head!r} and {embedding!r} differ; "
            'set "tie_word_embeddings": false in config.json if the head was trained by itself, or remove it'
        )


def _ignored(layout: Layout) -> list[str]:
    family = [] if layout.family == "inferred" else read_family(layout.family).get("ignored", [])
    return [*family, *([re.escape(f"{layout.head.name}.weight")] if layout.tied else [])]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
