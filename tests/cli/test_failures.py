"""Whatever is wrong, the command line says it in one line on stderr and exits with a code."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving import __version__
from serving.cli import home, preflight, up
from serving.cli.client import Admin
from serving.config import load_config, parse_config
from serving.errors import ConflictError
from serving.registry.mlflow import Registry
from tests.bundles import write_bundle
from tests.cli.admin import admin_api
from tests.e2e.deployment import SERVING, free_port, serving

# MLflow 3.17 with SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def fails(*arguments: str | Path, home: Path, code: int = 1, **env: str) -> str:
    """The one line that it says."""
    done = serving(*arguments, home=home, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def config(home: Path, text: str) -> Path:
    file = home / "serving.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("command", ["up", "down", "apply", "status", "doctor"])
def test_an_unknown_key_names_file_key_and_what_is_allowed(tmp_path: Path, command: str) -> None:
    file = config(tmp_path, "gateway:\n  prot: 8000\n")
    said = fails(command, "-f", file, home=tmp_path, code=2)
    assert str(file) in said
    assert "unknown key 'gateway.prot'" in said
    assert "port" in said


def test_a_bad_value_and_a_missing_file(tmp_path: Path) -> None:
    file = config(tmp_path, "models:\n  m:\n    version: newest\n")
    assert "models.m.version" in fails("up", "-f", file, home=tmp_path, code=2)
    missing = tmp_path / "missing.yaml"
    assert str(missing) in fails("up", "-f", missing, home=tmp_path, code=2)


@pytest.mark.parametrize("section", ["gateway", "control"])
def test_a_port_in_use(tmp_path: Path, listener: int, section: str) -> None:
    other = {"gateway": "control", "control": "gateway"}[section]
    text = f"{section}: {{port: {listener}}}\n{other}: {{port: {free_port()}}}\n"
    said = fails("up", "-f", config(tmp_path, text), home=tmp_path)
    assert f"port {listener} on 127.0.0.1" in said
    assert f"by process {os.getpid()}" in said
    assert f"set {section}.port" in said


def test_one_port_for_both(tmp_path: Path) -> None:
    port = free_port()
    file = config(tmp_path, f"gateway: {{port: {port}}}\ncontrol: {{port: {port}}}\n")
    said = fails("up", "-f", file, home=tmp_path)
    assert f"gateway.port and control.port are both {port}" in said


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    text = f"gateway: {{host: 192.0.2.1, port: {free_port()}}}\ncontrol: {{port: 0}}\n"
    assert "Set gateway.host" in fails("up", "-f", config(tmp_path, text), home=tmp_path)


ON_CUDA = "models: {big: {device: cuda}, small: {}}\n"
# So that a machine with GPUs has none for the command.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_up_refuses_a_model_that_asks_for_a_gpu_where_there_is_none(tmp_path: Path) -> None:
    text = f"gateway: {{port: {free_port()}}}\ncontrol: {{port: {free_port()}}}\n{ON_CUDA}"
    said = fails("up", "-f", config(tmp_path, text), home=tmp_path, **NO_GPU)
    assert said.startswith("error: models.big.device: cuda, but ")
    assert said.endswith("; allowed on this machine: auto, cpu")
    assert "small" not in said


@pytest.mark.usefixtures("nvml_here")
def test_up_lets_a_model_ask_for_a_gpu_that_nvml_shows() -> None:
    preflight.check_devices(parse_config({"models": {"big": {"device": "cuda"}}}, source="test"))


def test_doctor_fails_a_model_that_asks_for_a_gpu_where_there_is_none(tmp_path: Path) -> None:
    file = config(tmp_path, f"gateway: {{port: 0}}\ncontrol: {{port: 0}}\n{ON_CUDA}")
    done = serving("doctor", "-f", file, home=tmp_path, env=NO_GPU)
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if "models." in line)
    assert line.startswith("fail  models.big.device: cuda, but ")
    assert line.endswith("Set it to auto or cpu, or serve on a machine with a GPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command 'nonsense'; see `serving --help`"),
        (["up", "--bogus"], "No such option: --bogus; see `serving up --help`"),
        (["infer", "m"], "Missing option '--input'"),
        (["up", "--timeout", "long"], "Invalid value for '--timeout'"),
        (["config", "bogus"], "No such command 'bogus'; see `serving config --help`"),
        (["infer", "m/1", "--version", "2", "--input", "x.npy"], "leave out --version 2"),
        (["infer", "m@", "--input", "x.npy"], "expected NAME, NAME@ALIAS or NAME/VERSION"),
        (["show", "/1"], "expected NAME, NAME@ALIAS or NAME/VERSION"),
    ],
)
def test_a_usage_error_is_one_plain_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in fails(*arguments, home=tmp_path, code=2)


def test_a_command_that_is_interrupted_says_so_in_one_line(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.touch()
    with subprocess.Popen(
        [*SERVING, "register", "m", str(model)],
        env={**os.environ, "SERVING_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"loading and running {model}\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read() == "error: interrupted\n"
    assert process.returncode == 130


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "serving", "config", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["title"] == "ServingConfig"


def test_it_says_its_version(tmp_path: Path) -> None:
    done = serving("--version", home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"serving {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_without_a_command_it_prints_help(tmp_path: Path, arguments: list[str]) -> None:
    done = serving(*arguments, home=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage: serving" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models:\n  m:\n    version: @champion\n", 'needs quotes, as in version: "@champion"'),
        ("models:\n  m:\n", "'models.m' has nothing after it; write its settings, or {}"),
        ("models:\n", "'models' has nothing after it"),
        ("gateway:\n", "'gateway' has nothing after it"),
    ],
)
def test_what_everybody_writes_once_has_a_hint(tmp_path: Path, text: str, words: str) -> None:
    file = config(tmp_path, text)
    said = fails("up", "-f", file, home=tmp_path, code=2)
    assert words in said
    assert str(file) in said


def test_a_wrong_alias_ends_up_before_ray_starts(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    Registry(f"sqlite:///{tmp_path / 'registry.db'}").register("m", tmp_path / "bundle")
    text = 'models: {m: {version: "@nobody"}}\ngateway: {port: 0}\ncontrol: {port: 0}\n'
    done = serving("up", "-f", config(tmp_path, text), home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: model 'm' has no alias @nobody; versions: 1")


# A controller that runs.


def test_what_runs_on_the_home_is_found_without_a_file(tmp_path: Path) -> None:
    with admin_api(tmp_path, {"m": {"version": "1"}}) as port:
        ports = f"gateway: {{port: {free_port()}}}\ncontrol: {{port: {port}}}\nhome: {tmp_path}\n"
        held = load_config(config(tmp_path, ports))
        any_port = config(tmp_path, f"control: {{port: 0}}\nhome: {tmp_path}\n")
        with home.hold(held):
            for arguments in ([], ["-f", any_port]):
                done = serving("status", "--json", *arguments, home=tmp_path)
                assert done.returncode == 0, done.stderr
                assert [m["name"] for m in json.loads(done.stdout)["models"]] == ["m"]
            array = tmp_path / "x.npy"
            np.save(array, np.zeros(3))
            said = fails("infer", "m", "--input", array, home=tmp_path)
            assert f"no gateway answers at http://127.0.0.1:{held.gateway.port}" in said
        said = fails("status", "-f", any_port, home=tmp_path)
        assert "control.port is 0" in said
        assert f"none runs on {tmp_path}" in said
    assert home.running(tmp_path) is None


def test_a_file_without_models_stops_nothing_unless_told_to(tmp_path: Path) -> None:
    file = config(tmp_path, f"home: {tmp_path}\n")
    with admin_api(tmp_path, {"m": {"version": "1"}, "n": {"version": "2"}}) as port:
        call = ["apply", "-f", file, "--url", f"http://127.0.0.1:{port}"]
        said = fails(*call, home=tmp_path, code=2)
        assert str(file) in said
        assert "stop all that run: m, n" in said
        assert "--stop-all" in said
        status = Admin(f"http://127.0.0.1:{port}").status
        assert status()["apply"]["id"] == 1
        empty = tmp_path / "empty.yaml"
        empty.write_text("")
        # Its other settings are the defaults, which are not those that run.
        said = fails("apply", "-f", empty, *call[3:], home=tmp_path / "other", code=2)
        assert f"{empty}: it has no models" in said
        assert "stop all that run: m, n" in said
        assert "--stop-all" in said
        dry = serving(*call, "--dry-run", home=tmp_path)
        assert dry.returncode == 0, dry.stderr
        assert dry.stdout.count("stop") == 2
        done = serving(*call, "--stop-all", "--no-wait", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert status()["apply"]["id"] == 2


def test_up_takes_no_other_deployments_controller_for_its_own(tmp_path: Path) -> None:
    with admin_api(tmp_path, {}) as port:
        raw = {"home": str(tmp_path), "control": {"port": port}}
        settings = parse_config(raw, source="test")
        admin = Admin(f"http://127.0.0.1:{port}")
        assert up.is_own(settings, "first", admin)
        with pytest.raises(ConflictError, match=f"port {port} .* another deployment") as refusal:
            up.is_own(settings, "mine", admin)
    assert f"process {os.getpid()}, home {tmp_path}" in str(refusal.value)
    assert "set control.port" in str(refusal.value)
    assert not up.is_own(settings, "mine", admin), "nobody answers yet"


def test_a_store_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    file = config(tmp_path, "gateway: {port: 0}\ncontrol: {port: 0}\n")
    assert "not an SQLite database" in fails("up", "-f", file, home=tmp_path)


def test_a_store_that_is_locked(tmp_path: Path) -> None:
    file = config(tmp_path, "gateway: {port: 0}\ncontrol: {port: 0}\n")
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute("CREATE TABLE t (x)")
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in fails("up", "-f", file, home=tmp_path)


def test_nothing_runs(tmp_path: Path) -> None:
    assert "nothing runs" in fails("down", home=tmp_path)
    url = f"http://127.0.0.1:{free_port()}"
    file = config(tmp_path, "models: {}\n")
    for command in (["status"], ["apply", "-f", file]):
        said = (
            fails(*command, home=tmp_path, SERVING_CONTROL_URL=url)
            if command == ["status"]
            else (fails(*command, "--url", url, home=tmp_path))
        )
        assert url in said
        assert "serving up" in said
    array = tmp_path / "x.npy"
    np.save(array, np.zeros(3))
    assert "serving up" in fails("infer", "m", "--input", array, "--url", url, home=tmp_path)


def test_something_else_answers(tmp_path: Path, listener: int) -> None:
    """A port on which nobody ever answers is not a controller: it must not hang for ever."""
    with socket.create_connection(("127.0.0.1", listener)):
        url = f"http://127.0.0.1:{listener}"
        assert "timed out" in fails("status", "--url", url, home=tmp_path)
        said = fails("rollout", "abort", "m", "--url", url, "--reason", "bad", home=tmp_path)
    assert "It may do what it was told all the same" in said


@pytest.fixture
def grpc_url() -> Iterator[str]:
    """Where each connection is answered as a gRPC server does, before it is asked anything."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"\0\0\0\x04\0\0\0\0\0\n")
            self.request.recv(65536)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_something_answers_that_does_not_speak_http(tmp_path: Path, grpc_url: str) -> None:
    array = tmp_path / "x.npy"
    np.save(array, np.zeros(3))
    for command in (["status"], ["infer", "m", "--input", array]):
        said = fails(*command, "--url", grpc_url, home=tmp_path)
        assert grpc_url in said
        assert "does not speak HTTP" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "accuracy"], "KEY=NUMBER"),
        (["--metric", "accuracy=good"], "KEY=NUMBER"),
        (["--dataset", "digits"], "NAME=URI@DIGEST"),
        (["--dataset", "digits=uri"], "NAME=URI@DIGEST"),
        (["--batch", "big"], "allowed: auto, dynamic, fixed, none"),
        (["--training-time", "-1"], "0 or more"),
        (["--training-time", "nan"], "0 or more"),
        (["--metric", "accuracy=nan"], "expected a finite number"),
        (["--alias", "1"], "is not an alias; allowed: a letter"),
        (["--alias", "latest"], "is reserved"),
    ],
)
def test_register_refuses_bad_options_before_it_loads_anything(
    tmp_path: Path, options: list[str], words: str
) -> None:
    said = fails("register", "m", "no-such.onnx", *options, home=tmp_path, code=2)
    assert words in said


