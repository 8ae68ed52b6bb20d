"""Running a model that is never wholly in memory: embeddings, then block after block, then the head.

The model is built on the meta device. The parent `forward` of transformers is run for real, with the decoder blocks
replaced by recorders, so masks, rotary embeddings and whatever else a family computes are made by the model itself and
no graph has to be traced. Each block is then filled with weights, run on all windows, and emptied again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from penjing.costs import BATCH_TOKENS
from penjing.errors import CheckpointError
from penjing.memory import give_back
from penjing.models import build_model, fill, find, release
from penjing.models.layout import Layout, ModuleSpec
from penjing.pipeline.weights import ModuleSource, modules_outside_blocks

HEAD_TOKENS = 256
"""Tokens whose logits are in memory at once."""

Allocate = Callable[..., Tensor]
"""Like `torch.empty(shape, dtype=dtype)`."""


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one of its blocks: everything but the hidden state, for windows of one length."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _FirstBlockReached(Exception):
    """Carries the first block's arguments out of the parent forward."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]
        super().__init__()


class _BlocksDone(Exception):
    """The parent forward has called every block."""


class _Stand(nn.Module):
    """Stands in for a decoder block; attributes the parent reads (a layer's attention type) are the real block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class _Interrupter(_Stand):
    """Ends the parent forward where the blocks begin."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _FirstBlockReached(args, kwargs)


