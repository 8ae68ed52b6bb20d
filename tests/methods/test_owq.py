"""OWQ against elimination in fp64, its budget, weak columns, groups, thin statistics, bytes."""

import warnings

import pytest
import torch

import naive
from format_cases import spec
from penjing.formats import FORMATS
from penjing.methods.base import LinearInput
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.owq import OWQOptions, linear, owq, weak_columns
from penjing.numerics.cholesky import DampingWarning
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Columns, Scheme
from penjing.statistics import Gram

ROWS, COLUMNS = 12, 48


def problem(seed=0, rows=ROWS, columns=COLUMNS, tokens=256):
    inputs = naive.correlated(tokens, columns, seed=seed)
    return naive.random_weight(rows, columns, seed=seed + 100), inputs.T @ inputs


def grid_of(bits=3, size=16, symmetric=False):
    return IntegerGrid(bits, size, symmetric, "narrow", torch.float32)


def reference(weight, gram, grid, count, order):
    """Weak columns by sensitivity, then elimination in fp64 with the weak columns last and untouched."""
    hessian = naive.damped(gram, 0.01)
    change = (weight.double() - naive.rtn(weight, grid)).square().sum(0)
    sensitivity = (change * gram.diagonal().double()).tolist()
    weak = sorted(sorted(range(weight.shape[1]), key=sensitivity.__getitem__)[-count:])
    order = [column for column in order if column not in weak] + weak
    scales = {}
    for row in range(weight.shape[0]):
        for group in naive.groups_of(weight.shape[1], grid):
            members = torch.tensor([float(weight[row, column]) for column in group if column not in weak] or [0.0])
            scales |= {(row, column): naive.fit(members, grid) for column in group}

    def fix(position, current, inverse):
        values = current[:, position].clone()
        if order[position] not in weak:
            for row in range(len(values)):
                scale, zero = scales[row, order[position]]
                values[row] = scale * (naive.nearest(float(values[row]), scale, zero, grid) - zero)
        return values

    result, _ = naive.eliminate(weight[:, order], hessian[order][:, order], fix)
    back = torch.empty_like(result)
    back[:, order] = result
    return back, weak


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize(("size", "symmetric"), [(16, False), (20, True), (None, False)])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_equals_reference(order, size, symmetric, count):
    weight, gram = problem()
    grid = grid_of(3, size, symmetric)
    visited = list(range(COLUMNS)) if order == "natural" else gram.diagonal().argsort(descending=True).tolist()
    expected, weak = reference(weight, gram, grid, count, visited)
    result = owq(weight, gram, grid, count, order=order, storage_dtype=torch.float32)
    assert result.patch.index.tolist() == weak and result.patch.index.dtype == torch.int32
    assert ((result.dense().double() - expected).abs() > 1e-4).double().mean() < 0.01


def test_worked_example():
    class Whole(IntegerGrid):
        def fit(self, weight):
            return torch.ones(weight.shape[:-1]), torch.zeros(weight.shape[:-1])

    whole = Whole(8, None, True, "narrow", torch.float32)
    weight, gram = torch.tensor([[0.6, 0.8]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    result = owq(weight, gram, whole, 1, damping=0, storage_dtype=torch.float32)
    assert result.patch.index.tolist() == [0]
    torch.testing.assert_close(result.dense(), torch.tensor([[0.5, 1.0]]))
    assert naive.loss(weight, result.dense(), gram) == pytest.approx(0.02, rel=1e-4)


def test_weak_columns_make_up_for_the_others():
    weight, gram = problem()
    result = owq(weight, gram, grid_of(), 4)
    index = result.patch.index.long()
    assert not torch.allclose(result.dense()[:, index], weight[:, index], atol=1e-3)
    frozen = result.dense()
    frozen[:, index] = weight[:, index]
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, frozen, gram)


def test_scales_do_not_see_weak_columns():
    weight, gram = problem()
    weight[:, 1] *= 30  # the column with ten times larger inputs
    result = owq(weight, gram, grid_of(), 1)
    assert result.patch.index.tolist() == [1]
    assert result.base.scale[:, 0].float().max() < 5 * result.base.scale[:, 1:].float().max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [16, None, "tensor"])
def test_loses_less_than_gptq(seed, size):
    weight, gram = problem(seed)
    before = naive.loss(weight, gptq(weight, gram, grid_of(3, size)).dense(), gram)
    few, many = (naive.loss(weight, owq(weight, gram, grid_of(3, size), count).dense(), gram) for count in (2, 8))
    assert many < few < before