def test_register_refuses_a_bad_name_before_it_loads_anything(tmp_path: Path) -> None:
    said = fails("register", "bad name", "no-such.onnx", home=tmp_path, code=2)
    assert "'bad name' is not a model name; allowed: letters" in said


def test_register_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    for call in (["no-such.onnx"], [tmp_path], [broken, "--sample", "no-such.npz"]):
        said = fails("register", "m", *call, home=tmp_path, code=2)
        assert "does not exist" in said or "is not a file" in said
    done = serving("register", "m", broken, home=tmp_path)
    assert done.returncode == 1
    *progress, last = done.stderr.strip().splitlines()
    assert progress == [f"loading and running {broken}"]
    assert last.startswith("error: ")
    assert "broken.onnx" in last


def test_an_unreadable_registry(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database" * 100)
    for command in (["models"], ["show", "m"]):
        assert "registry.db" in fails(*command, home=tmp_path)


def test_doctor_says_what_to_do_and_fails(tmp_path: Path, listener: int) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database" * 100)
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    text = f"gateway: {{port: {listener}}}\ncontrol: {{port: {free_port()}}}\n"
    done = serving("doctor", "--json", "-f", config(tmp_path, text), home=tmp_path)
    assert done.returncode == 1
    findings = {f["check"]: f for f in json.loads(done.stdout)}
    failed = {check for check, f in findings.items() if f["verdict"] == "fail"}
    assert failed == {"gateway port", "store", "registry"}
    assert all(findings[check]["advice"] for check in failed)
    assert "set gateway.port" in findings["gateway port"]["advice"]


def test_doctor_is_content_with_an_empty_home(tmp_path: Path) -> None:
    file = config(tmp_path, f"gateway: {{port: {free_port()}}}\ncontrol: {{port: {free_port()}}}\n")
    done = serving("doctor", "-f", file, home=tmp_path)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    checks = ["Python", "Ray", "torch", "ONNX Runtime", "NVML", "disk", "store", "registry"]
    assert all(any(check in line for line in lines) for check in checks)
    assert not (tmp_path / "store.db").exists(), "looking changes nothing"


def test_an_unexpected_failure_shows_no_traceback(tmp_path: Path) -> None:
    """A home that is a file: nobody planned for a command to meet it."""
    home = tmp_path / "home"
    home.write_text("")
    done = serving("models", home=home)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
