"""Agreement with the authors' code for GPTQ, SparseGPT, Wanda, SpQR and OWQ: numbers it gave once on seeded inputs.

Run with IST-DASLab/gptq at 2d65066, IST-DASLab/sparsegpt at 147d215, locuslab/wanda at 8e8fc87, Vahe1994/SpQR at
543d10e and xvyaward/owq at 03cfc99 (without its search for the scale), in fp32 on CPU. Two habits are matched by the
arguments: GPTQ's group scales miss the updates of the block in progress, so its block size was the group size;
unstructured SparseGPT removes one weight more per block than the fraction says.
"""

import pytest
import torch

from golden_problem import golden_problem
from golden_problem import sampled as entries
from penjing.methods.pruning.sparsegpt import sparsegpt
from penjing.methods.pruning.wanda import wanda
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.owq import owq
from penjing.methods.quantization.spqr import spqr
from penjing.numerics.bilevel import BilevelGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Patched


@pytest.fixture(scope="module")
def problem():
    return golden_problem()


def check(result, problem, loss, magnitude, sampled):
    """The output loss ||(W - Q) X||^2, the sum of magnitudes and some entries."""
    weight, inputs = problem
    found = float(((weight - result) @ inputs.T).double().square().sum())
    assert found == pytest.approx(loss, rel=1e-4)
    assert float(result.double().abs().sum()) == pytest.approx(magnitude, rel=1e-5)
    assert entries(result) == pytest.approx(sampled, abs=1e-6)


GPTQ = [
    (4, False, None, "natural", False, 2501.011, 976.77776, [0.082269, -0.037835, 0.055936, -0.056525, -0.054222]),
    (3, True, None, "natural", False, 13559.25, 1006.4489, [0.072943, 0.0, 0.092014, -0.042124, -0.042771]),
    (4, False, 64, "natural", False, 1743.949, 971.53349, [0.080379, -0.035671, 0.062404, -0.062198, -0.048332]),
    (3, False, 32, "natural", False, 6827.499, 987.69965, [0.103345, -0.025479, 0.066473, -0.057936, -0.043749]),
    (4, True, 64, "natural", False, 2233.304, 973.66748, [0.0851, -0.026114, 0.064007, -0.054072, -0.07629]),
    (3, False, 64, "activation", True, 8053.14, 984.5247, [0.068896, -0.025479, 0.064445, -0.069115, -0.032158]),
    (2, False, 64, "activation", True, 48832.37, 1052.6533, [0.080379, -0.118902, 0.075186, -0.080634, -0.075036]),
    (4, False, None, "activation", False, 2370.555, 979.73476, [0.098723, -0.037835, 0.055936, -0.056525, -0.036148]),
]
SPARSEGPT = [
    (0.5, None, None, 19144.04, 786.23198, [0.088203, 0.0, 0.070781, -0.0626, -0.054065]),
    (0.7, None, None, 71316.2, 596.35198, [0.088203, 0.0, 0.07471, -0.034364, 0.0]),
    (None, "2:4", None, 31200.66, 778.47134, [0.088203, 0.0, 0.031417, -0.057251, -0.073565]),
    (None, "4:8", None, 22743.69, 790.88462, [0.088203, 0.0, 0.057879, -0.025953, -0.062674]),
    (0.5, None, 4, 21235.71, 788.18411, [0.082269, 0.0, 0.074582, -0.056525, -0.054222]),
    (None, "2:4", 4, 33719.75, 782.29412, [0.082269, -0.056752, 0.055936, -0.018842, -0.072296]),
]
WANDA = [
    (0.5, None, [1558, 1530, 1536, 1536, 1538, 1528, 1504, 1558], 772.11665),
    (0.7, None, [956, 910, 929, 908, 929, 900, 933, 927], 566.78286),
    (None, "2:4", [1536, 1536, 1536, 1536, 1536, 1536, 1536, 1536], 722.89789),
    (None, "4:8", [1536, 1536, 1536, 1536, 1536, 1536, 1536, 1536], 745.94538),
]
"""Sparsity, pattern, weights kept in every 32 columns, sum of their magnitudes. The masks were equal bit by bit."""

