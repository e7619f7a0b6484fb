"""Connections to the control store, its schema version, and its errors as sentences.

SQLite runs in rollback-journal mode with `synchronous=FULL`: a commit is on disk when it returns,
and the WAL-reset bug of SQLite 3.7.0-3.51.2 (two writers) cannot occur. The driver's transaction
handling is off, so that schema changes are transactional. On both databases a transaction that
writes takes the store's one write lock when it begins: two processes never both read, then both
write.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError, StatementError

from serving.errors import StoreError

_BUSY_TIMEOUT_S: Final = 5.0
_CONNECT_TIMEOUT_S: Final = 5
# An arbitrary constant: the advisory lock that PostgreSQL clients hold while they write.
_WRITE_LOCK: Final = 0x53657276
_WRITES: Final = "serving_writes"

_SQLITE_SENTENCES: Final = {
    sqlite3.SQLITE_BUSY: "it is locked by another process",
    sqlite3.SQLITE_LOCKED: "it is locked by another process",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it is read-only for this user",
    sqlite3.SQLITE_PERM: "this user may not read it",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the directory and its permissions",
    sqlite3.SQLITE_IOERR: "its disk cannot be read or written",
    sqlite3.SQLITE_NOTADB: "the file is not an SQLite database",
    sqlite3.SQLITE_CORRUPT: "the database file is damaged; restore it from a copy",
}


def connect(url: str) -> Engine:
    """An engine for `url` (SQLite or PostgreSQL), not connected yet. Raises `StoreError`."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreError(f"store: {url!r} is not a database URL") from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _sqlite(parsed)
    if backend == "postgresql":
        return _postgresql(parsed)
    raise StoreError(f"store: {backend!r} is not supported; allowed: sqlite, postgresql")


@contextmanager
def begin(engine: Engine, *, write: bool) -> Iterator[Connection]:
    """A transaction: committed at the end, rolled back on any error. Raises `StoreError`."""
    try:
        with (
            engine.connect().execution_options(**{_WRITES: write}) as connection,
            connection.begin(),
        ):
            yield connection
    # The driver's own error comes from the statements that set up a connection.
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise StoreError(f"store {_shown(engine.url)}: {_sentence(error)}") from error


def upgrade(engine: Engine) -> None:
    """Bring the schema to this version's. Raises `StoreError`, also if it is a newer one's."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    # What it says at each start is of no interest to an operator.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with begin(engine, write=True) as connection:
        # Read under the lock: another process may have migrated meanwhile.
        current = MigrationContext.configure(connection).get_current_heads()
        if unknown := set(current) - known:
            raise StoreError(
                f"store {_shown(engine.url)}: its schema {', '.join(sorted(unknown))} was written "
                f"by a newer version; this one knows {scripts.get_current_head()}"
            )
        if current != (scripts.get_current_head(),):
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise StoreError("store: an SQLite URL must name a file, as in sqlite:////var/lib/store.db")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"store {path}: its directory cannot be made: {error.strerror or error}"
        ) from error
    engine = create_engine(
        url,
        json_serializer=_to_json,
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
        pool_size=1,
        max_overflow=0,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        write = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(
            url,
            json_serializer=_to_json,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "options": f"-c lock_timeout={int(_BUSY_TIMEOUT_S * 1000)}",
            },
        )
    except ImportError as error:
        raise StoreError(
            "store: PostgreSQL needs the psycopg package: install serving-gateway[postgres]"
        ) from error

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        if connection.get_execution_options().get(_WRITES, False):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})")

    return engine


def _to_json(value: Any) -> str:
    try:
        # NaN is not JSON, and PostgreSQL refuses it.
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise StoreError(f"what is to be saved is not JSON: {error}") from error


def _shown(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.render_as_string(hide_password=True)


def _sentence(error: Exception) -> str:
    cause = error.orig if isinstance(error, StatementError) else error
    if isinstance(cause, sqlite3.Error):
        # The low byte is the primary result code (https://www.sqlite.org/rescode.html).
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in _SQLITE_SENTENCES:
            return _SQLITE_SENTENCES[code]
    if getattr(cause, "sqlstate", None) == "55P03":
        return "it is locked by another process"
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
