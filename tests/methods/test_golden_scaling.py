"""Agreement with the authors' code for AWQ, SmoothQuant, AutoRound, ZeroQuant, LUT-GEMM and LLM.int8().

Numbers that it gave once on the seeded layer of `golden_problem`, in fp32 on CPU: mit-han-lab/llm-awq at d6e797a,
mit-han-lab/smoothquant at c61476d, auto-round 0.15.1, deepspeedai/DeepSpeed at edaa722, naver-aics/lut-gemm at 647d49f,
bitsandbytes 0.50 (fp16). Token-wise inputs of DeepSpeed are not compared: their step is max|x| / 128, ours / 127.5.
"""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from golden_problem import golden_problem, sampled
from penjing.methods.base import BlockTask, Call, LinearInput
from penjing.methods.quantization import llm_int8
from penjing.methods.quantization.autoround import AutoRoundOptions, learn
from penjing.methods.quantization.awq import awq
from penjing.methods.quantization.bcq import BCQOptions, bcq, linear
from penjing.methods.quantization.rtn import rtn
from penjing.methods.quantization.smoothquant import smoothquant
from penjing.numerics.binary_coding import BinaryGrid, greedy
from penjing.numerics.clipping import clip_limits
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Scheme
from penjing.runtime import runner_for

WEIGHT, INPUTS = golden_problem()