class _Recorder(_Stand):
    """Notes how a block is called and passes the hidden state on, or puts another in its place."""

    def __init__(self, block: nn.Module, wrap: bool, replacement: Tensor | None = None) -> None:
        super().__init__(block)
        self.__dict__.update(wrap=wrap, replacement=replacement, call=None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        self.__dict__["call"] = BlockCall(args[1:], kwargs)
        if self.__dict__["replacement"] is not None:
            hidden = self.__dict__["replacement"]
        return (hidden,) if self.__dict__["wrap"] else hidden


class StreamedModel:
    """A causal language model whose blocks are in memory one at a time.

    `source` gives the modules (`Weights.live` of a checkpoint, or a walk's results). Hidden states are (S, T, D),
    S windows of T tokens; the arithmetic runs in their dtype.
    """

    def __init__(
        self, config: Mapping[str, Any], layout: Layout, source: ModuleSource, *, trust_remote_code: bool = False
    ) -> None:
        self.layout = layout
        self.source = source
        self.model = build_model(dict(config), layout, trust_remote_code=trust_remote_code)
        self._blocks = cast(nn.ModuleList, find(self.model, layout.block_path))
        self._returns_tuple = False
        self._calls: dict[tuple[int, torch.dtype], list[BlockCall]] = {}

    @torch.no_grad()
    def embed(self, tokens: Tensor, dtype: torch.dtype, allocate: Allocate = torch.empty) -> Tensor:
        """Input of the first block for token windows (S, T): -> (S, T, D) in `dtype`, in memory from `allocate`."""
        before, _ = modules_outside_blocks(self.layout)
        with self._filled(before, dtype):
            self._learn_calls(tokens[:1], dtype)
            first = self._first_hidden(tokens[:1])
            states = allocate((*tokens.shape, first.shape[-1]), dtype=dtype)
            for windows, batch_states in zip(batches(tokens), batches(states), strict=True):
                batch_states.copy_(self._first_hidden(windows))
        return states

    def _first_hidden(self, tokens: Tensor) -> Tensor:
        with self._standing([_Interrupter(self._blocks[0])]):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _FirstBlockReached as reached:
                return reached.hidden
        raise CheckpointError(f"{self.layout.block_path}: the model's forward never called its first block")

    def _learn_calls(self, window: Tensor, dtype: torch.dtype) -> None:
        """One parent forward with every block recorded: how each is called for windows of this length."""
        if (window.shape[1], dtype) in self._calls:
            return
        self._returns_tuple = self._probe_first_block(window[:, :8], dtype)
        self._calls[window.shape[1], dtype] = self._record(window, use_cache=False)

    def _record(self, window: Tensor, **arguments: Any) -> list[BlockCall]:
        recorders = [_Recorder(block, self._returns_tuple) for block in self._blocks]
        with self._standing(recorders), self._headless():
            self.model(input_ids=window, **arguments)
        return [recorder.call for recorder in recorders]

    @torch.no_grad()
    def calls(self, windows: Iterable[Tensor], dtype: torch.dtype, **arguments: Any) -> Iterator[list[BlockCall]]:
        """How the parent calls its blocks when its forward is given each of `windows` (1, t) and `arguments`."""
        before, _ = modules_outside_blocks(self.layout)
        with self._filled(before, dtype):
            for window in windows:
                yield self._record(window, **arguments)

    def _probe_first_block(self, window: Tensor, dtype: torch.dtype) -> bool:
        """Whether blocks return a tuple, found by running the first one on a few tokens."""
        outputs: list[object] = []
        with self.block(0, dtype) as block, self._standing([block, _Interrupter(block)]):
            hook = block.register_forward_hook(lambda module, args, output: outputs.append(output))
            with suppress(_FirstBlockReached), self._headless():  # a model of one block never reaches the second
                self.model(input_ids=window, use_cache=False)
            hook.remove()
        return isinstance(outputs[0], tuple)

    @contextmanager
    def block(self, index: int, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Block `index` with its weights; empty again afterwards."""
        with self._filled(self.layout.of_block(index), dtype):
            yield self._blocks[index]
        give_back()

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, states: Tensor) -> Tensor:
        """Outputs of a filled block for one batch of hidden states (B, T, D)."""
        return self.run_with(block, index, states, {})

    def run_with(self, block: nn.Module, index: int, states: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The same with other values for some of the block's parameters; autograd sees them and `states`."""
        return run_call(block, self._calls[states.shape[1], states.dtype][index], states, parameters)

    def advance(self, block: nn.Module, index: int, states: Tensor) -> None:
        """Replace hidden states (S, T, D) by the block's outputs, in place, batch by batch."""
        for batch in batches(states):
            batch.copy_(self.run(block, index, batch))

    def forward(self, tokens: Tensor, dtype: torch.dtype, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states after the last block for token windows (S, T)."""
        return self.through(self.embed(tokens, dtype), on_block)

    def through(self, states: Tensor, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Inputs of the first block (S, T, D), replaced by what the last block makes of them."""
        for index in range(self.layout.blocks):
            with self.block(index, states.dtype) as block:
                self.advance(block, index, states)
            if on_block:
                on_block(index)
        return states

    @contextmanager
    def head(self, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from hidden states (1, T, D) after the last block to logits (T, V) fp32.

        The parent forward does it, so final norms, projections and soft caps are the model's own. Differentiable in
        states that require a gradient.
        """
        before, after = modules_outside_blocks(self.layout)
        shared = [module for module in before if module.kind != "embedding" or self.layout.tied]

        def logits(states: Tensor) -> Tensor:
            recorders = [_Recorder(block, self._returns_tuple, states) for block in self._blocks]
            with torch.set_grad_enabled(states.requires_grad), self._standing(recorders):
                output = self.model(inputs_embeds=torch.zeros_like(states), use_cache=False)
            return output.logits[0].float()

        with self._filled([*shared, *after], dtype):
            yield logits

    @contextmanager
    def _filled(self, modules: Sequence[ModuleSpec], dtype: torch.dtype) -> Iterator[None]:
        """`modules` hold their weights inside, and are empty outside."""
        with ExitStack() as undo:
            for spec in modules:
                if not spec.tensors and not spec.owner:
                    continue
                module, given = find(self.model, spec.name), self.source(spec, dtype)
                undo.callback(release, module)
                fill(module, given.tensors)
                if given.attach is not None:
                    undo.callback(given.attach(module))
            yield

    @contextmanager
    def _standing(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """The parent sees `blocks` instead of its own."""
        owner, _, name = self.layout.block_path.rpartition(".")
        parent = find(self.model, owner)
        setattr(parent, name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(parent, name, self._blocks)

    @contextmanager
    def _headless(self) -> Iterator[None]:
        """Skip what comes after the blocks: those modules have no weights now."""

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _BlocksDone

        _, after = modules_outside_blocks(self.layout)
        with ExitStack() as undo, suppress(_BlocksDone):
            for spec in after:
                undo.callback(find(self.model, spec.name).register_forward_pre_hook(stop).remove)
            yield


def run_call(block: nn.Module, call: BlockCall, states: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Outputs of a filled block for hidden states (B, T, D), called as `call` says."""
    output = functional_call(block, dict(parameters), (states, *call.args), dict(call.kwargs))
    return output[0] if isinstance(output, tuple) else output


def batches(states: Tensor) -> Sequence[Tensor]:
    """Views of hidden states (S, T, D), or of token windows (S, T), each of a size that one forward pass takes."""
    return states.split(max(1, BATCH_TOKENS // states.shape[1]))


def head_slices(length: int) -> list[slice]:
    """Positions of a window of `length` tokens, as many at a time as have logits in memory at once."""
    return [slice(start, min(start + HEAD_TOKENS, length)) for start in range(0, length, HEAD_TOKENS)]
