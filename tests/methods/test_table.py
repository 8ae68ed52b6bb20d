"""The table of methods, and every linear-level method through the interface the walk uses."""

import re

import pytest
import torch

import naive
from penjing.methods import METHODS
from penjing.methods.base import GridOptions, LinearInput
from penjing.representations import Masked, Quantized, Scheme
from penjing.statistics import AbsMax, ColumnNorm, Gram, MeanAbs, TokenSample

CASES = [
    ("rtn", {"group_size": 16}),
    ("rtn", {"bits": 8, "group_size": "channel", "symmetric": False}),
    ("rtn", {"bits": 2, "group_size": "tensor", "scale_rule": "signed-max"}),
    ("gptq", {"group_size": 16}),
    ("gptq", {"bits": 3, "group_size": 20, "symmetric": False}),
    ("gptq", {"group_size": "channel", "order": "activation"}),
    ("gptq", {"group_size": 16, "order": "activation", "static_groups": False}),
    ("gptq", {"group_size": 20, "order": "group-activation", "static_groups": False}),
    ("gptq", {"group_size": "tensor"}),
    ("rtn", {"bits": 3, "group_size": 20, "scale_search": "diagonal"}),
    ("rtn", {"bits": 3, "group_size": "tensor", "scale_search": "gram", "symmetric": False}),
    ("gptq", {"group_size": 16, "scale_search": "diagonal", "asymmetric": True}),
    ("gptq", {"group_size": 20, "scale_search": "gram", "order": "group-activation", "static_groups": False}),
    ("rtn", {"bits": 3, "group_size": 20, "symmetric": False, "zero": "float"}),
    ("gptq", {"group_size": 16, "symmetric": False, "zero": "float", "scale_search": "diagonal"}),
    ("hqq", {"bits": 3, "group_size": 20}),
    ("hqq", {"group_size": "channel", "weighted": True}),
    ("awq", {"group_size": 16}),
    ("awq", {"group_size": "channel", "symmetric": True, "clip": False}),
    ("magnitude", {"sparsity": 0.5}),
    ("magnitude", {"pattern": "2:4"}),
    ("wanda", {"sparsity": 0.5}),
    ("wanda", {"pattern": "4:8"}),
    ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"pattern": "2:4"}),
    ("sparsegpt", {"sparsity": 0.5, "bits": 4, "group_size": 16}),
    ("sparsegpt", {"pattern": "2:4", "bits": 4, "group_size": "channel", "symmetric": False}),
]


def given_linear(method, options, *, kept=None, dtype=torch.bfloat16, rows=(8, 4)):
    inputs = naive.correlated(128, 48)
    statistics = {kind: kind(48) for kind in method.needs(options)}
    for statistic in statistics.values():
        statistic.update(inputs)
    weight = naive.random_weight(sum(rows), 48)
    parts = tuple((f"part{number}", count) for number, count in enumerate(rows))
    return LinearInput(weight, statistics, kept, dtype, parts)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_the_table_are_complete(name):
    method = METHODS[name]
    assert method.name == name and len(method.summary) > 20
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://", method.paper)
    shapes = (method.linear, method.transform, method.learn, method.tune, method.select, method.rewrite, method.remake)
    assert any(shapes)
    assert method.select is None or method.select.scores().value == 0
    assert all(field.description for field in method.options.model_fields.values())


@pytest.mark.parametrize(("name", "keys"), CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_is_what_the_scheme_promised(name, keys, masked, dtype):
    method = METHODS[name]
    options = method.options(**keys)
    kept = None
    scheme = Scheme()
    if masked:
        kept = naive.random_weight(12, 48).abs() > 0.01
        scheme = Scheme(sparsity=float((~kept).double().mean()))
    before = naive.random_weight(12, 48)
    given = given_linear(method, options, kept=kept, dtype=dtype)
    result = method.linear(given, options)
    scheme = options.scheme(scheme, dtype)

    assert result.shape == given.weight.shape and torch.isfinite(result.dense()).all()
    assert torch.equal(given.weight, before), "the weight belongs to the caller"
    assert isinstance(result, Masked) == (scheme.sparsity > 0)
    values = result.values if isinstance(result, Masked) else result
    if scheme.grid is None:
        assert values.values.dtype == dtype
    else:
        assert isinstance(values, Quantized) and values.grid == scheme.grid
        assert values.codes.dtype == torch.int8 and values.scale.dtype == dtype
        assert values.codes.min() >= scheme.grid.low and values.codes.max() <= scheme.grid.high
        assert (values.zero_point is None) == scheme.grid.symmetric
        assert (values.group_index is not None) == scheme.ordered
        assert values.codes.is_contiguous() and values.scale.is_contiguous()
    if isinstance(result, Masked):
        whole = getattr(scheme.grid, "zero", "integer") == "integer"
        assert not whole or (values.dense()[~result.kept] == 0).all(), "removed weights are zero even without the mask"
        assert (result.dense()[~result.kept] == 0).all()
        assert float((~result.kept).double().mean()) == pytest.approx(scheme.sparsity, abs=0.01)
        if masked:
            assert not (result.kept & ~kept).any()
        if scheme.pattern:
            zeros, of = scheme.pattern
            assert ((~result.kept).view(-1, of).sum(1) >= zeros).all()


@pytest.mark.parametrize(("name", "keys"), CASES, ids=str)
def test_row_wise_methods_do_not_care_what_else_is_stacked(name, keys):
    method = METHODS[name]
    options = method.options(**keys)
    given = given_linear(method, options)
    together = method.linear(given, options)
    parts = [
        method.linear(LinearInput(weight, given.statistics, storage_dtype=torch.bfloat16), options).dense()
        for weight in given.weight.split([8, 4])
    ]
    different = (together.dense() != torch.cat(parts)).double().mean()
    if method.row_wise(options):
        assert different < 0.02, "beyond what another order of summation explains"
    else:
        assert different > 0


def test_group_sizes_are_spelled_as_users_do():
    assert GridOptions(group_size=-1).group_size == "channel"
    assert GridOptions(group_size=-1).grid(torch.float16).group_size is None
    for wrong in (0, 1, -2, "row"):
        with pytest.raises(ValueError, match="group_size"):
            GridOptions(group_size=wrong)


def test_needs_follow_the_options():
    assert METHODS["rtn"].needs(METHODS["rtn"].options()) == ()
    assert METHODS["gptq"].needs(METHODS["gptq"].options()) == (Gram,)
    assert METHODS["awq"].needs(METHODS["awq"].options()) == (MeanAbs, TokenSample)
    assert METHODS["smoothquant"].needs(METHODS["smoothquant"].options()) == (AbsMax,)
    for search, kinds in (("diagonal", (ColumnNorm,)), ("gram", (Gram,))):
        assert METHODS["rtn"].needs(METHODS["rtn"].options(scale_search=search)) == kinds
    assert METHODS["hqq"].needs(METHODS["hqq"].options()) == ()
    assert METHODS["hqq"].needs(METHODS["hqq"].options(weighted=True)) == (ColumnNorm,)
    assert METHODS["wanda"].needs(METHODS["wanda"].options(sparsity=0.5)) == (ColumnNorm,)
