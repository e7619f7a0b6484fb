"""A store that cannot be used: one sentence each, and nothing that was committed is lost."""

import ctypes
import multiprocessing
import os
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from serving.errors import StoreError
from serving.store import engine as engines
from serving.store.pins import PinRow
from serving.store.sql import Store, open_store

PROCESSES = multiprocessing.get_context("spawn")
BIG = "x" * 200_000


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_BUSY_TIMEOUT_S", 0.1)


@pytest.fixture
def filled(path: Path) -> Path:
    store = open_store(url_of(path))
    store.save_desired({"kept": True})
    store.close()
    return path


@pytest.mark.usefixtures("impatient")
def test_locked_by_another_process(filled: Path) -> None:
    store = open_store(url_of(filled))
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for call in (lambda: store.save_desired({}), store.desired, lambda: open_store(url_of(filled))):
        with pytest.raises(StoreError, match=f"^store {filled}: it is locked by another process$"):
            call()
    other.execute("ROLLBACK")
    other.close()
    assert store.desired() == {"kept": True}
    store.save_desired({"kept": "still"})
    store.close()


@pytest.mark.usefixtures("impatient")
def test_postgresql_locked_by_another_client(postgres_server: str) -> None:
    url = postgres_server.format(database="postgres")
    first, second = engines.connect(url), engines.connect(url)
    with (
        engines.begin(first, write=True),
        pytest.raises(StoreError, match="it is locked by another process"),
        engines.begin(second, write=True),
    ):
        pytest.fail("both hold the lock")
    first.dispose()
    second.dispose()


def test_postgresql_that_does_not_answer(tmp_path: Path) -> None:
    url = f"postgresql://user:secret@/db?host={tmp_path}"
    with pytest.raises(StoreError, match=r"^store postgresql.*connection .*failed") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"models: are served\n" * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"^store {path}: the file is not an SQLite database$"):
        open_store(url_of(path))
    assert path.read_bytes() == before


def test_a_damaged_database(filled: Path) -> None:
    raw = bytearray(filled.read_bytes())
    raw[4096 * 2 :] = os.urandom(len(raw) - 4096 * 2)
    filled.write_bytes(raw)
    with pytest.raises(StoreError, match=r"damaged|not an SQLite database"):
        open_store(url_of(filled)).desired()


def test_a_directory_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="it cannot be opened; check the directory"):
        open_store(url_of(tmp_path))


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"its directory cannot be made: (File exists|Not a)"):
        open_store(url_of(tmp_path / "file" / "store.db"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "'nonsense' is not a database URL"),
        ("mysql://host/db", "'mysql' is not supported; allowed: sqlite, postgresql"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_store(url)


# In processes of their own: limits and users that a test must not set for all.


def _as_nobody(url: str, results: Any) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        open_store(url).save_desired({})
    except StoreError as error:
        results.put(str(error))


def test_a_store_of_another_user(filled: Path) -> None:
    filled.chmod(0)
    message = _ask(_as_nobody, url_of(filled))
    assert message.startswith(f"store {filled}: ")
    assert any(part in message for part in ("cannot be opened", "ermission denied"))


def _with_little_disk(url: str, results: Any) -> None:
    store = open_store(url)
    limit = Path(store._engine.url.database or "").stat().st_size + 8192
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.save_desired({"big": BIG})
    except StoreError as error:
        results.put(str(error))


def test_a_file_that_may_not_grow(filled: Path) -> None:
    assert _ask(_with_little_disk, url_of(filled)) == (
        f"store {filled}: its disk cannot be read or written"
    )
    assert_kept(filled)


def _ask(target: Any, *args: Any) -> str:
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=target, args=(*args, results))
    process.start()
    answer: str = results.get(timeout=60)
    process.join()
    return answer


def assert_kept(path: Path) -> None:
    store = open_store(url_of(path))
    assert store.desired() == {"kept": True}
    store.save_desired({"kept": True, "again": 1})
    store.close()


def test_a_full_database(filled: Path) -> None:
    store = open_store(url_of(filled))
    pages = filled.stat().st_size // 4096

    @event.listens_for(store._engine, "begin")
    def limit(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 2}")

    with pytest.raises(StoreError, match=f"^store {filled}: the disk is full$"):
        store.commit(
            desired={"big": BIG}, pins=[PinRow("m", "1", "1", "d", 1.0)], event=("apply", {})
        )
    assert store.desired() == {"kept": True}
    assert (store.get_pins(), store.events()) == ([], [])
    store.close()
    assert_kept(filled)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB, where this user may mount one."""
    libc = ctypes.CDLL(None, use_errno=True)
    where = os.fsencode(tmp_path / "disk")
    os.mkdir(where)
    if libc.mount(b"tmpfs", where, b"tmpfs", 0, b"size=160k") != 0:
        pytest.skip(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    yield Path(os.fsdecode(where))
    assert libc.umount2(where, 2) == 0


def test_a_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "store.db"
    store = open_store(url_of(path))
    store.save_desired({"kept": True})
    with pytest.raises(StoreError, match=f"^store {path}: the disk is full$"):
        store.save_desired({"big": BIG})
    assert store.desired() == {"kept": True}
    store.close()
    assert_kept(path)


# A process that dies at any moment.


def _apply_for_ever(url: str, ready: Any) -> None:
    store = open_store(url)
    ready.set()
    while True:
        number = store.desired_revision() + 1
        pin = PinRow("m", "@champion", str(number), "d", float(number))
        store.commit(
            desired={"number": number, "big": BIG}, pins=[pin], event=("apply", {"number": number})
        )


def assert_consistent(store: Store) -> int:
    number = store.desired_revision()
    assert (store.desired() or {"number": 0})["number"] == number
    assert [p.version for p in store.get_pins()] == ([str(number)] if number else [])
    assert [e.body["number"] for e in store.events(limit=10**6)] == list(range(1, number + 1))
    return number


def test_what_is_committed_together_survives_a_kill_together(path: Path) -> None:
    reached = 0
    for _ in range(3):
        ready = PROCESSES.Event()
        process = PROCESSES.Process(target=_apply_for_ever, args=(url_of(path), ready))
        process.start()
        assert ready.wait(60)
        # Killed while it writes: the journal is there during a commit only.
        journal = path.with_name(path.name + "-journal")
        while process.is_alive() and not journal.exists():
            pass
        process.kill()
        process.join()
        store = open_store(url_of(path))
        number = assert_consistent(store)
        store.close()
        assert number >= reached
        reached = number
