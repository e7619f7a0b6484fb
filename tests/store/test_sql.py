"""What the store keeps, on both databases."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import ConflictError, StoreError
from serving.store import engine as engines
from serving.store.pins import PinRow
from serving.store.schema import metadata
from serving.store.sql import Event, Store, open_store
from tests.store.conftest import Clock, put_back

CHAMPION = PinRow("digits", "@champion", "2", "sha256:b", 12.5)
FIRST = PinRow("digits", "1", "1", "sha256:a", 12.0)


def save(store: Store, pin: PinRow) -> None:
    store.save_pin(pin.model, pin.ref, pin.version, pin.digest, pin.resolved_at)


def test_a_fresh_store_is_empty(store: Store) -> None:
    assert store.get_pins() == []
    assert store.desired() is None
    assert store.desired_revision() == 0
    assert store.route_table() is None
    assert store.next_revision() == 1
    assert store.counters() == {}
    assert store.events() == []


def test_everything_is_there_after_opening_again(
    store: Store, opened: Callable[[], Store], clock: Clock
) -> None:
    save(store, CHAMPION)
    save(store, FIRST)
    store.save_desired({"models": {"größe": [1, 2.5, None, True]}})
    store.save_route_table({"revision": 4, "models": []})
    store.save_counters({"gateway-1": {"requests": 3}})
    clock.now = 1_001.0
    store.append_event("apply", {"changes": []})
    store.close()
    again = opened()
    assert again.get_pins() == [FIRST, CHAMPION]
    assert again.desired() == {"models": {"größe": [1, 2.5, None, True]}}
    assert again.route_table() == {"revision": 4, "models": []}
    assert again.next_revision() == 5
    assert again.counters() == {"gateway-1": {"requests": 3}}
    assert again.events() == [Event(1, 1_001.0, "apply", {"changes": []})]


def test_saving_a_pin_or_a_counter_again_replaces_it(store: Store) -> None:
    save(store, CHAMPION)
    moved = PinRow("digits", "@champion", "3", "sha256:c", 13.0)
    save(store, moved)
    assert store.get_pins() == [moved]
    store.save_counters({"g": {"n": 1}})
    store.save_counters({"h": {"n": 5}})
    store.save_counters({"g": {"n": 2}})
    assert store.counters() == {"g": {"n": 2}, "h": {"n": 5}}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**53), 2**53)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_any_json_comes_back_as_it_was(store: Store, document: dict) -> None:
    store.save_desired(document)
    assert store.desired() == document


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_is_refused_and_changes_nothing(store: Store, value: object) -> None:
    store.save_desired({"a": 1})
    with pytest.raises(StoreError):
        store.save_desired({"a": value})
    assert store.desired() == {"a": 1}
    assert store.desired_revision() == 1


# Two writers.


def test_a_stale_revision_is_a_conflict_and_changes_nothing(
    store: Store, opened: Callable[[], Store]
) -> None:
    other = opened()
    store.save_desired({"by": "a"}, expected=0)
    with pytest.raises(ConflictError, match="at revision 1, not 0"):
        other.save_desired({"by": "b"}, expected=0)
    with pytest.raises(ConflictError):
        other.commit(desired={"by": "b"}, pins=[CHAMPION], event=("apply", {}), expected=0)
    assert store.desired() == {"by": "a"}
    assert (store.get_pins(), store.events()) == ([], [])
    other.save_desired({"by": "b"}, expected=1)
    assert store.desired() == {"by": "b"}


def test_a_route_table_never_goes_back(store: Store) -> None:
    store.save_route_table({"revision": 2})
    for revision in (1, 2):
        with pytest.raises(ConflictError, match="not above the saved revision 2"):
            store.save_route_table({"revision": revision, "forged": True})
    assert store.route_table() == {"revision": 2}


def test_of_many_writers_with_one_revision_one_wins(opened: Callable[[], Store]) -> None:
    stores = [opened() for _ in range(4)]
    barrier = threading.Barrier(len(stores))
    outcomes: list[str] = []

    def work(number: int, store: Store) -> None:
        barrier.wait()
        try:
            store.save_desired({"by": number}, expected=0)
            outcomes.append("won")
        except ConflictError:
            outcomes.append("lost")

    threads = [threading.Thread(target=work, args=a) for a in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 3 + ["won"]
    assert stores[0].desired_revision() == 1


def test_threads_share_one_store(store: Store) -> None:
    def work(number: int) -> None:
        for i in range(10):
            store.append_event("tick", {"thread": number, "i": i})
            store.save_counters({f"g{number}": {"i": i}})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = store.events(limit=1000)
    assert [e.id for e in events] == sorted({e.id for e in events})
    assert len(events) == 60
    for number in range(6):
        own = [e.body["i"] for e in events if e.body["thread"] == number]
        assert own == list(range(10))
    assert store.counters() == {f"g{n}": {"i": 9} for n in range(6)}


# Transactions.


def test_apply_replaces_configuration_and_pins_and_logs(store: Store) -> None:
    save(store, FIRST)
    store.commit(
        desired={"v": 1}, pins=[CHAMPION], event=("apply", {"starts": ["digits"]}), expected=0
    )
    assert store.desired() == {"v": 1}
    assert store.get_pins() == [CHAMPION]
    assert [(e.kind, e.body) for e in store.events()] == [("apply", {"starts": ["digits"]})]


def test_an_apply_that_fails_at_its_end_changes_nothing(store: Store) -> None:
    store.commit(desired={"v": 1}, pins=[FIRST], event=("apply", {}))
    with pytest.raises(StoreError):
        store.commit(desired={"v": 2}, pins=[CHAMPION], event=("apply", {"not": object()}))
    assert store.desired() == {"v": 1}
    assert store.get_pins() == [FIRST]
    assert len(store.events()) == 1


def test_events_are_read_in_pages(store: Store) -> None:
    for i in range(5):
        store.append_event("n", {"i": i})
    first = store.events(limit=2)
    rest = store.events(after=first[-1].id)
    assert [e.body["i"] for e in first + rest] == [0, 1, 2, 3, 4]


# Digests of versions.


def test_the_digest_of_a_version_stays_whatever_is_applied(
    store: Store, opened: Callable[[], Store]
) -> None:
    store.commit(desired={}, pins=[FIRST, CHAMPION], event=("apply", {}))
    store.commit(desired={}, pins=[], event=("apply", {}))
    store.commit(desired={}, pins=[replace(CHAMPION, digest="sha256:other")], event=("apply", {}))
    assert opened().digests() == {("digits", "1"): "sha256:a", ("digits", "2"): "sha256:b"}


# Schema.


def test_the_migrations_build_the_tables_that_the_code_uses(url: str, store: Store) -> None:
    engine = engines.connect(url)
    with engines.begin(engine, write=False) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_what_an_earlier_version_pinned_is_known(url: str, store: Store) -> None:
    store.commit(desired={}, pins=[FIRST, CHAMPION], event=("apply", {}))
    store.close()
    put_back(url, "0001")
    migrated = open_store(url)
    assert migrated.digests() == {("digits", "1"): "sha256:a", ("digits", "2"): "sha256:b"}
    migrated.close()


def test_a_store_of_a_newer_version_is_refused_untouched(url: str, store: Store) -> None:
    store.save_desired({"from": "the future"})
    store.close()
    engine = engines.connect(url)
    with engines.begin(engine, write=True) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match=r"its schema 9999 was written by a newer version"):
        open_store(url)
    with engines.begin(engine, write=False) as connection:
        rows = connection.exec_driver_sql("SELECT revision FROM desired").all()
        assert [tuple(row) for row in rows] == [(1,)]
    engine.dispose()


def test_a_migration_that_fails_leaves_no_table(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import op

    create_table = op.create_table

    def fail_late(name: str, *args: object, **kwargs: object) -> object:
        if name == "events":
            raise engines.StoreError("power cut")
        return create_table(name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(op, "create_table", fail_late)
        with pytest.raises(StoreError, match="power cut"):
            open_store(url)
    engine = engines.connect(url)
    with engines.begin(engine, write=False) as connection:
        assert not engine.dialect.get_table_names(connection)
    engine.dispose()
    store = open_store(url)
    assert store.events() == []
    store.close()


def test_many_may_open_a_fresh_store_at_once(opened: Callable[[], Store]) -> None:
    barrier = threading.Barrier(4)
    errors: list[Exception] = []

    def work() -> None:
        barrier.wait()
        try:
            opened().append_event("opened", {})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(opened().events()) == 4
