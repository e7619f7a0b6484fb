import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from serving.artifacts import verify
from serving.errors import ArtifactError, RegistryError
from serving.registry.mlflow import Registry
from serving.registry.model import Dataset, RegisteredModel
from serving.registry.pin import materialise, resolve
from tests.bundles import SIGNATURE, write_bundle

# MLflow 3.17 with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)

DATASET = Dataset("digits", "https://example.org/digits", "sha256:" + "d" * 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def files_of(source: str) -> Path:
    return Path(urlsplit(source).path)


# What is registered comes back.


def test_a_version_comes_back_with_all_that_is_known_of_it(
    registry: Registry, tmp_path: Path
) -> None:
    digest = write_bundle(tmp_path / "bundle")
    registered = registry.register(
        "digits",
        tmp_path / "bundle",
        metrics={"accuracy": 0.97, "log_loss": 1},
        dataset=DATASET,
        training_time=(1_700_000_000_000, 1_700_000_002_500),
        alias="champion",
        tags={"team": "vision"},
    )
    assert registered == registry.get("digits", "1") == registry.get("digits", "@champion")
    assert (registered.name, registered.version, registered.digest) == ("digits", "1", digest)
    assert (registered.platform, registered.signature) == ("pytorch_export", SIGNATURE)
    assert registered.metrics == {"accuracy": 0.97, "log_loss": 1.0}
    assert registered.dataset == DATASET
    assert registered.training_time_s == 2.5
    assert registered.aliases == ("champion",)
    assert timedelta() <= datetime.now(UTC) - registered.created_at < timedelta(minutes=1)
    assert verify(files_of(registered.source), digest)


def test_what_was_not_told_is_not_made_up(registry: Registry, bundle: Path) -> None:
    version = registry.register("digits", bundle)
    assert (version.metrics, version.dataset, version.training_time_s) == ({}, None, None)
    assert version.aliases == ()


def test_mlflow_itself_knows_run_metrics_data_set_and_model(
    registry: Registry, bundle: Path, home: Path
) -> None:
    from mlflow import MlflowClient

    registry.register("digits", bundle, metrics={"accuracy": 0.5}, dataset=DATASET)
    uri = f"sqlite:///{home / 'registry.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    row = client.get_model_version("digits", "1")
    run, logged = client.get_run(row.run_id), client.get_logged_model(row.tags["model_id"])
    assert (run.info.status, str(logged.status)) == ("FINISHED", "READY")
    assert [(m.key, m.value, m.dataset_name) for m in logged.metrics] == [
        ("accuracy", 0.5, "digits")
    ]
    data = run.inputs.dataset_inputs[0].dataset
    assert (data.name, data.source) == ("digits", DATASET.uri)
    assert DATASET.digest.startswith(data.digest)


def test_versions_count_up_and_aliases_move(registry: Registry, bundle: Path) -> None:
    for expected in ("1", "2"):
        assert registry.register("digits", bundle, alias="champion").version == expected
    assert registry.get("digits", "@champion").version == "2"
    assert registry.get("digits", "1").aliases == ()
    registry.set_alias("digits", "champion", "1")
    registry.set_alias("digits", "baseline", "1")
    assert registry.get("digits", "@champion").aliases == ("baseline", "champion")


def test_models_lists_versions_in_order_and_aliases(registry: Registry, bundle: Path) -> None:
    for _ in range(11):
        registry.register("many", bundle)
    other = registry.register("another.model-1", bundle, alias="a")
    registry.set_alias("many", "old", "2")
    another, many = registry.models()
    assert another == RegisteredModel("another.model-1", (other,), {"a": "1"})
    assert [v.version for v in many.versions] == [str(n) for n in range(1, 12)]
    assert [v.aliases for v in many.versions[:3]] == [(), ("old",), ()]
    assert registry.model("many") == many


def test_versions_of_other_tools_are_listed(registry: Registry, home: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{home / 'registry.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("it's theirs")
    client.create_model_version("it's theirs", source=str(home), tags={"dataset": "their own"})
    client.create_registered_model("empty")
    empty, theirs = registry.models()
    assert (empty.name, empty.versions) == ("empty", ())
    assert [(v.version, v.digest, v.signature) for v in theirs.versions] == [("1", "", None)]
    with pytest.raises(RegistryError, match="was not registered with `serving register`"):
        resolve(registry, "it's theirs", "1")


def test_two_that_register_one_new_model_get_two_versions(home: Path, bundle: Path) -> None:
    registries = [Registry(f"sqlite:///{home / 'registry.db'}") for _ in range(2)]
    barrier = threading.Barrier(2)
    versions: list[str] = []

    def work(registry: Registry) -> None:
        barrier.wait()
        versions.append(registry.register("digits", bundle).version)

    threads = [threading.Thread(target=work, args=(r,)) for r in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == ["1", "2"]


# What is refused.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a b", {}, "'a b' is not a model name"),
        ("../x", {}, "is not a model name"),
        ("m", {"alias": "latest"}, "alias 'latest' is reserved"),
        ("m", {"alias": "Latest"}, "alias 'Latest' is reserved"),
        ("m", {"alias": "v12"}, "alias 'v12' is reserved"),
        ("m", {"alias": "12"}, "'12' is not an alias"),
        ("m", {"alias": "@champion"}, "'@champion' is not an alias"),
        ("m", {"tags": {"digest": "x"}}, "tag 'digest' is reserved"),
        ("m", {"metrics": {"loss": float("nan")}}, "metric 'loss' is nan"),
        ("m", {"metrics": {"bad:key*": 1.0}}, "cannot register m: .*name"),
        ("m", {"training_time": (2, 1)}, r"ends \(1\) before it starts \(2\)"),
    ],
)
def test_a_bad_registration_is_refused_and_registers_nothing(
    registry: Registry, bundle: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.register(name, bundle, **options)
    assert [model for model in registry.models() if model.versions] == []


def test_a_bundle_that_is_not_whole_is_refused(registry: Registry, bundle: Path) -> None:
    (bundle / "model.pt2").write_bytes(b"changed since MANIFEST.json was written")
    with pytest.raises(ArtifactError, match=r"model.pt2: was changed"):
        registry.register("digits", bundle)
    assert registry.models() == []


def test_what_is_not_there_is_answered_with_what_is(registry: Registry, bundle: Path) -> None:
    registry.register("digits", bundle)
    registry.register("digits", bundle, alias="champion")
    registry.register("other", bundle)
    of_digits = r"; versions: 1, 2; aliases: @champion \(version 2\)$"
    for name, ref, message in (
        ("digitz", "1", r"no model 'digitz' in the registry .*; models: digits, other$"),
        ("digits", "7", "'digits' has no version '7'" + of_digits),
        ("digits", "@x", "'digits' has no alias @x" + of_digits),
        ("digits", "v1", "'digits' has no version 'v1'" + of_digits),
        ("other", "@x", r"; versions: 1; aliases: none$"),
    ):
        with pytest.raises(RegistryError, match=message):
            registry.get(name, ref)
        with pytest.raises(RegistryError, match=message):
            registry.set_alias(name, "new", ref)
    with pytest.raises(RegistryError, match=r"no model 'absent'.*digits, other"):
        registry.model("absent")


# An interrupted registration.


class Interrupting:
    """Passes calls on to the MLflow client until the nth, which an interrupt takes the place of."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return getattr(self._client, name)(*args, **kwargs)

        return call


def test_interrupted_anywhere_a_version_is_whole_or_not_there(
    registry: Registry, bundle: Path, home: Path
) -> None:
    whole = 0
    for calls in range(1, 100):
        interrupted = Registry(registry.uri)
        interrupted.__dict__["_client"] = Interrupting(registry._client, calls)
        try:
            interrupted.register("digits", bundle, metrics={"a": 1}, dataset=DATASET, alias="new")
            break
        except KeyboardInterrupt:
            pass
        versions = [v for model in registry.models() for v in model.versions]
        for version in versions[whole:]:
            files = home / "cache" / version.version
            assert materialise(registry, resolve(registry, "digits", version.version), files)
            assert version.metrics == {"a": 1}
            assert version.dataset == DATASET
        whole = len(versions)
    assert calls > 10, "the registration made fewer calls than were to be interrupted"
    assert registry.get("digits", "@new").version == str(whole + 1)


# A registry that cannot be used.


class NotMlflow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b"<html>\n<h1>no such page</h1>\n</html>")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotMlflow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def assert_one_sentence(uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        Registry(uri).models()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_is_no_database(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "registry.db").write_bytes(b"models: are here\n" * 500)
    uri = f"sqlite:///{tmp_path / 'registry.db'}"
    assert_one_sentence(uri, f"^registry {uri}: cannot list models: file is not a database$")
    assert capfd.readouterr() == ("", "")


def test_a_damaged_database(registry: Registry, home: Path) -> None:
    raw = bytearray((home / "registry.db").read_bytes())
    raw[4096:] = os.urandom(len(raw) - 4096)
    (home / "registry.db").write_bytes(raw)
    assert_one_sentence(registry.uri, "malformed|not a database")


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_sentence(f"sqlite:///{tmp_path}/file/registry.db", "File exists|Not a directory")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert_one_sentence("http://user:secret@127.0.0.1:9", "Connection refused")


def test_a_server_that_is_not_mlflow(web_server: str) -> None:
    assert_one_sentence(web_server, "cannot list models: .*404")


def test_a_kind_of_uri_that_there_is_not() -> None:
    assert_one_sentence("ftp://user:secret@host/registry", "unsupported URI")


# In a process of its own.

_SCRIPT = """
import json, sys, threading
from pathlib import Path
from serving.registry.mlflow import Registry
from serving.registry.pin import materialise, resolve

loaded = [name for name in ("mlflow", "sqlalchemy", "alembic") if name in sys.modules]
home, bundle = Path(sys.argv[1]), Path(sys.argv[2])
registry = Registry(f"sqlite:///{home / 'registry.db'}")
registry.register("digits", bundle, metrics={"a": 1}, dataset=("d", "u", "x"), alias="champion")
placed = materialise(registry, resolve(registry, "digits", "@champion"), home)
lasting = [t.name for t in threading.enumerate() if not t.daemon and "Artifact" not in t.name]
print(json.dumps({"loaded": loaded, "placed": str(placed), "threads": lasting}))
"""


def test_nothing_is_printed_left_behind_or_imported_early(tmp_path: Path, bundle: Path) -> None:
    here = tmp_path / "working directory"
    here.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tmp_path / "home", bundle],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["loaded"] == []
    assert answer["threads"] == ["MainThread"]
    assert Path(answer["placed"]).is_dir()
    assert list(here.iterdir()) == []
    home = sorted(p.name for p in (tmp_path / "home").iterdir())
    assert home == ["artifacts", "registry.db", "registry.db.artifacts"]
