"""What bundles were measured to take, kept in the store."""

from __future__ import annotations

from dataclasses import replace

from serving.store.memory_profiles import ProfileRow
from serving.store.sql import Store


def test_a_profile_is_kept_by_bundle_type_of_device_and_runtime(store: Store) -> None:
    first = ProfileRow("sha256:1", "NVIDIA L4", "torch 2.13", {"weights_bytes": 1}, 16, 5 << 30)
    other = replace(first, device_type="NVIDIA H100", ceiling=None)
    store.save_memory_profiles([first, other])
    newer = replace(first, profile={"weights_bytes": 2}, ceiling=8)
    store.save_memory_profiles([newer])
    assert sorted(store.memory_profiles(), key=lambda row: row.device_type) == [other, newer]
