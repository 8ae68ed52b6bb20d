"""Statistics are taken once per distinct input, and a forward pass ends when there is nothing more to see."""

import pytest
import torch
from torch import nn

from penjing.pipeline.observe import CALL_TOKENS, CallRecorder, Observer
from penjing.statistics import AbsMax, ColumnNorm, CrossGram, Gram, StreamGap


def find(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)


class Attention(nn.Module):
    """Two projections of the same input, one of another, one that is never asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)
        self.o, self.rest = nn.Linear(4, 6), nn.Linear(6, 6)
        self.rest_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.o(self.q(x) * self.k(x))
        self.rest_calls += 1
        return self.rest(y)


def observe(module: nn.Module, needs: dict, windows: list[torch.Tensor]) -> Observer:
    with Observer(module, find, needs) as observer:
        for window in windows:
            with observer.forward():
                module(window)
    return observer


def test_linears_that_read_the_same_tensor_share_one_accumulator():
    module, windows = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    observer = observe(module, {"q": [Gram], "k": [Gram, AbsMax], "o": [Gram]}, windows)
    assert observer.statistics["q"][Gram] is observer.statistics["k"][Gram]
    assert observer.clusters() == [["q", "k"], ["o"]]
    tokens = torch.cat(windows).flatten(0, 1).double()
    torch.testing.assert_close(observer.statistics["k"][Gram].value.double(), tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(observer.statistics["k"][AbsMax].value.double(), tokens.abs().amax(0))
    assert observer.statistics["q"][Gram].tokens == 30


def test_equal_values_in_another_tensor_are_another_input():
    class Copies(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.q(x) * self.k(x.clone()))

    observer = observe(Copies(), {"q": [Gram], "k": [Gram]}, [torch.randn(3, 6)])
    assert observer.clusters() == [["q"], ["k"]]
    torch.testing.assert_close(observer.statistics["q"][Gram].value, observer.statistics["k"][Gram].value)


def test_after_the_first_pass_the_block_stops_at_the_last_linear_that_matters():
    module = Attention()
    observer = observe(module, {"q": [Gram], "o": [ColumnNorm]}, [torch.randn(4, 6) for _ in range(5)])
    assert module.rest_calls == 1
    assert observer.statistics["o"][ColumnNorm].tokens == 20


def test_a_linear_that_is_called_a_varying_number_of_times_never_stops_the_pass():
    class Routed(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.q(x)
            if x.shape[0] > 3:
                y = y + self.k(x)
            return self.rest(self.o(y))

    module = Routed()
    observer = observe(module, {"q": [Gram], "k": [Gram]}, [torch.randn(size, 6) for size in (2, 4, 3, 5)])
    assert observer.statistics["q"][Gram].tokens == 14
    assert observer.statistics["k"][Gram].tokens == 9


def test_hooks_are_gone_afterwards():
    module = Attention()
    observe(module, {"q": [Gram]}, [torch.randn(2, 6)])
    assert not any(linear._forward_pre_hooks for linear in module.modules())


def test_calls_are_kept_until_there_are_enough_tokens():
    module = Attention()
    recorder = CallRecorder(module, find, ["o"])
    for _ in range(4):
        module(torch.randn(CALL_TOKENS // 2, 6))
    recorder.remove()
    assert len(recorder.calls["o"]) == 2
    assert not module.o._forward_pre_hooks


@pytest.mark.parametrize("shape", [(7, 6), (1, 1, 6)])
def test_inputs_of_any_rank_count_tokens(shape):
    observer = observe(Attention(), {"q": [ColumnNorm]}, [torch.ones(shape)])
    assert observer.statistics["q"][ColumnNorm].value.tolist() == [float(torch.ones(shape).numel() // 6)] * 6


def compare(module: nn.Module, needs: dict, windows: list[torch.Tensor], dense: list[torch.Tensor]) -> Observer:
    with Observer(module, find, needs) as observer:
        for window, original in zip(windows, dense, strict=True):
            with observer.forward():
                module(window)
            with observer.beside():
                module(original)
    return observer


def test_the_same_tokens_in_both_models_are_paired():
    module, windows = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    dense = [window + 0.1 * torch.randn_like(window) for window in windows]
    needs = {"q": [Gram, CrossGram], "k": [CrossGram], "o": [CrossGram]}
    observer = compare(module, needs, windows, dense)
    assert observer.statistics["q"][CrossGram] is observer.statistics["k"][CrossGram]
    assert module.rest_calls == 4, (
        "the dense model's states go on to the next block, so those passes are never cut short"
    )
    tokens, originals = (torch.cat(parts).flatten(0, 1).double() for parts in (windows, dense))
    expected = (originals - tokens).T @ tokens
    torch.testing.assert_close(
        observer.statistics["k"][CrossGram].value.sum(0).double(), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(observer.statistics["q"][Gram].value.double(), tokens.T @ tokens, rtol=1e-4, atol=1e-5)
    seen, meant = ((module.q(part) * module.k(part)).flatten(0, 1) for part in (torch.cat(windows), torch.cat(dense)))
    torch.testing.assert_close(
        observer.statistics["o"][CrossGram].value.sum(0), (meant - seen).T @ seen, rtol=1e-3, atol=1e-5
    )
    assert observer.statistics["q"][Gram].tokens == observer.statistics["q"][CrossGram].tokens == 30


def test_equal_states_differ_by_nothing():
    windows = [torch.randn(2, 5, 6) for _ in range(2)]
    observer = compare(Attention(), {"q": [CrossGram], "o": [CrossGram]}, windows, windows)
    assert all((observer.statistics[name][CrossGram].value == 0).all() for name in ("q", "o"))


def test_a_linear_that_only_one_model_reached_is_an_error():
    class Fickle(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) if x.sum() > 0 else self.k(x)

    with pytest.raises(RuntimeError, match="q ran with the compressed model's states"):
        compare(Fickle(), {"q": [CrossGram]}, [torch.ones(2, 6)], [-torch.ones(2, 6)])


def test_tokens_count_by_their_weights_where_a_statistic_weighs_them():
    module, windows = Attention(), [torch.randn(2, 5, 6) for _ in range(3)]
    dense = [window + 0.1 * torch.randn_like(window) for window in windows]
    weights = torch.rand(30) * 4
    needs = {"q": [Gram, CrossGram, ColumnNorm], "k": [Gram, AbsMax], "o": [Gram]}
    with Observer(module, find, needs, {"q": weights, "k": weights}) as observer:
        for window, original in zip(windows, dense, strict=True):
            with observer.forward():
                module(window)
            with observer.beside():
                module(original)
    tokens, originals = (torch.cat(parts).flatten(0, 1).double() for parts in (windows, dense))
    weighted = tokens * weights.double()[:, None]
    q, k, o = (observer.statistics[name] for name in "qko")
    assert q[Gram] is k[Gram]
    torch.testing.assert_close(q[Gram].value.double(), tokens.T @ weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        q[CrossGram].value.sum(0).double(), (originals - tokens).T @ weighted, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(q[ColumnNorm].value.double(), tokens.square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k[AbsMax].value.double(), tokens.abs().amax(0))
    seen = (module.q(torch.cat(windows)) * module.k(torch.cat(windows))).flatten(0, 1)
    torch.testing.assert_close(o[Gram].value, (seen.T @ seen).detach(), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """Two norms and two linears that write to the stream, one after the other or side by side."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(6), nn.LayerNorm(6)
        self.o, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            return x + self.o(self.first(x)) + self.down(self.second(x))
        x = x + self.o(self.first(x))
        return x + self.down(self.second(x))


