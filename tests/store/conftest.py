"""Both databases: SQLite in a file, and a real PostgreSQL server where there is one."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect

from serving.store import engine as engines
from serving.store.sql import Store, open_store
from tests.services import missing


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and (path := shutil.which("initdb")):
        found = [Path(path)]
    if not found:
        missing("PostgreSQL is not installed")
    return found[-1].parent


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL, less the database, of a server that listens on a unix socket only."""
    try:
        import psycopg
    except ImportError:
        missing("psycopg is not installed")
    programs = _postgres_programs()
    # The server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    shutil.chown(directory, user)
    data = directory / "data"
    options = ["-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C"]
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, *options],
            check=True,
            capture_output=True,
            user=user,
            cwd=directory,
        )
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", directory, "-c", "listen_addresses="],
            user=user,
            cwd=directory,
            stderr=subprocess.DEVNULL,
        )
        try:
            give_up = time.monotonic() + 30
            while True:
                try:
                    psycopg.connect(host=str(directory), user="postgres").close()
                    break
                except psycopg.OperationalError:
                    if server.poll() is not None or time.monotonic() > give_up:
                        raise
                    time.sleep(0.05)
            yield f"postgresql+psycopg://postgres@/{{database}}?host={directory}"
        finally:
            # Immediate shutdown: it would wait for its clients, and for its disk.
            server.send_signal(signal.SIGQUIT)
            server.wait(30)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    import psycopg

    server: str = request.getfixturevalue("postgres_server")
    host, name = server.partition("?host=")[2], f"t{uuid.uuid4().hex}"
    with psycopg.connect(host=host, user="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.format(database=name)


_TABLES = {
    "0001": {"pins", "desired", "route_table", "counters", "events"},
    "0003": {"pins", "desired", "route_table", "counters", "events"}
    | {"versions", "rollouts", "audit"},
}


def put_back(url: str, revision: str) -> None:
    """Make the schema that of an earlier revision; what its tables hold stays."""
    engine = engines.connect(url)
    with engines.begin(engine, write=True) as connection:
        for table in set(inspect(connection).get_table_names()) - _TABLES[revision]:
            if table not in ("alembic_version", "sqlite_sequence"):
                connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")
    engine.dispose()


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(url: str, clock: Clock) -> Iterator[Callable[[], Store]]:
    """Opens the store; all that were opened are closed at the end."""
    stores = []

    def open_again() -> Store:
        stores.append(open_store(url, clock=clock))
        return stores[-1]

    yield open_again
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Callable[[], Store]) -> Store:
    return opened()
