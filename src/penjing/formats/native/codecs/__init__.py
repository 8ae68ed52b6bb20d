"""How each kind of grid lies in the native format: one file per kind, and the table of them."""

from __future__ import annotations

from penjing.errors import FormatError
from penjing.formats.native.codecs import bilevel, binary, codebook, integer, ternary, vectors
from penjing.formats.native.codecs import float as floats
from penjing.formats.native.codecs.base import Codec
from penjing.numerics.grids import Grid

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        ternary.CODEC,
        integer.CODEC,
        floats.CODEC,
        bilevel.CODEC,
        binary.CODEC,
        codebook.CODEC,
        vectors.CODEC,
    )
}
"""By the name that stands in config.json. A ternary grid is an integer grid too, so it comes first."""

__all__ = ["CODECS", "Codec", "codec_for"]


def codec_for(grid: Grid) -> Codec:
    """The codec that stores codes on `grid`."""
    return next(codec for codec in CODECS.values() if isinstance(grid, codec.grid))


def codec_named(name: str) -> Codec:
    """The codec that config.json names; FormatError when this penjing has none of that name."""
    if name not in CODECS:
        raise FormatError(
            f"the checkpoint holds weights on a grid of kind {name!r}, which this penjing does not know; "
            "upgrade with `pip install -U penjing`"
        )
    return CODECS[name]
