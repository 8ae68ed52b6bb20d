"""Which rows and columns of a block's linears belong together, found by watching where one channel goes.

A unit (a neuron of the MLP, a group of attention heads) is a set of rows of some linears whose outputs reach only a
few columns of the linear after them: those columns and rows can only go together. Nobody has to say where they are.
The block is run with every linear replaced by one that gives fixed numbers, and with one of its outputs NaN; where
NaN arrives, that output was used. No weight is read, and the arithmetic is that of the activations alone.

    gate, up -> act(gate) * up -> down         row j of gate and of up reaches column j of down: a neuron
    q, k, v  -> attention      -> o            a row of k reaches all columns of its key-value head: a group of heads

What reaches every input of a linear at once (through a norm, say) couples nothing that could be removed.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from penjing.errors import PlanError
from penjing.models.build import build_model, fill, find, keep_probabilities, release
from penjing.models.experts import Expert, Experts
from penjing.models.layout import Layout, ModuleSpec
from penjing.models.reach import EVERYTHING, Reach, components

PROBES = 256
"""Channels followed at a time."""

UnitKind = Literal["neurons", "heads"]


@dataclass(frozen=True)
class Coupling:
    """Units of one block: what each is made of; names are relative to the block.

    kind      neurons have one column each, heads several
    consumer  the linear that reads what the units give
    columns   its columns (inputs) of each unit: int64 (U, S)
    rows      the linears that make them: rows (outputs) of each unit, int64 (U, n)
    """

    kind: UnitKind
    consumer: str
    columns: Tensor
    rows: Mapping[str, Tensor]

    @property
    def units(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Couplings:
    """All units of one block.

    unresolved  linears whose inputs could not be taken apart, with the reason
    writers     linears whose outputs are added to the residual stream as they are; experts are not among them
    """

    found: tuple[Coupling, ...]
    unresolved: Mapping[str, str]
    writers: frozenset[str] = frozenset()

    def of(self, kind: str) -> list[Coupling]:
        """The couplings of a kind, in the order of the forward pass."""
        return [coupling for coupling in self.found if coupling.kind == kind]


class _Reached(Exception):
    """The probed block is done; nothing after it needs to run."""


def find_couplings(
    config: Mapping[str, Any], layout: Layout, *, trust_remote_code: bool = False
) -> tuple[Couplings, ...]:
    """The units of every block of a model. Blocks with the same modules are looked at once.

    The answer is kept: a plan and the work itself both ask, and wide blocks take a while. Raises PlanError when a block
    cannot be run by itself.
    """
    key = json.dumps(dict(config), sort_keys=True, default=str)
    if key not in _KNOWN:
        _KNOWN[key] = _find(config, layout, trust_remote_code)
    return _KNOWN[key]


_KNOWN: dict[str, tuple[Couplings, ...]] = {}
"""Config as JSON -> what was found."""


def _find(config: Mapping[str, Any], layout: Layout, trust_remote_code: bool) -> tuple[Couplings, ...]:
    model = build_model(dict(config), layout, trust_remote_code=trust_remote_code)
    keep_probabilities(model)  # faster kernels pass over NaN in queries and keys
    known: dict[Any, Couplings] = {}
    result = []
    for index in range(layout.blocks):
        prefix = f"{layout.block_name(index)}."
        specs = {spec.name.removeprefix(prefix): spec for spec in layout.of_block(index)}
        signature = tuple((name, spec.kind, *spec.tensors.items()) for name, spec in specs.items())
        if signature not in known:
            known[signature] = _BlockProbe(model, layout, index, specs).couplings()
        result.append(known[signature])
    return tuple(result)


class _BlockProbe:
    """One block whose linears are replaced; names are relative to the block."""

    def __init__(self, model: nn.Module, layout: Layout, index: int, specs: Mapping[str, ModuleSpec]) -> None:
        self._model, self._layout = model, layout
        self._block = find(model, layout.block_name(index))
        self._linears = {name: spec for name, spec in specs.items() if spec.kind == "linear"}
        self._others = {name: spec for name, spec in specs.items() if spec.kind != "linear" and spec.tensors}
        self._generator = torch.Generator().manual_seed(0)
        self._outputs = {name: self._noise(spec.shape[0]) for name, spec in self._linears.items()}
        self._tainted: tuple[str, int, int] = ("", 0, 0)
        self._seen: dict[str, Tensor] = {}

    def couplings(self) -> Couplings:
        """Probe the block, and one expert for all of a mixture."""
        experts = {name: module for name, module in self._block.named_modules() if isinstance(module, Expert)}
        outside = [name for name in self._linears if not name.startswith(tuple(f"{path}." for path in experts))]
        with self._stubbed(), self._filled():
            parts = [self._solve(outside, self._run_block)]
            for path, expert in list(experts.items())[:1]:
                inside = [name for name in self._linears if name.startswith(f"{path}.")]
                part = self._solve(inside, partial(self._run_expert, expert))
                parts += [_renamed(part, path, other) for other in experts]
        found = tuple(coupling for part in parts for coupling in part.found)
        unresolved = {name: reason for part in parts for name, reason in part.unresolved.items()}
        return Couplings(found, unresolved, parts[0].writers)

    def _solve(self, names: Sequence[str], run: Callable[[int], Tensor | None]) -> Couplings:
        reach = {name: Reach() for name in names}
        for producer in names:
            for first in range(0, self._linears[producer].shape[0], PROBES):
                count = min(PROBES, self._linears[producer].shape[0] - first)
                self._tainted, self._seen = (producer, first, count), {}
                output = run(count)
                for consumer, mask in self._seen.items():
                    if consumer in reach:
                        reach[consumer].add(producer, first, mask)
                if output is not None:
                    reach[producer].leave(first, output.reshape(count, -1, output.shape[-1]).isnan().any(1))
        found, unresolved = [], {}
        for consumer, given in reach.items():
            try:
                coupling = _coupling(consumer, self._linears, given, reach)
            except PlanError as error:
                unresolved[consumer] = str(error)
                continue
            if coupling is not None:
                found.append(coupling)
        return Couplings(tuple(found), unresolved, frozenset(name for name in names if reach[name].adds))

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _stub(self, name: str, inputs: Tensor) -> Tensor:
        """In place of a linear: note which of its inputs are NaN, give its outputs, with the probes' NaN in them."""
        producer, first, count = self._tainted
        self._seen[name] = inputs.reshape(count, -1, inputs.shape[-1]).isnan().any(1)
        values = self._outputs[name].repeat(count, inputs.numel() // inputs.shape[-1] // count, 1)
        if name == producer:
            values[torch.arange(count), :, first + torch.arange(count)] = torch.nan
        return values.reshape(*inputs.shape[:-1], -1)

    def _run_expert(self, expert: Expert, count: int) -> None:
        expert(self._noise(count, self._layout.embedding.shape[1]))

    def _run_block(self, count: int) -> Tensor | None:
        """Run the block as its parent would, on `count` windows of one token; its output."""
        outputs: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        hook = self._block.register_forward_hook(stop)
        width = self._layout.embedding.shape[1]
        try:
            self._model(inputs_embeds=self._noise(count, 1, width), use_cache=False)
        except _Reached:
            return outputs[0]
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            raise PlanError(
                f"what is coupled in a {self._layout.model_type} block could not be found: running "
                f"{self._where(error)} on one token failed with {error}"
            ) from error
        finally:
            hook.remove()
        raise PlanError(f"what is coupled in {self._layout.model_type} could not be found: its blocks never ran")

    def _where(self, error: BaseException) -> str:
        """The innermost module of the block in which an error arose, and its own tensors."""
        names = {id(module): name for name, module in self._block.named_modules()}
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        inside = [part for part in frames if isinstance(part, nn.Module) and names.get(id(part))]
        if not inside:
            return f"{self._layout.block_path} or what calls it"
        tensors = ", ".join(name for name, _ in inside[-1].named_parameters(recurse=False))
        return f"{self._layout.block_path}.*.{names[id(inside[-1])]}" + (f" (it holds {tensors})" if tensors else "")

    @contextmanager
    def _stubbed(self) -> Iterator[None]:
        """Linears give fixed numbers, mixtures pass their input on, and the parent sees this block alone."""
        owner, _, path = self._layout.block_path.rpartition(".")
        parent = find(self._model, owner)
        blocks = cast(nn.ModuleList, getattr(parent, path))
        replaced: list[tuple[nn.Module, Callable[..., Tensor]]] = [
            (find(self._block, name), partial(self._stub, name)) for name in self._linears
        ]
        replaced += [
            (module, lambda hidden_states, *args: hidden_states.clone())
            for module in self._block.modules()
            if isinstance(module, Experts)
        ]
        with ExitStack() as undo, torch.no_grad():
            for module, forward in replaced:
                module.__dict__["forward"] = forward
                undo.callback(module.__dict__.pop, "forward")
            setattr(parent, path, nn.ModuleList([self._block]))
            undo.callback(setattr, parent, path, blocks)
            yield

    @contextmanager
    def _filled(self) -> Iterator[None]:
        """Everything that is not a linear of the block, nor an embedding of tokens, holds small random numbers."""
        before = [spec for spec in self._layout.of_block(None) if spec.kind == "other" and spec.tensors]
        modules = [(find(self._model, spec.name), spec) for spec in before]
        modules += [(find(self._block, name), spec) for name, spec in self._others.items()]
        with ExitStack() as undo:
            for module, spec in modules:
                undo.callback(release, module)
                fill(module, {key: self._noise(*shape) * 0.1 for key, shape in spec.tensors.items()})
            yield


def _coupling(
    consumer: str, linears: Mapping[str, ModuleSpec], given: Reach, reach: Mapping[str, Reach]
) -> Coupling | None:
    """The units that `consumer` reads; None if it reads what a norm made of everything.

    Raises PlanError saying what stands in the way.
    """
    whole = [name for name, pairs in given.pairs.items() if pairs is EVERYTHING]
    narrow = {name: pairs for name, pairs in given.pairs.items() if isinstance(pairs, Tensor)}
    if not narrow:
        return None
    if whole:
        raise PlanError(f"every output of {whole[0]} reaches all inputs of {consumer}")
    inputs = linears[consumer].shape[1]
    sizes = {name: linears[name].shape[0] for name in narrow}
    columns, rows = components(inputs, sizes, narrow)
    if columns is None or rows is None:
        raise PlanError(f"its inputs do not fall into equal units of equal numbers of outputs of {', '.join(sizes)}")
    if len(columns) < 2:
        raise PlanError(f"all its inputs hang together (they come from {', '.join(sizes)}), so none can go alone")
    for name in narrow:
        others = [other for other, reached in reach.items() if other != consumer and name in reached.pairs]
        others += ["the block's output"] if reach[name].leaves else []
        if others:
            raise PlanError(f"{name}.weight makes its inputs, but also reaches {', '.join(others)}")
    kind: UnitKind = "neurons" if columns.shape[1] == 1 else "heads"
    return Coupling(kind, consumer, columns, rows)


def _renamed(part: Couplings, path: str, other: str) -> Couplings:
    """The same for another expert."""

    def name(inner: str) -> str:
        return other + inner.removeprefix(path)

    found = tuple(
        replace(
            coupling, consumer=name(coupling.consumer), rows={name(key): rows for key, rows in coupling.rows.items()}
        )
        for coupling in part.found
    )
    return Couplings(found, {name(inner): reason for inner, reason in part.unresolved.items()})
