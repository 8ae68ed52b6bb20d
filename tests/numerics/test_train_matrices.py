"""Tensor trains over whole matrices: a library, exact cases, padding, look-up, and their recipe keys."""

import math

import pytest
import torch

import naive
from penjing.methods.low_rank.tensor_train_matrix import TrainMatrixOptions
from penjing.numerics.train_matrices import (
    TrainMatrix,
    cores_of,
    covering_modes,
    decompose_matrix,
    rebuild_matrix,
    rows_of,
)
from penjing.representations import Scheme, TensorTrainMatrix


@pytest.mark.parametrize(("rows", "columns", "rank"), [((4, 5), (2, 6), 3), ((3, 2, 4), (2, 3, 2), 5)])
def test_the_library_finds_the_same(rows, columns, rank):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train_matrix as theirs

    matrix, how = naive.random_weight(math.prod(rows), 12).double(), TrainMatrix.of_rank(rows, columns, rank)
    expected = theirs(matrix.reshape(*rows, *columns).numpy(), [1, *how.ranks, 1])
    expected = torch.as_tensor(tensorly.tt_matrix_to_tensor(expected)).reshape(matrix.shape)
    found = rebuild_matrix(decompose_matrix(matrix, how), how, len(matrix))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_kronecker_product_has_rank_one_and_full_rank_is_exact():
    left, right = naive.random_weight(3, 2), naive.random_weight(5, 4)
    one = TrainMatrix.of_rank((3, 5), (2, 4), 1)
    product = torch.kron(left, right)
    assert sum(one.sizes) == 26
    torch.testing.assert_close(rebuild_matrix(decompose_matrix(product, one), one, 15), product)
    whole = TrainMatrix.of_rank((3, 5), (2, 4), 99)
    matrix = naive.random_weight(15, 8)
    torch.testing.assert_close(rebuild_matrix(decompose_matrix(matrix, whole), whole, 15), matrix)
    assert not rebuild_matrix(decompose_matrix(torch.zeros(15, 8), one), one, 15).any()


def test_rows_are_looked_up_without_the_table_and_padding_is_cut_off():
    matrix, how = naive.random_weight(13, 12), TrainMatrix.of_rank(covering_modes(13, 2), (3, 4), 4)
    cores = decompose_matrix(matrix, how)
    table = rebuild_matrix(cores, how, 13)
    tokens = torch.tensor([12, 0, 7, 7])
    torch.testing.assert_close(rows_of(cores_of(cores.float(), how), tokens), table[tokens])
    packed = TensorTrainMatrix(cores.float(), how, 13)
    assert packed.shape == (13, 12) and packed.rows(0, 13) is packed
    torch.testing.assert_close(packed.rows(2, 5).dense(), table[2:5])


def test_how_a_matrix_is_cut():
    assert covering_modes(49152, 3) == (36, 37, 37) and covering_modes(64, 3) == (4, 4, 4)
    for count in (2, 7, 300, 50257, 128256):
        assert count <= math.prod(covering_modes(count, 3)) <= 1.5 * count + 8
    chosen = TrainMatrixOptions(ratio=1 / 38.4).for_matrix((49152, 576), torch.bfloat16)
    train = chosen.train((49152, 576))
    assert 38.4 <= 49152 * 576 / sum(train.sizes) < 41
    assert chosen.scheme(Scheme(), torch.bfloat16).train == train
    assert "itself" in TrainMatrixOptions(rank=99).declines((16, 8))
    with pytest.raises(ValueError, match="multiply to 4 x 6"):
        TrainMatrixOptions(rank=2, rows=(2, 2), columns=(2, 3)).train((5, 6))
    for keys in ({}, {"rank": 1, "ratio": 0.5}, {"rank": 1, "rows": (2, 2)}):
        with pytest.raises(ValueError, match=r"either|together"):
            TrainMatrixOptions(**keys)
