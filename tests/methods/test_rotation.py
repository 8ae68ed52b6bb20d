"""Rotation: the algebra against loops in fp64, where it is refused, and what it does to outliers and to a grid."""

from __future__ import annotations

import pytest
import torch

from penjing.errors import PlanError
from penjing.methods.quantization.rotation import Change, RotationOptions, Turn, rewrite
from penjing.models import layout_of
from penjing.numerics.activations import Activations, round_inputs
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.hadamard import Rotation, random_hadamard, sylvester

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LLAMA = {"model_type": "llama", **SIZES}


def matrix(rotation):
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    turn = Turn(Rotation(torch.ones(2).double(), (sylvester(2),)))
    stored = {"linear.weight": torch.tensor([[1.0, 2.0]]), "norm.weight": torch.tensor([1.0, 3.0])}
    weight = Change("linear", norm="norm.weight", columns=(turn,)).weight(stored.__getitem__, False)
    torch.testing.assert_close(weight, torch.tensor([[4.9497, -3.5355]]), rtol=0, atol=1e-4)
    x = torch.tensor([10.0, 0.0])
    assert float(turn.rotation.apply(x.double()) @ weight.double().T) == pytest.approx(10.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_columns_rows_and_norm_by_loops(transposed, offset):
    """W -> R^T W diag(g + offset) Q, number by number."""
    rotation, other = random_hadamard(12, 0), random_hadamard(20, 1)
    weight, gamma = numbers(20, 12), numbers(12, seed=1)
    stored = {"linear.weight": weight.T.contiguous() if transposed else weight, "norm.weight": gamma}
    change = Change("linear", "norm.weight", offset, (Turn(rotation),), (Turn(other),))
    found = change.weight(stored.__getitem__, transposed)
    q, r = matrix(rotation).tolist(), matrix(other).tolist()
    scaled = [[float(w) * (float(g) + offset) for w, g in zip(row, gamma, strict=True)] for row in weight]
    expected = [
        [sum(r[n][i] * scaled[n][k] * q[k][j] for n in range(20) for k in range(12)) for j in range(12)]
        for i in range(20)
    ]
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.T if transposed else found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("count", "first", "stride"), [(3, 0, 4), (2, 4, 4), (2, 0, 8), (2, 2, 5), (1, 8, 0)])
def test_only_the_stretches_turn(count, first, stride):
    rotation = random_hadamard(4, 0)
    x = numbers(5, 12).double()
    expected, inside = x.clone(), torch.zeros(12, dtype=torch.bool)
    for number in range(count):
        part = slice(first + number * stride, first + number * stride + 4)
        expected[:, part], inside[part] = x[:, part] @ matrix(rotation), True
    turned = x.clone()
    Turn(rotation, count, first, stride).apply_(turned)
    torch.testing.assert_close(turned, expected)
    assert torch.equal(turned[:, ~inside], x[:, ~inside])


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_large_matrix_is_turned_slice_by_slice(side, monkeypatch):
    rotation = random_hadamard(8, 0)
    stored = {"linear.weight": numbers(8, 8)}
    change = Change("linear", **{side: (Turn(rotation),)})
    whole = change.weight(stored.__getitem__, False)
    monkeypatch.setattr("penjing.methods.quantization.rotation.SLICE", 3)
    torch.testing.assert_close(change.weight(stored.__getitem__, False), whole, rtol=1e-6, atol=1e-7)


def test_what_is_stored_is_not_written_into():
    stored = {"l.weight": numbers(8, 8).double(), "l.bias": numbers(8).double(), "n.weight": numbers(8).double()}
    before = {name: tensor.clone() for name, tensor in stored.items()}
    turn = Turn(random_hadamard(8, 0))
    Change("l", "n.weight", 0.0, (turn,), (turn,)).weight(stored.__getitem__, False)
    Change("l", rows=(turn,)).bias(stored.__getitem__)
    assert all(torch.equal(stored[name], before[name]) for name in stored)


def test_which_tensors_change():
    layout = layout_of(LLAMA)
    every = {name for module in layout.modules for name in module.tensor_names()}
    assert set(rewrite(layout, RotationOptions()).tensors) == every
    heads = rewrite(layout, RotationOptions(residual=False))
    assert set(heads.tensors) == {name for name in every if "v_proj" in name or "o_proj" in name}
    assert heads.layout is layout and not heads.config


