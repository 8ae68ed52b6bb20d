"""Sharing across layers: fitted scales against least squares, which ties are chosen, what cannot be shared."""

import pytest
import torch

import naive
from penjing.methods.weight_sharing.tie import TieOptions, alike, choose, fitted_scale, owners
from penjing.models import layout_of

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 10,
}


def test_scales_are_least_squares():
    weight, owned, inputs = naive.random_weight(5, 7), naive.random_weight(5, 7, seed=1), naive.random_weight(40, 7)
    scale = fitted_scale(weight, owned, inputs.T @ inputs)
    for row in range(5):
        seen, meant = (inputs.double() @ each[row].double() for each in (owned, weight))
        expected = torch.linalg.lstsq(seen.unsqueeze(1), meant.unsqueeze(1)).solution
        torch.testing.assert_close(scale[row].double(), expected.squeeze(), rtol=1e-4, atol=1e-6)
    example = fitted_scale(torch.tensor([[2.0, 2]]), torch.tensor([[1.0, 0]]), torch.eye(2))
    assert example.tolist() == [2.0]
    assert fitted_scale(weight, torch.zeros(5, 7), torch.eye(7)).tolist() == [0.0] * 5


def test_the_whole_model_decides_among_the_closest_pairs():
    errors = {(1, 0): 0.1, (2, 0): 0.2, (2, 1): 0.3, (3, 2): 0.4, (3, 0): 0.5}
    told = []

    def divergence(trials):
        told.append([dict(ties) for ties in trials])
        return [float(1 in ties) - 0.1 * (3 in ties) for ties in trials]

    ties = choose(errors, TieOptions(blocks=2, candidates=3), divergence)
    assert told[0] == [{1: 0}, {2: 0}, {2: 1}]
    assert told[1] == [{2: 0, 1: 0}, {2: 0, 3: 0}]  # a block that borrows does not own
    assert ties == {2: 0, 3: 0}
    alone = choose(errors, TieOptions(blocks=1, candidates=1), pytest.fail)
    assert alone == {1: 0}


def test_what_is_shared_and_what_cannot_be():
    layout = layout_of(CONFIG)
    options = TieOptions(blocks=1, linears=("mlp.up_proj", "mlp.down*"))
    assert owners(layout, options, {3: 1}) == {
        f"model.layers.3.mlp.{name}": f"model.layers.1.mlp.{name}" for name in ("up_proj", "down_proj")
    }
    assert alike(layout, options) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="1 can borrow at most"):
        alike(layout, TieOptions(blocks=2))
    with pytest.raises(ValueError, match=r"no linear of a block is called c_fc"):
        alike(layout, TieOptions(blocks=1, linears=("c_fc",)))
    experts = layout_of(CONFIG | {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2})
    with pytest.raises(ValueError, match="fuses the experts"):
        alike(experts, TieOptions(blocks=1))
