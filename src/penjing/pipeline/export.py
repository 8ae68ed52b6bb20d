"""A model in another format: the codes that it has, packed anew. Nothing is quantised here.

One block is in memory at a time. What the target cannot hold is found from schemes, before a weight is read; every
matrix is unpacked again from what was packed and must be the same bit for bit; and in the end the logits of both models
are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint, write_bytes, write_index, write_shard
from penjing.checkpoint.directory import INDEX
from penjing.errors import MissingDependency, PlanError, VerificationError
from penjing.evaluation.size import weight_bytes
from penjing.formats import FORMATS, Format
from penjing.formats.base import Finished, OneFile, WithGraph, input_tensors, read_input_scale
from penjing.memory import PeakMemory, give_back
from penjing.models import Layout, check_tied_head, layout_of
from penjing.models.layout import ModuleSpec
from penjing.pipeline.journal import require_usable
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import positions
from penjing.pipeline.verification import TOLERANCE, fits_in_memory, save_probe, verify
from penjing.pipeline.walk import PROBE_TOKENS
from penjing.pipeline.weights import ShardReader, Weights, modules_outside_blocks
from penjing.progress import Progress
from penjing.recipe import did_you_mean
from penjing.representations import Scheme
from penjing.rules import describe

_NOT_WRITTEN = ("quantization_config", "torch_dtype", "_name_or_path")
"""Keys of the source's config.json that do not hold for the result."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    difference   largest |logit difference| between source and result over the largest |logit|
    peak_memory  above what was resident when it began, in bytes
    """

    model: str
    source: str
    format: str
    directory: str
    source_bytes: int
    bytes: int
    difference: float
    verified: str
    peak_memory: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """A model that is read and the format that it is written in.

    schemes  of every module with a weight, as it is stored
    dtype    of plain tensors
    """

    checkpoint: Checkpoint
    layout: Layout
    source: Weights
    target: Format
    schemes: Mapping[ModuleSpec, Scheme]
    dtype: torch.dtype

    def dtype_of(self, shape: tuple[int, ...]) -> torch.dtype:
        """The dtype in which a plain tensor is written."""
        return self.target.vector_dtype if isinstance(self.target, OneFile) and len(shape) == 1 else self.dtype

    def as_written(self, name: str) -> Tensor:
        """A tensor as it is read, and a plain one rounded as it is written: what a GGUF file decodes to, say."""
        tensor = self.checkpoint.load(name)
        return tensor.to(self.dtype_of(tuple(tensor.shape))) if name in self._plain else tensor

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(
            name
            for module in self.layout.modules
            for key, name in zip(module.tensors, module.tensor_names(), strict=True)
            if key != "weight" or self.schemes[module].dense
        )

    @property
    def written(self) -> dict[ModuleSpec, Scheme]:
        """Schemes in the result: plain tensors have none."""
        return dict.fromkeys(self.schemes, Scheme()) if self.target.name == "dense" else dict(self.schemes)


def export(
    model: str | Path, to: str, output: Path, *, progress: Progress, trust_remote_code: bool = False
) -> Exported:
    """Write `model` in the format `to`. Raises PlanError before anything is written, VerificationError after."""
    job = _prepare(model, to, trust_remote_code)
    require_usable(output)
    with PeakMemory() as memory:
        shards = _write(job, output, progress)
        written = _complete(job, output, shards)
        difference = _compare(job, output, written, trust_remote_code)
    progress("verify", 0, 1, "")
    verified = verify(output, engine=fits_in_memory(job.layout.parameters), trust_remote_code=trust_remote_code)
    progress("verify", 1, 1, verified.how)
    return Exported(
        job.checkpoint.label,
        job.source.format.name,
        to,
        str(output),
        weight_bytes(job.checkpoint.path),
        weight_bytes(output),
        difference,
        verified.how,
        memory.bytes,
    )


def _prepare(model: str | Path, to: str, trust_remote_code: bool) -> _Job:
    """Everything that can be refused without reading a weight."""
    if to not in FORMATS:
        raise PlanError(f"no format called {to!r}{did_you_mean(to, list(FORMATS))}; there are {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)
    if layout.encoder:
        raise PlanError(f"{checkpoint.label} is an encoder; formats hold decoders, and encoders stay as they are")
    if not any(name.startswith("quantization_config") for name in checkpoint.config):
        check_tied_head(layout, checkpoint)
    source = Weights(checkpoint, layout)
    schemes = {
        module: source.schemes.get(module.name, Scheme()) for module in layout.modules if "weight" in module.tensors
    }
    if problems := _problems(FORMATS[to], schemes, layout, checkpoint):
        others = [name for name, other in FORMATS.items() if _holds(other, schemes, layout, checkpoint)]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise PlanError(
            f"format {to} cannot hold {checkpoint.label}: {'; '.join(problems[:3])}{more}. "
            f"Formats that can: {', '.join(others) or 'none'}"
        )
    dtype = getattr(torch, str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"))
    return _Job(checkpoint, layout, source, FORMATS[to], schemes, dtype)


def _problems(
    target: Format, schemes: Mapping[ModuleSpec, Scheme], layout: Layout, checkpoint: Checkpoint
) -> list[str]:
    """Why a format cannot hold these matrices, or the model whatever they are."""
    if layout.owners:
        return ["its blocks share weights, which only the native format can say, and no format is made of that"]
    found = [
        f"{problem} (it is {describe(scheme)})"
        for module, scheme in schemes.items()
        if not scheme.dense
        for problem in target.problems(module, scheme)
    ]
    found = found or target.conflicts(schemes)
    if isinstance(target, OneFile | WithGraph):
        found = found or target.refusals(layout, checkpoint.config)
    if isinstance(target, OneFile):
        found = found or target.companion_problems(checkpoint)
    return found


def _holds(target: Format, schemes: Mapping[ModuleSpec, Scheme], layout: Layout, checkpoint: Checkpoint) -> bool:
    """Whether a format is worth naming: it has no problem, and its library is here."""
    try:
        return not _problems(target, schemes, layout, checkpoint)
    except MissingDependency:
        return False


def _parts(layout: Layout) -> Iterator[tuple[str, Sequence[ModuleSpec]]]:
    """What goes into one shard: embeddings, each block, the rest."""
    before, after = modules_outside_blocks(layout)
    yield "embeddings", before
    for index in range(layout.blocks):
        yield layout.block_name(index), layout.of_block(index)
    yield "head", after


def _write(job: _Job, output: Path, progress: Progress) -> dict[str, dict[str, int]]:
    """Shard name -> bytes of each tensor in it."""
    shards: dict[str, dict[str, int]] = {}
    total = job.layout.blocks + 2
    for number, (what, modules) in enumerate(_parts(job.layout), 1):
        progress("export", number - 1, total, what)
        tensors: dict[str, Tensor] = {}
        for module in modules:
            tensors |= _repack(job, module)
        if tensors:
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            write_shard(output / name, tensors)
            shards[name] = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
        del tensors
        give_back()
    progress("export", total, total, "")
    return shards


def _repack(job: _Job, module: ModuleSpec) -> dict[str, Tensor]:
    """Tensors of one module in the target's form. Raises VerificationError if they stand for something else."""
    load = job.checkpoint.load
    names = dict(zip(module.tensors, module.tensor_names(), strict=True))
    packed = {name: load(name).to(job.dtype_of(module.tensors[key])) for key, name in names.items() if key != "weight"}
    if "weight" not in names:
        return packed
    scheme, dtype = job.schemes[module], job.dtype_of(module.tensors["weight"])
    read, write = ((FORMATS["dense"] if scheme.dense else each) for each in (job.source.format, job.target))
    weight = read.unpack(module, scheme, load)
    packed |= write.pack(module, scheme, weight, dtype)
    if job.target.name != "dense":
        again = write.unpack(module, scheme, packed.__getitem__).dense()
        meant = weight.dense()
        if not torch.equal(again, meant.to(dtype).to(again.dtype) if scheme.dense else meant):
            raise VerificationError(f"format {job.target.name}: {module.name} does not unpack to what was packed")
    if scheme.activations is not None and (static := read_input_scale(module, scheme, load)) is not None:
        packed |= input_tensors(module, static)
    return packed