def test_biases_turn_only_with_their_rows():
    layout = layout_of(LLAMA | {"attention_bias": True})
    changed = rewrite(layout, RotationOptions()).tensors
    assert {"model.layers.0.self_attn.v_proj.bias", "model.layers.0.self_attn.o_proj.bias"} <= set(changed)
    assert "model.layers.0.self_attn.q_proj.bias" not in changed


def test_a_tied_head_becomes_one_of_its_own_unless_only_heads_turn():
    tied = layout_of(LLAMA | {"tie_word_embeddings": True})
    rewriting = rewrite(tied, RotationOptions())
    assert not rewriting.layout.tied and rewriting.config == {"tie_word_embeddings": False}
    assert rewriting.layout.head.tensors == {"weight": (40, 24)}
    assert rewriting.layout == layout_of(LLAMA | {"tie_word_embeddings": False})
    assert rewrite(tied, RotationOptions(residual=False)).layout.tied


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_norms_after_a_half_block_forbid_the_stream(model_type):
    layout = layout_of({"model_type": model_type, **SIZES})
    with pytest.raises(PlanError, match=r"ends in a norm .*; set `residual: false`"):
        rewrite(layout, RotationOptions())
    assert rewrite(layout, RotationOptions(residual=False)).tensors


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "vocab_size": 40, "n_embd": 24, "n_head": 3, "n_layer": 2},
        {"model_type": "opt", **SIZES, "ffn_dim": 40},
        {"model_type": "gpt_neox", **SIZES},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_norm_that_subtracts_the_mean_forbids_the_stream(config):
    with pytest.raises(PlanError, match=r"LayerNorm subtracts the mean .*; set `residual: false`"):
        rewrite(layout_of(config), RotationOptions())
    assert rewrite(layout_of(config), RotationOptions(residual=False)).tensors


def test_a_decoder_that_is_not_known_is_refused():
    layout = layout_of({"model_type": "olmo2", **SIZES, "pad_token_id": 0})
    for options in (RotationOptions(), RotationOptions(residual=False)):
        with pytest.raises(PlanError, match=r"olmo2 .* not known"):
            rewrite(layout, options)


def test_a_width_without_a_hadamard_matrix_is_told():
    notes = rewrite(layout_of(LLAMA | {"hidden_size": 18, "head_dim": 6}), RotationOptions()).notes
    assert len(notes) == 2
    assert "residual stream: no Hadamard matrix of order 18" in notes[0] and "value heads" in notes[1]


def test_something_has_to_turn():
    with pytest.raises(ValueError, match="nothing to rotate"):
        RotationOptions(residual=False, heads=False)


def test_inputs_with_outliers_survive_four_bits():
    """One channel of 192 is 50 times the others. Rounded per token, the others vanish; turned first, they stay."""
    rotation = random_hadamard(192, 0)
    x = numbers(1, 64, 192).double()
    x[..., 17] = 50
    four = Activations(bits=4)
    plain = round_inputs(x, four)
    turned = round_inputs(rotation.apply(x), four) @ matrix(rotation).T
    errors = [float((rounded - x)[..., :17].norm() / x[..., :17].norm()) for rounded in (plain, turned)]
    assert errors[0] > 0.99 and errors[1] < 0.35, errors


def test_weights_that_lie_on_a_grid_leave_it():
    """Rounding such weights to their own grid loses nothing, and says nothing about a method; turned, it does."""
    grid = IntegerGrid(4, 32, False, "full", torch.float32)
    codes = torch.randint(-8, 8, (64, 96), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = -8, 7
    weight = codes.float() * 0.125

    def loss(values):
        scale, zero = grid.fit_rows(values)
        spread = grid.spread(scale, 96), grid.spread(zero, 96)
        rounded = (grid.encode(values, *spread) - spread[1]) * spread[0]
        return float((rounded - values).norm() / values.norm())

    turned = random_hadamard(96, 0).apply(weight.double()).float()
    assert loss(weight) < 1e-6 < 0.03 < loss(turned)
