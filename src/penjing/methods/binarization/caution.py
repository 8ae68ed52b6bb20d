"""What a plan says before a model is binarised."""

from __future__ import annotations

SMALL = 3_000_000_000
"""Parameters below which nothing near one bit per weight was ever seen to survive without training."""


def untrained(options: object, parameters: int) -> str:
    """The warning of every method here."""
    size = f"a model of {parameters / 1e6:,.0f} M parameters" if parameters < SMALL else "any model"
    return (
        f"weights of two or three values ruin {size} that was not trained with them: take the result as the "
        "start of such training, or stay at 3 bits and more"
    )