def _complete(job: _Job, output: Path, shards: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What belongs to the shards, or the one file made of them; names of the files that hold the model."""
    config = {key: value for key, value in job.checkpoint.config.items() if key not in _NOT_WRITTEN}
    config |= {"dtype": str(job.dtype).removeprefix("torch.")} | job.target.config(job.written, job.dtype)
    names = {shard: list(tensors) for shard, tensors in shards.items()}
    if isinstance(job.target, OneFile):
        schemes = {module.name: scheme for module, scheme in job.written.items()}
        load = ShardReader(output, names)
        finished = Finished(output, job.layout, schemes, config, job.dtype, job.checkpoint, load)
        file = job.target.assemble(finished)
        for shard in shards:
            (output / shard).unlink()
        return [file.name]
    write_index(output, names, sum(size for tensors in shards.values() for size in tensors.values()))
    write_bytes(output / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    for name, content in job.checkpoint.files():
        if name not in ("report.json", "recipe.yaml"):
            write_bytes(output / name, content)
    beside = job.target.write_beside(output, job.layout, config) if isinstance(job.target, WithGraph) else []
    return [*shards, INDEX, "config.json", *beside]


def _compare(job: _Job, output: Path, written: Sequence[str], trust_remote_code: bool) -> float:
    """Logits of source and result on the same tokens; those of the result are kept for `verify`."""
    length = min(PROBE_TOKENS, positions(job.checkpoint.config) or PROBE_TOKENS)
    tokens = torch.randint(job.layout.embedding.shape[0], (1, length), generator=torch.Generator().manual_seed(0))
    expected = _logits(job.checkpoint, tokens, trust_remote_code, job.as_written)
    result = open_checkpoint(output, trust_remote_code=trust_remote_code)
    found = _logits(result, tokens, trust_remote_code, result.load)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _tolerance(job):
        raise VerificationError(
            f"{output}: its logits differ from those of {job.checkpoint.label} by {difference:.2e} of the largest "
            f"(limit {_tolerance(job):.0e})"
        )
    save_probe(output, tokens, found, written)
    return difference


def _tolerance(job: _Job) -> float:
    """Codes are the same; values differ where they are stored, or by the format's rule decoded, in 16 bits."""
    rounded = job.target.name == "dense" and any(not scheme.dense for scheme in job.schemes.values())
    decoded = any(scheme.grid is not None and job.target.name != "native" for scheme in job.schemes.values())
    return 3e-2 if rounded or decoded else TOLERANCE


def _logits(checkpoint: Checkpoint, tokens: Tensor, trust_remote_code: bool, load: Callable[[str], Tensor]) -> Tensor:
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)
    weights = Weights(checkpoint, layout, load)
    stream = StreamedModel(checkpoint.config, layout, weights.live, trust_remote_code=trust_remote_code)
    states = stream.forward(tokens, torch.float32)
    with stream.head(torch.float32) as head:
        return head(states)
