"""What a key-value cache holds, in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of a cache, or of some of its layers, beside what full precision would take.

    tokens            seen so far
    bytes             of the codes, scales, minima and full-precision tokens that are held
    full_bytes        of the same tokens' keys and values in full precision
    token_bytes       that one more token adds in the long run
    full_token_bytes  the same in full precision
    """

    tokens: int
    bytes: int
    full_bytes: int
    token_bytes: float
    full_token_bytes: float

    def __add__(self, other: CacheMemory) -> CacheMemory:
        """Of two sets of layers that saw the same tokens."""
        return CacheMemory(
            tokens=max(self.tokens, other.tokens),
            bytes=self.bytes + other.bytes,
            full_bytes=self.full_bytes + other.full_bytes,
            token_bytes=self.token_bytes + other.token_bytes,
            full_token_bytes=self.full_token_bytes + other.full_token_bytes,
        )


NOTHING = CacheMemory(0, 0, 0, 0.0, 0.0)
"""Of a cache that has seen no token."""