SPQR = [
    (3, 16, "activation", 0.2, 16, 4788.675, 976.77508, [0.097424, -0.027519, 0.059554, -0.060966, -0.058166], 414),
    (3, 16, "natural", 0.2, 16, 4867.517, 980.19868, [0.094307, -0.030831, 0.064292, -0.054875, -0.05778], 410),
    (3, 16, "activation", None, 16, 7159.036, 982.0294, [0.077426, -0.020898, 0.050788, -0.054787, -0.056385], 0),
    (4, 16, "activation", 0.2, 16, 1507.494, 968.65072, [0.09231, -0.02492, 0.057654, -0.053475, -0.043722], 35),
    (3, 8, "activation", 0.1, 32, 3405.33, 969.49519, [0.096059, -0.024861, 0.056006, -0.052075, -0.059693], 687),
    (2, 32, "natural", 0.5, 16, 29956.5, 1045.206, [0.113557, -0.023439, 0.037049, -0.036614, -0.062002], 372),
]
OWQ = [
    (3, [1, 214], 10725.61, 971.37513, [0.105774, -0.040537, 0.068876, -0.040375, -0.03873]),
    (3, [1, 12, 25, 61, 214, 247], 10324.73, 974.43995, [0.105774, -0.040537, 0.068876, -0.040375, -0.036641]),
    (4, [1, 61, 112, 186], 2288.997, 970.87057, [0.082269, -0.018917, 0.064284, -0.056525, -0.054222]),
]


@pytest.mark.parametrize(("bits", "symmetric", "size", "order", "static", "loss", "magnitude", "sampled"), GPTQ)
def test_gptq(problem, bits, symmetric, size, order, static, loss, magnitude, sampled):
    weight, inputs = problem
    grid = IntegerGrid(bits, size, symmetric, "full", torch.float32)
    result = gptq(weight, inputs.T @ inputs, grid, order=order, static_groups=static)
    check(result.dense(), problem, loss, magnitude, sampled)


@pytest.mark.parametrize(("sparsity", "pattern", "bits", "loss", "magnitude", "sampled"), SPARSEGPT)
def test_sparsegpt(problem, sparsity, pattern, bits, loss, magnitude, sampled):
    weight, inputs = problem
    block = 96 * 128
    if sparsity:
        sparsity = (int(sparsity * block) + 1) / block
    grid = IntegerGrid(bits, None, False, "full", torch.float32) if bits else None
    result = sparsegpt(weight, inputs.T @ inputs, sparsity, pattern=pattern, grid=grid, storage_dtype=torch.float32)
    check(result.dense(), problem, loss, magnitude, sampled)


@pytest.mark.parametrize(("sparsity", "pattern", "counts", "magnitude"), WANDA)
def test_wanda(problem, sparsity, pattern, counts, magnitude):
    weight, inputs = problem
    kept = wanda(weight, inputs.square().sum(0), sparsity, pattern=pattern).kept
    assert [int(part.sum()) for part in kept.split(32, 1)] == counts
    assert float((weight.abs() * kept).double().sum()) == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize(("bits", "size", "order", "threshold", "rows", "loss", "total", "sampled", "outliers"), SPQR)
def test_spqr(problem, bits, size, order, threshold, rows, loss, total, sampled, outliers):
    weight, inputs = problem
    grid = BilevelGrid(bits, size, 3, rows, torch.float32)
    result = spqr(weight, inputs.T @ inputs, grid, order=order, threshold=threshold, outliers=0)
    assert (result.patch.index.numel() if isinstance(result, Patched) else 0) == outliers
    check(result.dense(), problem, loss, total, sampled)


@pytest.mark.parametrize(("bits", "weak", "loss", "total", "sampled"), OWQ)
def test_owq(problem, bits, weak, loss, total, sampled):
    weight, inputs = problem
    grid = IntegerGrid(bits, None, False, "full", torch.float32)
    result = owq(weight, inputs.T @ inputs, grid, len(weak), order="natural", storage_dtype=torch.float32)
    assert result.patch.index.tolist() == weak
    check(result.dense(), problem, loss, total, sampled)
