"""The command line starts fast, and its reference pages are those of the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from serving.config import ServingConfig, load_config
from tests.e2e.deployment import SERVING, serving

ROOT = Path(__file__).parents[2]


def test_no_reference_page_has_fallen_behind() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run docs/generate.py: {done.stdout}{done.stderr}"


def test_the_reference_configuration_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVING_HOME", raising=False)
    assert load_config(ROOT / "configs" / "serving.yaml") == ServingConfig()


@pytest.mark.parametrize("name", ["serving.yaml", "demo.yaml", "container.yaml"])
def test_every_configuration_fits_the_schema(name: str, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "configs" / "serving.schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "configs" / name).read_text()), schema)
    load_config(ROOT / "configs" / name)


def test_the_schema_is_printed(tmp_path: Path) -> None:
    done = serving("config", "schema", home=tmp_path)
    assert json.loads(done.stdout) == json.loads(
        (ROOT / "configs" / "serving.schema.json").read_text()
    )


def test_help_loads_no_heavy_library() -> None:
    """What makes `serving --help` fast: ray, torch and the like are imported by who needs them."""
    code = (
        "import sys, serving.cli.main; "
        "print(sorted({'ray', 'torch', 'mlflow', 'onnxruntime', 'sqlalchemy', 'numpy', 'pydantic'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    """Processor time, which neighbours do not stretch."""
    before = os.times()
    subprocess.run([*SERVING, "--help"], capture_output=True, check=True)
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    assert used < 0.6
