"""Collecting statistics of the inputs of a block's linears while the block runs. One accumulator per distinct input.

Statistics that compare the compressed model with the dense one need the same tokens twice: the block runs on a batch of
the compressed model's hidden states, then, inside `beside()`, on the dense model's states for the same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from penjing.methods.base import Call
from penjing.statistics import CrossGram, Statistics, StatisticType, StreamGap, compares, weighs

CALL_TOKENS = 4096
"""How many tokens of calls of submodules are kept for methods that search by running them."""


class _EnoughSeen(Exception):
    """Every statistic of this forward pass is taken; the rest of the block need not run."""


class _Waiting(NamedTuple):
    """Inputs (t, K) in the compressed model until those of the dense one come; the stream (t, D) if known.

    roots    of the weights (t, 1) of the tokens, if they do not count alike
    weighed  inputs (t, K) times roots
    """

    inputs: Tensor
    roots: Tensor | None
    weighed: Tensor
    stream: Tensor | None

    def compare(self, statistic: CrossGram | StreamGap, lost: Tensor) -> None:
        """Tell what was lost (t, ...) at these tokens."""
        statistic.compare(self.weighed, lost if self.roots is None else lost * self.roots)


class Observer:
    """Hooks on the linears of one block.

    needs    linear name -> statistic types that some step wants
    weights  linear name -> how much each of its tokens counts (t,), in order, in statistics that weigh tokens; a linear
             without an entry has tokens that count alike, and linears that share inputs share weights
    norms    modules that are given the residual stream: what the last of them saw before a linear is what the linear's
             outputs are added to, the first time that it is

    Linears called one after the other with the same tensor share their statistics: `clusters()` lists them.
    """

    def __init__(
        self,
        block: nn.Module,
        find: Callable[[nn.Module, str], nn.Module],
        needs: Mapping[str, Iterable[StatisticType]],
        weights: Mapping[str, Tensor] | None = None,
        norms: Iterable[str] = (),
    ) -> None:
        self._norms = [find(block, name) for name in norms]
        self._stream: Tensor | None = None
        self._added_to: Tensor | None = None
        self._roots = {name: each.sqrt().unsqueeze(1) for name, each in (weights or {}).items()}
        self._weighed = dict.fromkeys(self._roots, 0)
        self._needs = {name: tuple(types) for name, types in needs.items()}
        self._linears = {name: find(block, name) for name in self._needs}
        self.statistics: dict[str, Statistics] = {}
        self._leader: dict[str, str] = {}
        self._called: list[str] = []
        self._last: tuple[str, Tensor] | None = None
        self._hooks: list[Any] = []
        self._last_linear: str | None = None
        self._forwards = 0
        self._first_seen: dict[str, int] = {}
        self._waiting: dict[str, deque[_Waiting]] = {name: deque() for name in self._needs}
        self._is_beside = False

    def __enter__(self) -> Observer:
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_pre_hook(self._hook(name)))
        for norm in self._norms:
            self._hooks.append(norm.register_forward_pre_hook(self._see_stream))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = self._stream = self._added_to = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """One forward pass of the block runs inside, on one batch; it ends early when nothing is left to be seen."""
        if self._called and self._last_linear is None and sorted(self._called) == sorted(self._needs):
            self._last_linear = self._called[-1]
        self._called = []
        self._last = None
        self._forwards += 1
        with suppress(_EnoughSeen):
            yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What runs inside is the last forward pass again, with the hidden states of the dense model."""
        self._is_beside = True
        try:
            yield
        finally:
            self._is_beside = False
        if late := [name for name, waiting in self._waiting.items() if waiting]:
            raise RuntimeError(f"{', '.join(late)} ran with the compressed model's states but not with the dense one's")

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._is_beside:
                return self._compare(name, args[0])
            self._see(name, args[0])
            if name == self._last_linear:
                raise _EnoughSeen

        return see

    def _see_stream(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0] is not self._added_to:
            self._stream = args[0]

    def _take_stream(self) -> Tensor | None:
        """The stream (t, D) that the linear called now adds to; None if it is not known, or another makes up for it."""
        stream, self._stream = self._stream, None
        if stream is None:
            return None
        self._added_to = stream
        return stream.reshape(-1, stream.shape[-1])

    def _see(self, name: str, inputs: Tensor) -> None:
        self._called.append(name)
        leader = self._leader_of(name, inputs)
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if name not in self.statistics:
            seen = self.statistics.get(leader, {})
            self.statistics[name] = {kind: seen.get(kind) or kind(tokens.shape[-1]) for kind in self._needs[name]}
        already = set(map(id, self.statistics[leader].values())) if leader != name else set()
        fresh = {kind: each for kind, each in self.statistics[name].items() if id(each) not in already}
        roots = self._next_roots(name, tokens) if any(map(weighs, fresh)) else None
        weighted = tokens if roots is None else tokens * roots
        for kind, statistic in fresh.items():
            if not compares(kind):
                statistic.update(weighted if weighs(kind) else tokens)
        if any(map(compares, fresh)):
            stream = self._take_stream() if StreamGap in fresh else None
            self._waiting[name].append(_Waiting(tokens, roots, weighted, stream))
        if leader == name:
            self._last = (name, inputs)

    def _next_roots(self, name: str, tokens: Tensor) -> Tensor | None:
        """Roots of the weights (t, 1) of the next tokens (t, K) of a linear; None where all count alike."""
        if name not in self._roots:
            return None
        start = self._weighed[name]
        self._weighed[name] = start + len(tokens)
        return self._roots[name][start : start + len(tokens)].to(tokens.dtype)

    def _compare(self, name: str, dense: Tensor) -> None:
        """Finish what `_see` began; linears that share their inputs share this, too."""
        if not self._waiting[name]:
            return
        waiting, dense = self._waiting[name].popleft(), dense.reshape(-1, dense.shape[-1])
        for statistic in self.statistics[name].values():
            if isinstance(statistic, CrossGram):
                waiting.compare(statistic, dense - waiting.inputs)
            if isinstance(statistic, StreamGap):
                meant = self._take_stream()
                if waiting.stream is not None and meant is not None:
                    waiting.compare(statistic, meant - waiting.stream)

    def _leader_of(self, name: str, inputs: Tensor) -> str:
        """The linear called just before with the very same tensor, or `name` itself.

        Two linears share only if they were first called in the same forward pass, so that neither has missed tokens.
        """
        first = self._first_seen.setdefault(name, self._forwards)
        previous = self._last[0] if self._last is not None and self._last[1] is inputs else name
        leader = previous if self._first_seen[previous] == first else name
        known = self._leader.setdefault(name, leader)
        if known != leader and known != name:
            raise RuntimeError(f"{name} read the same tensor as {known} in the first forward pass, but not in this one")
        return known

    def clusters(self) -> list[list[str]]:
        """Linears that share an input, in the order of the forward pass; those never called stand alone."""
        groups: dict[str, list[str]] = {}
        for name in self._needs:
            groups.setdefault(self._leader.get(name, name), []).append(name)
        return list(groups.values())


class CallRecorder:
    """Keeps the first calls of some submodules, for methods that search by running them."""

    def __init__(self, block: nn.Module, find: Callable[[nn.Module, str], nn.Module], names: Iterable[str]) -> None:
        self.calls: dict[str, list[Call]] = {name: [] for name in names}
        self._tokens = dict.fromkeys(self.calls, 0)
        self._hooks = [
            find(block, name).register_forward_pre_hook(self._hook(name), with_kwargs=True) for name in self.calls
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._tokens[name] >= CALL_TOKENS:
                return
            inputs = args[0] if args else kwargs["hidden_states"]
            self._tokens[name] += inputs.numel() // inputs.shape[-1]
            self.calls[name].append(Call(args, kwargs))

        return keep

    def remove(self) -> None:
        """Take the hooks off; the calls stay."""
        for hook in self._hooks:
            hook.remove()
