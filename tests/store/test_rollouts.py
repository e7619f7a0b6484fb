"""Rollouts and the audit log in the store, on both databases."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from serving.errors import ConfigError, ConflictError, StoreError
from serving.store import engine as engines
from serving.store.audit import FIRST_HASH, AuditEntry, Head
from serving.store.pins import PinRow
from serving.store.rollouts import RolloutRow
from serving.store.sql import Store, open_store
from tests.store.conftest import Clock, put_back


def rollout(number: int, *, model: str = "m", finished_at: float | None = None) -> RolloutRow:
    body = {"step": number, "weight": 0.05}
    return RolloutRow(f"{model}:{number}", model, "observing", body, 100.0 + number, finished_at)


def entry(number: int, subject: str = "m:1") -> AuditEntry:
    return AuditEntry(
        1000.0 + number / 3, "alice", "pause", subject, {"n": number, "é": [1.5, None]}
    )


def tamper(url: str, statement: str) -> None:
    engine = engines.connect(url)
    with engines.begin(engine, write=True) as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def test_a_commit_writes_everything(store: Store) -> None:
    pin = PinRow("m", "1", "1", "sha256:a", 1.0)
    store.commit(
        desired={"v": 1},
        pins=[pin],
        rollouts=[rollout(1)],
        route_table={"revision": 3},
        audit=[entry(1)],
        event=("apply", {}),
    )
    assert store.desired() == {"v": 1}
    assert store.get_pins() == [pin]
    assert store.rollouts() == [rollout(1)]
    assert store.route_table() == {"revision": 3}
    assert [(a.seq, a.actor, a.body) for a in store.audit()] == [(1, "alice", entry(1).body)]
    assert [e.kind for e in store.events()] == ["apply"]


def test_what_a_commit_does_not_name_stays(store: Store) -> None:
    pin = PinRow("m", "1", "1", "sha256:a", 1.0)
    store.commit(desired={"v": 1}, pins=[pin], route_table={"revision": 1})
    store.commit(rollouts=[rollout(1)])
    assert store.desired() == {"v": 1}
    assert store.desired_revision() == 1
    assert store.get_pins() == [pin]
    assert store.route_table() == {"revision": 1}


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ({"route_table": {"revision": 2}}, ConflictError),
        ({"audit": [replace(entry(2), body={"bad": float("nan")})]}, StoreError),
        ({"audit": [replace(entry(2), body={"bad": object()})]}, StoreError),
    ],
)
def test_a_commit_that_fails_late_changes_nothing(
    store: Store, last: dict[str, Any], error: type[Exception]
) -> None:
    store.commit(route_table={"revision": 2}, audit=[entry(1)], rollouts=[rollout(1)])
    changed = replace(rollout(1), state="rolled_back")
    with pytest.raises(error):
        store.commit(desired={"v": 2}, rollouts=[changed], **last)
    assert store.desired() is None
    assert store.rollouts() == [rollout(1)]
    assert len(store.audit()) == 1


def test_a_rollout_is_replaced_whole(store: Store, opened: Callable[[], Store]) -> None:
    store.commit(rollouts=[rollout(1)])
    done = replace(rollout(1), state="succeeded", body={"step": 9}, finished_at=500.0)
    store.commit(rollouts=[done])
    assert opened().rollout("m:1") == done
    assert store.rollout("m:2") is None


def test_rollouts_are_listed_newest_first(store: Store) -> None:
    done, running = rollout(1, finished_at=300.0), rollout(2)
    other = rollout(3, model="other")
    store.commit(rollouts=[done, running, other])
    assert store.rollouts() == [other, running, done]
    assert store.rollouts(limit=2) == [other, running]
    assert store.rollouts(active=True) == [other, running]
    assert store.rollouts(active=False) == [done]
    assert store.rollouts(active=True, model="m") == [running]
    assert (store.count_rollouts("m"), store.count_rollouts("nobody")) == (2, 0)


# The audit log.


def test_the_log_is_a_chain(store: Store) -> None:
    assert store.verify_audit().sentence == "the audit log is empty"
    store.commit(audit=[entry(1), entry(2)])
    store.commit(audit=[entry(3)])
    rows = store.audit()
    assert [row.seq for row in rows] == [1, 2, 3]
    assert [row.prev_hash for row in rows] == [FIRST_HASH, rows[0].hash, rows[1].hash]
    end = store.verify_audit()
    assert end == Head(3, rows[-1].hash)
    assert end.sentence.startswith("3 entries, as written")
    assert end.sentence.endswith(f"{rows[-1].hash}@3")


def test_the_log_is_read_in_pages_and_from_its_end(store: Store) -> None:
    store.commit(audit=[entry(n, f"m:{n % 2}") for n in range(1, 8)])
    assert [row.seq for row in store.audit(after=0, limit=3)] == [1, 2, 3]
    assert [row.seq for row in store.audit(after=3, limit=3)] == [4, 5, 6]
    assert [row.seq for row in store.audit(limit=2)] == [6, 7]
    assert [row.seq for row in store.audit(subject="m:0")] == [2, 4, 6]


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("UPDATE audit SET actor = 'mallory' WHERE seq = 2", "entry 2 was changed"),
        ("UPDATE audit SET at = 1.0 WHERE seq = 3", "entry 3 was changed"),
        ("UPDATE audit SET body = '{\"n\": 7}' WHERE seq = 1", "entry 1 was changed"),
        ("UPDATE audit SET prev_hash = 'x' WHERE seq = 3", "entry 3 does not follow entry 2"),
        ("DELETE FROM audit WHERE seq = 2", "entry 2 is missing; entry 3 comes instead"),
        ("DELETE FROM audit WHERE seq = 1", "entry 1 is missing"),
        ("UPDATE audit SET seq = 9 WHERE seq = 3", "entry 3 is missing; entry 9 comes instead"),
    ],
)
def test_whatever_is_tampered_with_is_named(
    url: str, store: Store, statement: str, sentence: str
) -> None:
    store.commit(audit=[entry(n) for n in (1, 2, 3)])
    tamper(url, statement)
    with pytest.raises(StoreError, match=sentence):
        store.verify_audit()


def test_a_forged_entry_needs_every_later_hash(url: str, store: Store) -> None:
    store.commit(audit=[entry(n) for n in (1, 2, 3)])
    forged = "f" * 64
    tamper(url, f"UPDATE audit SET hash = '{forged}' WHERE seq = 2")
    with pytest.raises(StoreError, match="entry 2 was changed"):
        store.verify_audit()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_log_that_was_cut_off_shows(url: str, store: Store, kept: int) -> None:
    store.commit(audit=[entry(n) for n in (1, 2, 3)])
    tamper(url, f"DELETE FROM audit WHERE seq > {kept}")
    with pytest.raises(StoreError, match=f"ends with entry {kept}, but once had 3"):
        store.verify_audit()
    # Going on writing does not heal it.
    store.commit(audit=[entry(4)])
    with pytest.raises(StoreError, match=f"entry {kept + 1} is missing; entry 4 comes instead"):
        store.verify_audit()


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("UPDATE audit_head SET seq = 2", "entry 2 has not the hash that was noted"),
        (f"UPDATE audit_head SET hash = '{'f' * 64}'", "entry 3 has not the hash that was noted"),
        ("UPDATE audit_head SET seq = 9", "ends with entry 3, but once had 9"),
        ("DELETE FROM audit_head", "ends with entry 3, but by the record of its end with none"),
        (
            "UPDATE audit_head SET seq = 2, hash = (SELECT hash FROM audit WHERE audit.seq = 2)",
            "ends with entry 3, but by the record of its end with 2",
        ),
    ],
)
def test_a_changed_record_of_the_end_shows_and_stops_nobody(
    url: str, store: Store, statement: str, sentence: str
) -> None:
    store.commit(audit=[entry(n) for n in (1, 2, 3)])
    tamper(url, statement)
    with pytest.raises(StoreError, match=sentence):
        store.verify_audit()
    store.commit(audit=[entry(4)])
    assert store.audit(limit=1)[0].body == entry(4).body


def test_both_changed_shows_by_what_was_noted_elsewhere(url: str, store: Store) -> None:
    store.commit(audit=[entry(n) for n in (1, 2, 3)])
    noted = store.verify_audit()
    store.commit(audit=[entry(4)])
    assert store.verify_audit(noted).count == 4
    tamper(url, "DELETE FROM audit WHERE seq > 2")
    tamper(
        url, "UPDATE audit_head SET seq = 2, hash = (SELECT hash FROM audit WHERE audit.seq = 2)"
    )
    assert store.verify_audit().count == 2, "nothing in the store tells any more"
    with pytest.raises(StoreError, match="ends with entry 2, but once had 3"):
        store.verify_audit(noted)
    # And made anew to the old length:
    store.commit(audit=[entry(5), entry(6)])
    with pytest.raises(StoreError, match="entry 3 has not the hash that was noted"):
        store.verify_audit(noted)


def test_an_end_is_noted_as_text() -> None:
    end = Head(12, "0a" * 32)
    assert Head.parse(str(end)) == end
    for wrong in ("", "12", f"{'0a' * 32}", f"{'0a' * 32}@0", f"{'0A' * 32}@3", f" {end}"):
        with pytest.raises(ConfigError, match="is no end of a log; allowed: HASH@COUNT"):
            Head.parse(wrong)


def test_a_log_of_an_earlier_version_gets_the_record_of_its_end(url: str, store: Store) -> None:
    store.commit(audit=[entry(n) for n in (1, 2)])
    before = store.verify_audit()
    store.close()
    put_back(url, "0003")
    migrated = open_store(url)
    assert migrated.verify_audit() == before
    migrated.commit(audit=[entry(3)])
    assert migrated.verify_audit(before).count == 3
    migrated.close()


def test_writers_extend_one_chain(opened: Callable[[], Store]) -> None:
    stores = [opened() for _ in range(3)]

    def work(number: int, store: Store) -> None:
        for i in range(5):
            store.commit(audit=[entry(10 * number + i)])

    threads = [threading.Thread(target=work, args=a) for a in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].verify_audit().count == 15


def test_what_json_changes_is_no_forgery(store: Store, clock: Clock) -> None:
    body: dict[Any, Any] = {1: (1, 2), "z": {2: 1e22}, "a": -0.0}
    store.commit(audit=[AuditEntry(5, "bob", "x", "m", body)])
    assert store.verify_audit().sentence.startswith("1 entry,")
