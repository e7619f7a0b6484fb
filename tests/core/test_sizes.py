"""When a changed number of replicas has come about."""

from __future__ import annotations

import pytest

from serving.core.scaling import Scaling
from serving.core.sizes import Size

ONE, TWO, THREE = Size(1), Size(2), Size(3)
BY_LOAD = Size(1, Scaling(1, 4))
ASLEEP = Size(1, Scaling(0, 2))


@pytest.mark.parametrize(
    ("new", "old", "not_yet", "reached"),
    [
        (THREE, ONE, [0, 1, 2], [3, 4]),
        (ONE, THREE, [2, 3], [1, 0]),
        (BY_LOAD, TWO, [], [0, 1, 2, 4]),
        (TWO, BY_LOAD, [0, 1, 3, 4], [2]),
        (Size(2, Scaling(2, 3)), BY_LOAD, [1, 4], [2, 3]),
        (ASLEEP, BY_LOAD, [3, 4], [0, 1, 2]),
        (BY_LOAD, ASLEEP, [0], [1, 2, 4]),
        (TWO, TWO, [], [0, 1, 2, 3]),
    ],
)
def test_only_a_bound_that_was_tightened_is_waited_for(
    new: Size, old: Size, not_yet: list[int], reached: list[int]
) -> None:
    assert [n for n in (*not_yet, *reached) if new.is_reached(old, n)] == reached


def test_what_may_start_replicas() -> None:
    assert THREE.grows_from(ONE)
    assert not ONE.grows_from(THREE)
    assert TWO.grows_from(BY_LOAD)
    assert not BY_LOAD.grows_from(TWO)
    assert (str(THREE), str(BY_LOAD), str(ASLEEP)) == ("3", "1 to 4", "0 to 2")
