"""SpQR against elimination in fp64, shares of outliers, ragged shapes, thin statistics, bytes."""

import math
import warnings

import pytest
import torch

import naive
from format_cases import spec
from penjing.errors import FormatError
from penjing.formats import FORMATS
from penjing.methods.base import LinearInput
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.spqr import OutlierWarning, SpQROptions, linear, spqr
from penjing.numerics.bilevel import BilevelGrid, savings
from penjing.numerics.cholesky import DampingWarning
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Bilevel, Patched, Scheme
from penjing.statistics import Gram

GRID = BilevelGrid(scale_dtype=torch.float32)


def problem(rows=32, columns=48, seed=0, tokens=256):
    """Weights with some large ones, correlated inputs."""
    inputs = naive.correlated(tokens, columns, seed=seed)
    weight = naive.random_weight(rows, columns, seed=seed + 100)
    large = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.98
    return weight * (1 + 4 * large), inputs.T @ inputs


def reference(weight, gram, grid, threshold):
    """Column by column in fp64 by elimination, natural order: values and outliers."""
    rows, columns = weight.shape
    hessian = naive.damped(gram, 1.0)
    pivots, ahead = [], torch.linalg.inv(hessian)
    for j in range(columns):
        pivots.append(float(ahead[j, j]))
        ahead = ahead - torch.outer(ahead[:, j], ahead[j]) / ahead[j, j]
    harm = 1 / torch.tensor(pivots, dtype=torch.float64).unsqueeze(1)
    limit = threshold * float((weight.double().var(0).unsqueeze(1) * harm).mean())
    outliers, fitted = torch.zeros(rows, columns, dtype=torch.bool), {}

    def fix(column, current, inverse):
        if column % grid.group_size == 0:
            members = current[:, column : column + grid.group_size].T
            ours = savings(members.float(), harm[column : column + grid.group_size].float(), grid).double() > limit
            low = torch.where(ours, math.inf, members).amin(0)
            high = torch.where(ours, -math.inf, members).amax(0)
            low, high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
            numbers = ((high - low) / grid.high, -low / ((high - low) / grid.high))
            for kind, values in enumerate(numbers):
                for first in range(0, rows, grid.statistic_group):
                    some = values[first : first + grid.statistic_group]
                    step = (some.max() - some.min()) / (2**grid.statistic_bits - 1)
                    fitted[kind, first] = torch.round((some - some.min()) / step) * step + some.min()
        scale, zero = (
            torch.cat([fitted[kind, first] for first in range(0, rows, grid.statistic_group)]) for kind in (0, 1)
        )
        values = current[:, column]
        rounded = scale * (torch.round(values / scale + zero).clamp(0, grid.high) - zero)
        outliers[:, column] = (values - rounded) ** 2 * harm[column] > limit
        return torch.where(outliers[:, column], values, rounded)

    return naive.eliminate(weight, hessian, fix)[0], outliers


@pytest.mark.parametrize("threshold", [0.05, 0.2, 1e9])
@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (37, 48), (32, 50)])
def test_natural_order_equals_reference(threshold, rows, columns):
    weight, gram = problem(rows, columns)
    expected, outliers = reference(weight, gram, GRID, threshold)
    result = spqr(weight, gram, GRID, threshold=threshold, order="natural")
    different = (result.dense().double() - expected).abs() > 1e-4
    assert different.double().mean() < 0.01
    assert result.patch.index.numel() == pytest.approx(int(outliers.sum()), abs=max(2, 0.03 * int(outliers.sum())))
    assert result.base.group_index is None


@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (21, 50), (5, 7), (16, 16)])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_any_shape_is_coded_as_promised(order, rows, columns, outliers):
    weight, gram = problem(rows, columns)
    options = SpQROptions(order=order, outliers=outliers)
    result = spqr(weight, gram, options.grid(torch.bfloat16), order=order, outliers=outliers)
    scheme = options.scheme(Scheme(), torch.bfloat16)
    assert isinstance(result, Patched if outliers else Bilevel)
    base = result.base if isinstance(result, Patched) else result
    assert (base.group_index is not None) == scheme.ordered == (order == "activation")
    groups, row_groups = -(-columns // 16), -(-rows // 16)
    assert base.statistics.codes.shape == (2, groups, rows) and base.statistics.step.shape == (2, groups, row_groups)
    assert int(base.codes.max()) <= 7 and int(base.statistics.codes.max()) <= 7
    assert naive.loss(weight, result.dense(), gram) < 0.2 * naive.loss(weight, torch.zeros_like(weight), gram)

    target, module = FORMATS["native"], spec(rows, columns)
    packed = target.pack(module, scheme, result, torch.bfloat16)
    written = sum(tensor.nbytes for tensor in packed.values())
    found = result.patch.index.numel() if outliers else 0
    planned = target.nbytes(module, scheme, torch.bfloat16)
    assert written - planned == 4 * (found - round(outliers * rows * columns)), "exact but for the number of outliers"
    assert written - packed[f"{module.name}.weight_header"].nbytes == result.nbytes()
    back = target.unpack(module, scheme, packed.__getitem__)
    assert torch.equal(back.dense(), result.dense())


def test_bits_per_weight_at_the_sizes_of_the_paper():
    weight, gram = problem(64, 128)
    assert spqr(weight, gram, BilevelGrid(), outliers=0, order="natural").nbytes() * 8 == 3.625 * weight.numel()


def test_outliers_keep_their_value_and_the_rest_lies_on_the_grid():
    weight, gram = problem()
    result = spqr(weight, gram, BilevelGrid(), outliers=0.02)
    assert result.patch.values.dtype == torch.bfloat16
    assert int((result.dense() != result.base.dense()).sum()) <= result.patch.index.long().numel()
    change = (result.dense() - weight).abs()
    rows = torch.arange(32).repeat_interleave(result.patch.starts.diff())
    assert change[rows, result.patch.index.long()].mean() < change.mean(), "moved by the sweep, but not rounded"


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_asked_share_is_met(share, seed):
    weight, gram = problem(128, 96, seed)
    found = spqr(weight, gram, GRID, outliers=share).patch.index.numel() / weight.numel()
    assert found == pytest.approx(share, rel=0.2)


def test_more_outliers_lose_less():
    weight, gram = problem(64, 96)
    losses = [naive.loss(weight, spqr(weight, gram, GRID, outliers=share).dense(), gram) for share in (0, 0.01, 0.05)]
    assert losses[0] > losses[1] > losses[2]


def test_loses_less_than_gptq_with_more_bits():
    inputs, weight = naive.correlated(512, 192), naive.random_weight(64, 192)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.995] *= 12
    gram = inputs.T @ inputs
    ours = spqr(weight, gram, BilevelGrid(), outliers=0.005, order="group-activation")
    theirs = gptq(weight, gram, IntegerGrid(3, 16, False))
    assert ours.nbytes() < theirs.nbytes()
    assert naive.loss(weight, ours.dense(), gram) < 0.9 * naive.loss(weight, theirs.dense(), gram)