@pytest.mark.parametrize("parallel", [False, True])
def test_what_the_stream_lost_before_each_linear_that_adds_to_it(parallel):
    """Side by side, the first of them is given all of it."""
    block, windows = Block(parallel), [torch.randn(2, 5, 6) for _ in range(3)]
    dense = [window + 0.3 * torch.randn_like(window) for window in windows]
    needs, norms = {"o": [Gram, StreamGap], "down": [Gram, StreamGap]}, ["first", "second"]
    with torch.no_grad(), Observer(block, find, needs, norms=norms) as observer:
        for window, original in zip(windows, dense, strict=True):
            with observer.forward():
                block(window)
            with observer.beside():
                block(original)
        x, meant = (torch.cat(parts).flatten(0, 1) for parts in (windows, dense))
        inputs = block.first(x)
        expected = (meant - x).T @ inputs
        torch.testing.assert_close(observer.statistics["o"][StreamGap].value.sum(0), expected, rtol=1e-4, atol=1e-4)
        found = observer.statistics["down"][StreamGap].value
        if parallel:
            assert not found.numel()
            return
        middle, middle_meant = x + block.o(inputs), meant + block.o(block.first(meant))
        expected = (middle_meant - middle).T @ block.second(middle)
        torch.testing.assert_close(found.sum(0), expected, rtol=1e-4, atol=1e-4)
        assert observer.statistics["o"][StreamGap].tokens == 30
