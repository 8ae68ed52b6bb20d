"""What a task changed in a quantised model, as a small file; and a model that takes on another task.

PEQA and E2E-QP change scales (and norms) and no code. The tensors in which a tuned model differs from its base are the
task; put in place of the base's own, they turn the one model into the other, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from penjing.checkpoint import load_shard, write_shard
from penjing.checkpoint.safetensors_header import read_header
from penjing.errors import CheckpointError

_KIND = {"kind": "penjing task"}


def save_task(base: Path, tuned: Path, file: Path) -> int:
    """Write the tensors in which `tuned` differs from `base`; their bytes.

    Raises CheckpointError when they are not the same tensors, or when any but floats, so codes, differ.
    """
    before, after = _tensors(base), _tensors(tuned)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[:3]
        raise CheckpointError(f"{tuned} is no task of {base}: only one of them has {', '.join(odd)}")
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    codes = [name for name, value in changed.items() if not value.is_floating_point()]
    if codes:
        raise CheckpointError(f"{tuned} is no task of {base}: it has other codes ({codes[0]})")
    write_shard(file, changed, _KIND)
    return sum(value.nbytes for value in changed.values())


def apply_task(model: Path, file: Path) -> None:
    """Put a task's tensors into the shards of `model`, each of which is written whole or not at all.

    A task holds every tensor in which models of its family differ from their base, so one takes the place of another
    if both were saved against the same base and change the same tensors; applying the base's own values undoes it.
    Raises CheckpointError when a file is damaged, or the model has no such tensor, or one of another shape.
    """
    if read_header(file).metadata.get("kind") != _KIND["kind"]:
        raise CheckpointError(f"{file} is not a task")
    task = load_shard(file)
    shards = {path: load_shard(path) for path in sorted(model.glob("*.safetensors"))}
    known = {name: value for tensors in shards.values() for name, value in tensors.items()}
    for name, value in task.items():
        if name not in known or known[name].shape != value.shape or known[name].dtype != value.dtype:
            raise CheckpointError(f"{file}: {model} has no tensor {name} of shape {list(value.shape)}")
    for path, tensors in shards.items():
        new = {name: task.get(name, value) for name, value in tensors.items()}
        if any(name in task for name in tensors):
            write_shard(path, new)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {name: value for path in directory.glob("*.safetensors") for name, value in load_shard(path).items()}
    if not found:
        raise CheckpointError(f"{directory}: no safetensors there")
    return found
