"""Every YAML that is read: what is wrong with one is said once, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.config import load_config
from serving.errors import ConfigError
from serving.prices import load_rows
from serving.rollout_plans import load_plan
from serving.yaml_files import read_yaml


def refusal(file: Path, text: str, read: Callable[[Path], Any] = read_yaml) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize("read", [load_config, load_plan, load_rows])
def test_a_key_that_is_written_twice_is_refused(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    file = tmp_path / "f.yaml"
    text = "models:\n  mlp: {version: 1}\n  m: {}\n  mlp: {version: 2}\n"
    assert refusal(file, text, read) == (
        f"{file}: the key 'mlp' is written twice, in lines 2 and 4; keep one"
    )


def test_keys_that_yaml_reads_alike_are_the_same_key(tmp_path: Path) -> None:
    said = refusal(tmp_path / "f.yaml", 'a: 1\n"a": 2\n')
    assert said.endswith("the key 'a' is written twice, in lines 1 and 2; keep one")


def test_what_a_merge_brings_may_be_written_again(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("x: &x {a: 1, b: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: *y, b: 3}\n")
    assert read_yaml(file)["z"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here"),
        (
            "m:\n  p: {v: [1\nx: 2\n",
            "line 3, column 2: expected ',' or ']', but got ':' "
            "(while parsing a flow sequence that begins in line 2)",
        ),
        ("a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        (
            "--- 1\n--- 2\n",
            "line 2, column 1: expected a single document in the stream but found another document",
        ),
        ("a: *foo\n", "line 1, column 4: found undefined alias 'foo'"),
        ("a: 1\nb: \x01\n", "line 2, column 4: special characters are not allowed"),
        ("a: 2026-13-01\n", "month must be in 1..12"),
    ],
)
def test_what_is_not_yaml_is_said_once(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "f.yaml"
    assert refusal(file, text) == f"{file}: is not valid YAML: {said}"
