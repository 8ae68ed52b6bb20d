"""Statistics against their definition in fp64, in pieces, in bf16, and rescaled."""

import pytest
import torch

import naive
from penjing.numerics.precision import holding
from penjing.statistics import AbsMax, ColumnNorm, CosineChange, CrossGram, Gram, MeanAbs, TokenSample

DEFINITIONS = {
    Gram: lambda x: x.T @ x,
    ColumnNorm: lambda x: x.square().sum(0),
    AbsMax: lambda x: x.abs().amax(0),
    MeanAbs: lambda x: x.abs().mean(0),
}


def in_pieces(statistic, inputs, sizes=(1, 30, 7)):
    for part in inputs.split([*sizes, len(inputs) - sum(sizes)]):
        statistic.update(part)
    return statistic


@pytest.mark.parametrize("kind", DEFINITIONS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_definition_in_pieces(kind, dtype):
    inputs = naive.correlated(100, 20).to(dtype)
    statistic = in_pieces(kind(20), inputs)
    expected = DEFINITIONS[kind](inputs.double())
    assert statistic.value.dtype == torch.float32 and statistic.tokens == 100
    scale = float(expected.abs().max())
    torch.testing.assert_close(statistic.value.double(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_gram_of_nearly_equal_inputs_in_bf16_is_positive_definite():
    """Rounding sums to bf16 would move eigenvalues by a hundred times the least one."""
    generator = torch.Generator().manual_seed(0)
    inputs = (8 + torch.randn(4096, 64, generator=generator)).bfloat16()
    gram = in_pieces(Gram(64), inputs, (512,) * 7)
    expected = torch.linalg.eigvalsh(inputs.double().T @ inputs.double())
    torch.testing.assert_close(torch.linalg.eigvalsh(gram.value.double()), expected, rtol=1e-3, atol=0)


def test_differences_in_bf16_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    inputs, lost = ((8 + torch.randn(4096, 32, generator=generator)).bfloat16() for _ in range(2))
    statistic = CrossGram(32)
    statistic.compare(inputs, lost)
    torch.testing.assert_close(statistic.value.sum(0).double(), lost.double().T @ inputs.double(), rtol=1e-5, atol=0)


def test_other_products_keep_their_precision():
    matmul, inputs = torch.backends.mkldnn.matmul, torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    before = matmul.fp32_precision
    with pytest.raises(RuntimeError, match="shapes"), holding(torch.bfloat16):
        inputs @ inputs
    assert matmul.fp32_precision == before
    with holding(torch.float32):
        torch.testing.assert_close((inputs @ inputs.T).double(), inputs.double() @ inputs.double().T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 5, 16, 37])
@pytest.mark.parametrize("strip", [1, 8, 16, 384])
def test_gram_does_not_depend_on_the_strip(columns, strip):
    inputs = torch.randn(60, columns, generator=torch.Generator().manual_seed(0))
    gram = in_pieces(Gram(columns, strip=strip), inputs)
    assert torch.equal(gram.value, gram.value.T)
    torch.testing.assert_close(gram.value.double(), inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-4)


def test_gram_may_be_read_between_updates():
    inputs = naive.correlated(60, 37)
    gram = Gram(37, strip=16)
    gram.update(inputs[:20])
    assert torch.equal(gram.value, gram.value.T)
    gram.update(inputs[20:])
    torch.testing.assert_close(gram.value, inputs.T @ inputs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", [*DEFINITIONS, TokenSample], ids=lambda kind: kind.__name__)
def test_rescaling_equals_collecting_again(kind):
    inputs = naive.correlated(100, 20)
    scale = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.5
    rescaled = in_pieces(kind(20), inputs)
    rescaled.rescale(scale)
    again = in_pieces(kind(20), inputs / scale)
    torch.testing.assert_close(rescaled.value, again.value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [*DEFINITIONS, TokenSample], ids=lambda kind: kind.__name__)
def test_updates_after_rescaling_are_of_the_new_inputs(kind):
    inputs = naive.correlated(100, 20)
    scale = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.5
    mixed = kind(20)
    mixed.update(inputs[:50])
    mixed.rescale(scale)
    mixed.update(inputs[50:] / scale)
    whole = kind(20)
    whole.update(inputs[:50] / scale)
    whole.update(inputs[50:] / scale)
    torch.testing.assert_close(mixed.value, whole.value, rtol=1e-4, atol=1e-3)


def test_nothing_seen_is_zero_and_finite():
    for kind in DEFINITIONS:
        statistic = kind(4)
        assert statistic.tokens == 0 and (statistic.value == 0).all()
    assert TokenSample(4).value.shape == (0, 4)


def test_token_sample_is_even_and_bounded():
    inputs = torch.arange(1000.0).unsqueeze(1).expand(-1, 3)
    sample = TokenSample(3, limit=25, per_call=10)
    for part in inputs.split(200):
        sample.update(part)
    values = sample.value[:, 0].tolist()
    assert len(values) == 25 and sample.tokens == 1000
    assert values[0] == 0 and values[9] == 199 and values[10] == 200, "the first and last token of every call"
    gaps = torch.tensor(values[:10]).diff()
    assert gaps.max() - gaps.min() <= 1


def test_token_sample_of_short_calls_takes_everything():
    inputs = naive.correlated(12, 5).bfloat16()
    sample = TokenSample(5, limit=100, per_call=8)
    for part in inputs.split(4):
        sample.update(part)
    assert sample.value.dtype == torch.bfloat16 and torch.equal(sample.value, inputs)


def test_cosine_change():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, -1.0]])
    change = CosineChange()
    assert change.value == 0.0
    change.update(before[:1], after[:1])
    assert change.value == pytest.approx(0.0, abs=1e-6)
    change.update(before[1:], after[1:])
    assert change.value == pytest.approx((0 + 1 + 2) / 3, abs=1e-6)


def test_cosine_change_weighs_tokens_not_calls():
    before, after = naive.correlated(50, 8), naive.correlated(50, 8, seed=3)
    pieces = CosineChange()
    for first, second in zip(before.split([5, 45]), after.split([5, 45]), strict=True):
        pieces.update(first, second)
    expected = 1 - torch.cosine_similarity(before.double(), after.double(), dim=1)
    assert pieces.value == pytest.approx(float(expected.mean()), rel=1e-5)
