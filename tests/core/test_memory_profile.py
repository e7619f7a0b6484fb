"""What a version is said to need, from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.core.memory_profile import (
    MemoryProfile,
    estimated_need,
    format_free,
    format_need,
    with_margin,
)

MIB = 1 << 20
GIB = 1 << 30


def profile(buckets: dict[int, int], weights: int = 1000, workspace: int = 100) -> MemoryProfile:
    return MemoryProfile("NVIDIA L4", "torch", weights, workspace, buckets)


profiles = st.builds(
    profile,
    st.dictionaries(st.integers(1, 512), st.integers(0, 1 << 34), min_size=1, max_size=8),
    st.integers(0, 1 << 36),
    st.integers(0, 1 << 32),
)


@pytest.mark.parametrize(
    ("rows", "peak"),
    [
        (1, 10),  # below the first bucket: a run of one row was measured nowhere smaller
        (2, 10),
        (3, 25),  # halfway
        (4, 40),
        (8, 100),  # 15 a row from 2 to 4
    ],
)
def test_between_and_beyond_buckets(rows, peak):
    assert profile({2: 10, 4: 40}).peak(rows) == peak


def test_beyond_the_last_bucket_at_least_in_proportion():
    assert profile({1: 80, 8: 80}).peak(16) == 160
    assert profile({8: 80}).peak(16) == 160


def test_a_smaller_run_that_took_more_counts():
    assert profile({1: 500, 8: 80}).peak(8) == 500


def test_need_leaves_the_margin_of_the_lease_unused():
    found = profile({64: 7900})
    assert found.need(64) == 9000
    assert found.need(64, 0.1) == 10_000


@given(profiles, st.integers(1, 2000), st.integers(1, 2000), st.floats(0, 0.9))
def test_more_rows_never_need_less(found, a, b, margin):
    assert found.need(min(a, b), margin) <= found.need(max(a, b), margin)


@given(profiles, st.floats(0, 0.9))
def test_leases_that_fill_a_gpu_leave_its_margin(found, margin):
    """What was measured is at most the lease × (1 − margin), so it is of every sum of leases."""
    lease = found.need(64, margin)
    assert found.need(64) <= lease * (1 - margin) * (1 + 1e-12)


@given(profiles)
def test_every_measured_bucket_is_covered(found):
    for rows, measured in found.buckets.items():
        assert found.need(rows) >= found.weights_bytes + found.workspace_bytes + measured


@given(profiles)
def test_its_json_form_is_itself(found):
    assert MemoryProfile.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"buckets": {}}, "at least one bucket"),
        ({"buckets": {0: 5}}, "at least one row, not 0"),
        ({"buckets": {1: -5}}, "no negative sizes"),
        ({"weights": -1}, "no negative sizes"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        profile(**{"buckets": {1: 1}, **change})


@pytest.mark.parametrize("margin", [-0.1, 1.0])
def test_a_margin_is_a_share(margin):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        with_margin(1, margin)


def test_an_estimate_has_room_for_weights_twice_and_a_context():
    assert estimated_need(3 * GIB) == 7 * GIB


def test_bytes_are_rounded_to_the_safe_side():
    need, free = 14 * GIB + GIB // 8, 14 * GIB + GIB // 8 - 1
    assert (format_need(need), format_free(free)) == ("14.2 GiB", "14.1 GiB")
    assert (format_need(3 * MIB // 2), format_free(3 * MIB // 2)) == ("2 MiB", "1 MiB")
