"""The ledger's rows on real databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serving.errors import ConflictError
from serving.store.ledger import LedgerRow
from serving.store.sql import Store


def row(minute: int, nano: int, *, tenant: str = "default", energy: int | None = None) -> LedgerRow:
    return LedgerRow(minute, tenant, "m", "1", "cpu", "direct", nano, nano * 2, 0, 1, energy)


def test_rows_add_up(opened: Callable[[], Store]) -> None:
    store = opened()
    store.post_ledger([row(60, 5), row(60, 7, tenant="acme")], {}, [], expected=0)
    store.post_ledger([row(60, -2), row(120, 10)], {}, [], expected=1)
    assert opened().ledger() == [
        LedgerRow(60, "acme", "m", "1", "cpu", "direct", 7, 14, 0, 1),
        LedgerRow(60, "default", "m", "1", "cpu", "direct", 13, 26, 0, 3),
    ]
    assert [r.nano_usd for r in store.ledger(since=120)] == [10]
    assert store.ledger(since=121) == []


@pytest.mark.parametrize(
    ("energies", "total"), [([None, None], None), ([None, 5], 5), ([5, None], 5), ([5, 6], 11)]
)
def test_energy_that_is_not_measured_is_absent(
    store: Store, energies: list[int | None], total: int | None
) -> None:
    for i, energy in enumerate(energies):
        store.post_ledger([row(60, 1, energy=energy)], {}, [], expected=i)
    assert store.ledger()[0].energy_mj == total


def test_rows_and_cursors_are_written_together_or_not(opened: Callable[[], Store]) -> None:
    store = opened()
    store.post_ledger([row(60, 5)], {"a": {"n": 10**30}, "b": {}}, [], expected=0)
    assert opened().ledger_cursors() == (1, {"a": {"n": 10**30}, "b": {}})
    with pytest.raises(ConflictError, match="another controller"):
        store.post_ledger([row(60, 5)], {"a": {}}, ["b"], expected=0)
    assert store.ledger_cursors() == (1, {"a": {"n": 10**30}, "b": {}})
    assert store.ledger()[0].nano_usd == 5
    store.post_ledger([], {"a": {"n": 1}}, ["b"], expected=1)
    assert store.ledger_cursors() == (2, {"a": {"n": 1}})


def test_old_minutes_become_one_sum(store: Store) -> None:
    store.post_ledger(
        [row(60, 1), row(120, 2, energy=3), row(180, 4), row(60, 8, tenant="acme")],
        {},
        [],
        expected=0,
    )
    before = store.ledger()
    store.fold_ledger(180)
    store.fold_ledger(180)
    assert [(r.tenant, r.nano_usd, r.energy_mj) for r in store.ledger()] == [
        (r.tenant, r.nano_usd, r.energy_mj) for r in before
    ]
    assert [r.nano_usd for r in store.ledger(since=60)] == [4]
    # The sum takes more.
    store.post_ledger([row(120, 16)], {}, [], expected=1)
    store.fold_ledger(240)
    assert [(r.minute, r.tenant, r.nano_usd) for r in store.ledger()] == [
        (0, "acme", 8),
        (0, "default", 23),
    ]
