"""Drawing tokens: as often as they are probable, never what is impossible, and the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from penjing.errors import CheckpointError
from penjing.models.reading import draw, drawn


def test_indices_come_up_as_often_as_they_are_probable() -> None:
    shares = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    found = drawn(4 * shares.repeat(50_000, 1), torch.Generator().manual_seed(0))
    counts = torch.bincount(found, minlength=6) / len(found)
    assert counts[shares == 0].sum() == 0
    torch.testing.assert_close(counts, shares, rtol=0, atol=0.01)


def test_rare_tokens_of_a_large_vocabulary_are_not_lost_in_the_sums() -> None:
    """Half of all is one token, the other half are 50,000: sums in fp32 would be off by more than one of them."""
    weights = torch.full((1, 50_001), 1e-5)
    weights[0, 0] = 0.5
    found = drawn(weights.expand(2000, -1), torch.Generator().manual_seed(0))
    rare = found[found > 0].double()
    assert 0.45 < len(rare) / 2000 < 0.55
    assert rare.mean() == pytest.approx(25_000, rel=0.05) and rare.max() > 49_000


def test_the_temperature_sharpens_and_a_seed_repeats() -> None:
    logits = torch.tensor([[0.0, 1.0]]).repeat(20_000, 1)
    for temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        found = draw(logits, temperature)
        torch.manual_seed(0)
        assert torch.equal(found, draw(logits, temperature))
        expected = torch.sigmoid(torch.tensor(1 / temperature)).item()
        assert found.double().mean().item() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_nothing_is_drawn_from_nothing(value: float) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        drawn(torch.tensor([[0.5, 0.5], [value, value]]))


def test_the_last_number_below_one_still_is_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2**-53, dtype=torch.float64))
    assert drawn(torch.ones(3, 7)).tolist() == [6, 6, 6]
