"""Whatever is wrong, the command line says it in one line on stderr and exits with a code."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.deployment import free_port, serving


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
    assert str(listener) in said
    assert f"set {section}.port" in said


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
        said = fails("status", "--url", f"http://127.0.0.1:{listener}", home=tmp_path)
    assert "timed out" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metric", "accuracy"], "KEY=NUMBER"),
        (["--metric", "accuracy=good"], "KEY=NUMBER"),
        (["--dataset", "digits"], "NAME=URI@DIGEST"),
        (["--dataset", "digits=uri"], "NAME=URI@DIGEST"),
        (["--batch", "big"], "allowed: auto, dynamic, fixed, none"),
        (["--training-time", "-1"], "0 or more"),
    ],
)
def test_register_refuses_bad_options_before_it_loads_anything(
    tmp_path: Path, options: list[str], words: str
) -> None:
    said = fails("register", "m", "no-such.onnx", *options, home=tmp_path, code=2)
    assert words in said


def test_register_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
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
