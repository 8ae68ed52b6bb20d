"""Tensor trains row by row: a library, bounds, exact cases, look-up."""

import pytest
import torch

import naive
from penjing.methods.low_rank.tensor_train import TensorTrainOptions, tensor_train
from penjing.numerics.tensor_trains import Train, decompose, near_modes, rebuild
from penjing.representations import Dense, LowRank, Scheme
from penjing.runtime import runner_for

FLOAT = torch.float32


@pytest.mark.parametrize(("modes", "rank"), [((4, 3, 5), 2), ((4, 3, 5), 4), ((2, 2, 3, 5), 3), ((6, 10), 1)])
def test_the_library_finds_the_same(modes, rank):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train as theirs

    rows, train = naive.random_weight(5, 60).double(), Train.of_rank(modes, rank)
    ours = rebuild(decompose(rows, train), train)
    for row, found in zip(rows, ours, strict=True):
        expected = tensorly.tt_to_tensor(theirs(row.reshape(modes).numpy(), [1, *train.ranks, 1]))
        torch.testing.assert_close(found, torch.as_tensor(expected).flatten(), rtol=1e-9, atol=1e-12)


def test_full_rank_is_exact_and_less_is_bounded():
    rows = naive.random_weight(7, 24).double()
    whole = Train.of_rank((2, 3, 4), 99)
    assert whole.ranks == (2, 4)
    torch.testing.assert_close(rebuild(decompose(rows, whole), whole), rows)
    last = torch.zeros(7)
    for rank in (3, 2, 1):
        train = Train.of_rank((2, 3, 4), rank)
        error = (rebuild(decompose(rows, train), train) - rows).square().sum(1)
        bound = torch.zeros(7, dtype=torch.float64)
        for cut, kept in zip((2, 6), train.ranks, strict=True):
            bound += torch.linalg.svdvals(rows.reshape(7, cut, -1))[:, kept:].square().sum(1)
        assert (error <= bound * (1 + 1e-9) + 1e-12).all() and (error >= last - 1e-12).all()
        last = error


def test_rows_of_rank_one_and_of_nothing():
    row = torch.kron(torch.kron(torch.tensor([1.0, 2]), torch.tensor([1.0, -1, 3])), torch.tensor([2.0, 0.5]))
    table = torch.stack([row, torch.zeros(12), 1e-3 * row])
    result = tensor_train(table, Train.of_rank((2, 3, 2), 1), FLOAT)
    torch.testing.assert_close(result.dense(), table)
    assert result.cores.shape == (3, 7) and result.nbytes() == 84
    assert torch.equal(result.rows(1, 3).dense(), result.dense()[1:3])


def test_how_a_width_is_cut():
    assert near_modes(768, 3) == (8, 8, 12) and near_modes(576, 3) == (8, 8, 9)
    assert near_modes(768, 9) == (2,) * 8 + (3,)
    assert sum(Train.of_rank(near_modes(768, 9), 1).sizes) == 19  # 40 times fewer
    with pytest.raises(ValueError, match="prime factors"):
        near_modes(14, 3)
    with pytest.raises(ValueError, match="multiply to 12"):
        TensorTrainOptions(modes=(3, 4)).for_matrix((5, 13), FLOAT)
    with pytest.raises(ValueError, match="each at least 2"):
        TensorTrainOptions(modes=(12,))
    assert "itself" in TensorTrainOptions(rank=9).declines((5, 64))
    assert TensorTrainOptions().declines((5, 64)) == ""


def test_looking_up_is_what_the_table_says():
    table = naive.random_weight(40, 24)
    layer, tokens = torch.nn.Embedding(40, 24), torch.tensor([[3, 39, 0], [3, 7, 7]])
    train = tensor_train(table, Train.of_rank((4, 6), 2), FLOAT)
    product = LowRank(Dense(table[:, :5].contiguous()), Dense(table[:5].contiguous()))
    for weight in (train, product):
        module = runner_for(layer, Scheme(), weight)
        torch.testing.assert_close(module(tokens), weight.dense()[tokens])
        torch.testing.assert_close(module.state_dict()["weight"], weight.dense())
    assert runner_for(layer, Scheme(), Dense(table)) is None