def dense_linear(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


class Attention(nn.Module):
    """One head, without a mask."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (dense_linear(rows) for rows in WEIGHT.split(32))
        self.output = dense_linear(WEIGHT[:64, :32])

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).T / 32**0.5).softmax(-1)
        return self.output(weights @ self.value(x))


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (dense_linear(rows) for rows in WEIGHT.split(48))
        self.down = dense_linear(WEIGHT[:64, :48])

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


AWQ_SCALES = [
    (4, "attention", 159.344909, [0.623502, 1.734264, 0.615182, 0.617796]),
    (4, "mlp", 167.893158, [0.657104, 1.631349, 0.649303, 0.651756]),
    (4, "down", 42.711122, [0.754885, 0.956699, 0.784196, 1.536773]),
    (3, "attention", 159.344909, [0.623502, 1.734264, 0.615182, 0.617796]),
    (3, "mlp", 151.2542, [0.591619, 1.843672, 0.582853, 0.585607]),
    (3, "down", 43.82187, [0.809861, 0.967345, 0.833333, 1.380249]),
]
"""Bits, what is run (groups of 16), sum of the best scales, those of inputs 0, 1, 5 and 40."""

AWQ_LIMITS = [
    (4, 64, 30.747012, 161, [0.127649, 0.132147, 0.122409, 0.156312], 2509.3598, 639.738859),
    (3, 64, 27.129443, 234, [0.089355, 0.105717, 0.097927, 0.148496], 10192.7534, 622.943045),
    (3, 32, 51.916724, 430, [0.082972, 0.074807, 0.095454, 0.08033], 8426.64, 625.211136),
]
"""Bits, group, sum of the limits of 64 rows, how many clip, some of them; the clipped and rounded weight's output loss
and sum of magnitudes."""


@pytest.mark.parametrize(("bits", "what", "total", "some"), AWQ_SCALES)
def test_awq_finds_the_authors_scales(bits, what, total, some):
    attention, mlp = Attention(), Gated()
    with torch.no_grad():
        inner = silu(mlp.gate(INPUTS)) * mlp.up(INPUTS)
    linears, inside, inputs = {
        "attention": ([attention.query, attention.key, attention.value], attention, INPUTS),
        "mlp": ([mlp.gate, mlp.up], mlp, INPUTS),
        "down": ([mlp.down], mlp.down, inner),
    }[what]
    grid = IntegerGrid(bits, 16, False, scale_dtype=torch.float32)
    scale = awq(inputs.abs().mean(0), linears, inside, [Call((inputs,), {})], grid)
    assert float(scale.double().sum()) == pytest.approx(total, rel=1e-6)
    assert scale[[0, 1, 5, 40]].tolist() == pytest.approx(some, abs=2e-6)


@pytest.mark.parametrize(("bits", "size", "total", "clipped", "some", "loss", "magnitude"), AWQ_LIMITS)
def test_awq_clips_where_the_authors_do(bits, size, total, clipped, some, loss, magnitude):
    weight, grid = WEIGHT[:64], IntegerGrid(bits, size, False, scale_dtype=torch.float32)
    limits = clip_limits(weight, INPUTS[::2], grid)
    assert float(limits.double().sum()) == pytest.approx(total, rel=1e-6)
    assert int((limits < 0.999 * weight.view(64, -1, size).abs().amax(-1)).sum()) == clipped
    assert [float(limits[place]) for place in ((0, 0), (5, 1), (40, 3), (63, 2))] == pytest.approx(some, abs=1e-6)
    limits = grid.spread(limits, 256)
    result = rtn(weight.clamp(-limits, limits), grid).dense()
    assert float(((weight - result) @ INPUTS.T).double().square().sum()) == pytest.approx(loss, rel=1e-4)
    assert float(result.double().abs().sum()) == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "total", "some"),
    [
        (0.5, 2086.3442, [7.262089, 22.444105, 9.653467, 8.709393, 7.617382]),
        (0.85, 2256.984254, [7.81269, 55.169548, 9.406427, 9.598113, 7.353104]),
    ],
)
def test_smoothquant(alpha, total, some):
    scale = smoothquant(INPUTS.abs().amax(0), WEIGHT.abs().amax(0), alpha)
    assert float(scale.double().sum()) == pytest.approx(total, rel=1e-6)
    assert scale[[0, 1, 7, 100, 255]].tolist() == pytest.approx(some, rel=1e-6)


AUTOROUND = [
    (4, [0.269288, 0.248896, 0.238523, 0.229385, 0.221509, 0.213952, 0.217564, 0.218992], 1064.18692, -0.20062505),
    (3, [1.083275, 1.01615, 0.977582, 0.941817, 0.92986, 0.904465, 0.903641, 0.881002], 1064.95608, -0.41062506),
    (2, [3.741674, 3.588905, 3.467036, 3.329664, 3.288383, 3.225395, 3.258833, 3.197101], 829.188862, -0.82125011),
]
"""Bits, the losses of 8 steps (groups of 64, rate 0.02 at first), sums of magnitudes and scales at the best."""


@pytest.mark.parametrize(("bits", "losses", "magnitude", "scales"), AUTOROUND)
def test_autoround_takes_the_authors_steps(bits, losses, magnitude, scales):
    """`WrapperLinear` with their SignSGD and linear schedule on one linear and all tokens.

    They clip both ends of a group and take the larger, which may change from step to step; one large weight per group
    keeps it the same, so that one factor is enough.
    """
    found = []
    weight = WEIGHT.clone()
    weight[:, ::64] = 0.3 * weight[:, ::64].sign()

    def run(states, given):
        output = states @ given["linear"].T
        found.append(float((output.detach() - targets).square().mean()))
        return output

    inputs = INPUTS.unsqueeze(0)
    targets = inputs @ weight.T
    task = BlockTask({"linear": weight}, {}, run, inputs, targets, {}, torch.float32)
    options = AutoRoundOptions(bits=bits, group_size=64, iterations=8, batch_size=1, learning_rate=0.02)
    result = learn(task, options)["linear"]
    assert found == pytest.approx(losses, rel=1e-4)
    assert float(result.dense().double().abs().sum()) == pytest.approx(magnitude, rel=1e-6)
    assert float(result.scale.double().sum()) == pytest.approx(scales, abs=1e-5)


@pytest.mark.parametrize(
    ("bits", "size", "error", "magnitude", "some"),
    [
        (8, 64, 0.0023108847, 968.413497, [0.087759, -0.026777, 0.061374, -0.053293, -0.051766]),
        (4, 64, 0.6009602754, 960.301779, [0.095737, -0.024482, 0.056927, -0.047372, -0.059161]),
        (4, 256, 0.7646032907, 961.771254, [0.095737, -0.018716, 0.060384, -0.055287, -0.056137]),
    ],
)
def test_zeroquant_rounds_groups_as_deepspeed_does(bits, size, error, magnitude, some):
    result = rtn(WEIGHT, IntegerGrid(bits, size, True, "wide", torch.float32)).dense()
    assert float((WEIGHT - result).double().square().sum()) == pytest.approx(error, rel=1e-5)
    assert float(result.double().abs().sum()) == pytest.approx(magnitude, rel=1e-6)
    assert sampled(result) == pytest.approx(some, abs=1e-6)


@pytest.mark.parametrize(
    ("bits", "some", "total"),
    [(2, [0.789308, 0.442597], 485.948775), (3, [0.789308, 0.442597, 0.265533], 586.925404)],
)
def test_greedy_binary_codes(bits, some, total):
    alpha = greedy(20 * WEIGHT.view(-1, 64), bits).alpha
    assert float(alpha.double().sum()) == pytest.approx(total, rel=1e-6)
    assert alpha[5 * 4 + 1].tolist() == pytest.approx(some, abs=1e-6)


@pytest.mark.parametrize(("bits", "size", "error"), [(2, 64, 2693.475), (3, 64, 812.5397), (4, 128, 258.0148)])
def test_alternating_binary_codes_are_as_close_as_the_authors(bits, size, error):
    """Squared error after 15 rounds; theirs go from greedy codes and ours from nearest ones, so that optima differ."""
    weight = 20 * WEIGHT
    found = bcq(weight, BinaryGrid(bits, size, torch.float32), rounds=15).dense()
    assert float((weight - found).double().square().sum()) <= 1.01 * error


def test_uniform_grids_become_the_authors_binary_codes():
    options = BCQOptions(bits=3, group_size=64, levels="uniform", objective="weights", offset=True)
    coded = linear(LinearInput(WEIGHT, {}, storage_dtype=torch.float32), options)
    assert float(coded.alpha.double().sum()) == pytest.approx(44.739502, rel=1e-6)
    assert float(coded.offset.double().sum()) == pytest.approx(0.1144707, abs=1e-5)
    signs = sum(2 * (coded.codes.long() >> plane & 1) - 1 for plane in range(3))
    assert int(signs.sum()) == 172


@torch.no_grad()
def test_llm_int8_multiplies_as_bitsandbytes_does():
    """`Linear8bitLt`, threshold 6, one column of outliers; what fp16 loses bounds the difference.

    They leave only outlying entries out of a token's scale, not the whole column: here it has nothing else.
    """
    weight, inputs = WEIGHT.half().float(), (INPUTS / INPUTS[:, 2:].std())[:64]
    inputs[:, 1] += 6 * inputs[:, 1].sign()
    inputs = inputs.half().float()
    options = llm_int8.LLMInt8Options(threshold=6.0)
    coded = llm_int8.linear(LinearInput(weight, {}, storage_dtype=torch.float32), options)
    runner = runner_for(dense_linear(weight), options.scheme(Scheme(), torch.float32), coded)
    output = runner(inputs)
    assert int((inputs.abs() >= 6).any(0).sum()) == 1
    assert float(output.double().square().sum()) == pytest.approx(7763.3847, rel=1e-4)
    places = ((0, 0), (5, 7), (40, 90), (63, 95), (20, 30))
    expected = [1.05371, -0.62549, 0.38745, -3.27344, -0.49683]
    assert [float(output[place]) for place in places] == pytest.approx(expected, abs=1e-3)