def test_loses_less_than_gptq_with_as_many_bits():
    """A few columns buy more than smaller groups when some inputs are much larger than the others."""
    inputs = naive.correlated(512, 128)
    inputs[:, [3, 50, 77]] *= 20
    weight, gram = naive.random_weight(96, 128), inputs.T @ inputs
    ours, theirs = owq(weight, gram, grid_of(3, 64), 3), gptq(weight, gram, IntegerGrid(3, 32, False))
    assert ours.nbytes() < theirs.nbytes() + 4 * 96 * 6
    assert naive.loss(weight, ours.dense(), gram) < 0.9 * naive.loss(weight, theirs.dense(), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "target"), [((96, 200), 3.2), ((40, 64), 3.6), ((512, 576), 3.06)])
def test_budget_is_kept_and_used(dtype, shape, target):
    options = OWQOptions(target_bits=target)
    columns = options.for_matrix(shape, dtype).columns
    rows, inputs = shape

    def bits(count):
        return 3 + count * (rows * 8 * dtype.itemsize + 32) / (rows * inputs)

    assert bits(columns) <= target < bits(columns + 1)


@pytest.mark.parametrize(("size", "symmetric"), [(16, False), (20, True), ("channel", False)])
def test_bytes_are_those_of_the_plan(size, symmetric):
    weight, _ = problem()
    options = OWQOptions(group_size=size, symmetric=symmetric, target_bits=4).for_matrix(weight.shape, torch.bfloat16)
    statistic = Gram(COLUMNS)
    statistic.update(naive.correlated(256, COLUMNS))
    result = linear(LinearInput(weight, {Gram: statistic}), options)
    scheme = options.scheme(Scheme(), torch.bfloat16)
    assert isinstance(result.patch, Columns) and result.patch.index.numel() == scheme.columns == options.columns
    target, module = FORMATS["native"], spec(ROWS, COLUMNS)
    packed = target.pack(module, scheme, result, torch.bfloat16)
    assert sum(tensor.nbytes for tensor in packed.values()) == target.nbytes(module, scheme, torch.bfloat16)
    assert torch.equal(target.unpack(module, scheme, packed.__getitem__).dense(), result.dense())


def test_options_refuse_what_cannot_be():
    for keys in ({}, {"columns": 4, "target_bits": 3.5}):
        with pytest.raises(ValueError, match="either `columns` or `target_bits`"):
            OWQOptions(**keys)
    with pytest.raises(ValueError, match=r"no room for a dense column.*raise it to 3\.03"):
        OWQOptions(target_bits=3.01).for_matrix((4096, 576), torch.bfloat16)
    OWQOptions(target_bits=3.03).for_matrix((4096, 576), torch.bfloat16)
    for wrong in ({"columns": 48}, {"target_bits": 25}):
        with pytest.raises(ValueError, match="leave none of its 48 inputs"):
            OWQOptions(**wrong).for_matrix((12, 48), torch.bfloat16)
    with pytest.raises(ValueError, match="pruned"):
        OWQOptions(columns=2).scheme(Scheme(sparsity=0.5), torch.bfloat16)


def test_sensitivity_needs_both_factors():
    """An active column that lies on the grid is not weak; neither is a badly rounded one that sees no input."""
    weight = torch.tensor([[3.0, 1.4, 2.4]])
    grid = IntegerGrid(3, None, True, "narrow", torch.float32)
    assert weak_columns(weight, torch.tensor([9.0, 1.0, 0.01]), grid, 1).tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_dead_columns(tokens):
    inputs = naive.correlated(max(tokens, 1), COLUMNS)[:tokens]
    inputs[:, [0, 17]] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        result = owq(naive.random_weight(ROWS, COLUMNS), inputs.T @ inputs, grid_of(), 2).dense()
    assert torch.isfinite(result).all()
    if tokens:
        assert (result[:, [0, 17]] == 0).all()


@pytest.mark.parametrize("fill", [0.0, 0.7, 1e-41])
def test_constant_weights(fill):
    _, gram = problem()
    weight = torch.full((ROWS, COLUMNS), fill)
    torch.testing.assert_close(owq(weight, gram, IntegerGrid(4, 8, False), 2).dense(), weight, rtol=0.3, atol=1e-30)


def test_input_tensors_are_left_alone():
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    owq(weight, gram, grid_of(), 3)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
