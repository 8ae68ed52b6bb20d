"""A change of low rank: both ways to compute it agree, it merges to the number, and it leaves zeros alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from penjing.methods.adaptation.low_rank_change import LowRankChange, attach, matrices, merge, scale_of


class Tiny(nn.Module):
    """Two linears, a stack of matrices, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.first = nn.Linear(6, 5)
        self.stack = nn.Module()
        self.stack.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.first(self.embedding(tokens))
        return self.head(torch.einsum("bk,enk->bn", states, self.stack.experts))


def changed(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    torch.manual_seed(1)
    for name, module, own in list(matrices(model)):
        change = LowRankChange(getattr(module, own), 2, 0.5, masks.get(name))
        nn.init.normal_(change.up)
        attach(module, own, change)
    return model


def test_embeddings_and_heads_are_left_out():
    assert [name for name, _, _ in matrices(Tiny())] == ["first.weight", "stack.experts"]


@pytest.mark.parametrize("masked", [False, True])
def test_merged_is_what_was_trained(masked):
    model = Tiny().requires_grad_(False)
    before = copy.deepcopy(model)
    kept = {"first.weight": torch.rand(5, 6) > 0.5, "stack.experts": torch.rand(3, 4, 5) > 0.5} if masked else {}
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)
    tokens = torch.arange(9)
    trained = changed(model, kept)(tokens)
    trained.sum().backward()
    gradients = {name for name, value in model.named_parameters() if value.grad is not None}
    assert len(gradients) == 4 and all(name.endswith(("up", "down")) for name in gradients)
    merged = merge(model)
    torch.testing.assert_close(merged(tokens), trained.detach(), rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == before.state_dict().keys()
    for name, mask in kept.items():
        assert torch.equal(merged.get_parameter(name) != 0, mask)
    assert not torch.equal(merged.first.weight, before.first.weight)


def test_the_worked_example():
    change = LowRankChange(torch.tensor([[1.0, 0.0]]), 1, 0.5, torch.tensor([[True, False]]))
    with torch.no_grad():
        change.up.copy_(torch.tensor([[2.0]]))
        change.down.copy_(torch.tensor([[3.0, 5.0]]))
    assert change(torch.tensor([[1.0, 0.0]])).tolist() == [[4.0, 0.0]]


def test_a_fresh_change_changes_nothing_and_scales_are_those_of_the_papers():
    weight = torch.randn(7, 3)
    assert torch.equal(LowRankChange(weight, 16, 2.0)(weight), weight)
    assert scale_of(32, 16) == 2 and scale_of(32, 16, rank_stabilised=True) == 8