def test_block_size_changes_nothing():
    weight, gram = problem(columns=50)
    expected = spqr(weight, gram, GRID, threshold=0.2).dense()
    for block in (1, 16, 33):
        found = spqr(weight, gram, GRID, threshold=0.2, block_size=block).dense()
        assert ((found - expected).abs() > 1e-4).double().mean() < 0.01


def test_dead_columns_disturb_nothing_and_have_no_outliers():
    inputs = naive.correlated(256, 48)
    dead = [0, 17, 18]
    inputs[:, dead] = 0
    weight = naive.random_weight(32, 48)
    gram = inputs.T @ inputs
    result = spqr(weight, gram, GRID, threshold=0.1)
    assert torch.isfinite(result.dense()).all() and not set(dead) & set(result.patch.index.tolist())
    changed = weight.clone()
    changed[:, dead] *= 50
    assert torch.equal(spqr(changed, gram, GRID, threshold=0.1).dense(), result.dense())


@pytest.mark.parametrize("fill", [0.0, 0.7, 1e-40])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_constant_weights(fill, outliers):
    _, gram = problem(columns=32)
    weight = torch.full((20, 32), fill)
    result = spqr(weight, gram, GRID, outliers=outliers).dense()
    torch.testing.assert_close(result, weight, rtol=0.3, atol=1e-30)


@pytest.mark.parametrize("columns", [17, 18])
def test_last_groups_of_one_or_two_members(columns):
    weight, gram = problem(columns=columns)
    weight[4] = torch.arange(columns)
    for outliers in (0.02, 0.3):
        result = spqr(weight, gram, GRID, outliers=outliers).dense()
        assert torch.isfinite(result).all()
        assert naive.loss(weight, result, gram) < 0.1 * naive.loss(weight, torch.zeros_like(weight), gram)


def test_one_huge_weight_goes_alone():
    """It makes all others of its group look like outliers."""
    weight, gram = problem()
    weight[3, 5] = 2.0
    result = spqr(weight, gram, GRID, outliers=0.02)
    row = result.patch.index[result.patch.starts[3] : result.patch.starts[4]]
    assert 5 in row.tolist()


def test_a_row_of_zeros_stays_zero_beside_others():
    weight, gram = problem()
    weight[4] = 0
    assert (spqr(weight, gram, BilevelGrid(), outliers=0).dense()[4] == 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_give_finite_results(tokens):
    inputs = naive.correlated(max(tokens, 1), 48)[:tokens]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        result = spqr(naive.random_weight(32, 48), inputs.T @ inputs, GRID, outliers=0.02)
    assert torch.isfinite(result.dense()).all()


def test_rows_can_be_cut_at_row_groups_only():
    weight, gram = problem(40)
    result = spqr(weight, gram, GRID, outliers=0.05)
    for start, stop in ((0, 40), (16, 40), (16, 30), (32, 40)):
        assert torch.equal(result.rows(start, stop).dense(), result.dense()[start:stop])
    with pytest.raises(ValueError, match="multiple of 16"):
        result.rows(3, 16)


def test_a_threshold_off_the_plan_is_told():
    weight, _ = problem()
    statistic = Gram(48)
    statistic.update(naive.correlated(256, 48))
    given = LinearInput(weight, {Gram: statistic}, storage_dtype=torch.float32)
    with pytest.warns(OutlierWarning, match=r"% of the weights are outliers, the plan counted with 0\.10%"):
        linear(given, SpQROptions(threshold=0.05, outliers=0.001))


def test_options_and_plan_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="threshold"):
        SpQROptions(threshold=0.2, outliers=0)
    with pytest.raises(ValueError, match="pruned"):
        SpQROptions().scheme(Scheme(sparsity=0.5), torch.bfloat16)


def test_damaged_file_is_refused():
    weight, gram = problem()
    scheme = SpQROptions().scheme(Scheme(), torch.float32)
    target, module = FORMATS["native"], spec(32, 48)
    packed = target.pack(module, scheme, spqr(weight, gram, GRID), torch.float32)
    for part in ("codes", "statistic_codes", "statistic_step", "outlier_values"):
        name = f"{module.name}.weight_{part}"
        with pytest.raises(FormatError, match=part):
            target.unpack(module, scheme, {**packed, name: packed[name][..., :-1].contiguous()}.__getitem__)


def test_input_tensors_are_left_alone():
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    spqr(weight, gram, GRID, outliers=0.02)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
