"""Which arm a unit belongs to: a monotone hash.

A unit (a request, a user) has one point in [0, 1), fixed by the rollout's salt; the canary takes
the points below its weight. So a larger weight only adds units to the canary, and none moves back
and forth.
"""

from __future__ import annotations

from hashlib import blake2b

_SCALE = 2.0**-64


def unit_point(salt: bytes, unit: bytes) -> float:
    """Where a unit lies in [0, 1), uniformly over units. `salt` is at most 64 bytes."""
    digest = blake2b(unit, digest_size=8, key=salt).digest()
    return int.from_bytes(digest, "big") * _SCALE
