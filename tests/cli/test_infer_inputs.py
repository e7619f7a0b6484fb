"""What `serving infer` makes of an array of another type than the model's: said, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.cli import infer
from serving.errors import ConfigError


def read(file: Path, array: Any, datatype: str) -> Any:
    np.save(file, array)
    inputs, _ = infer._read(file, [{"name": "x", "datatype": datatype}])
    return inputs[0][1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.npy"


@pytest.mark.parametrize(
    ("array", "datatype", "said"),
    [
        (np.array([0.5, np.nan, np.inf]), "FP32", "float64 converted to FP32 without loss"),
        (np.array([0.5, 0.1]), "FP32", "float64 converted to FP32, 1 of 2 values rounded"),
        (np.array([1, 2]), "FP32", "int64 converted to FP32 without loss"),
        (np.array([1.0, 2.0]), "INT32", "float64 converted to INT32 without loss"),
        (np.array([0.5, 0.1], "f4"), "BF16", "float32 converted to BF16, 1 of 2 values rounded"),
    ],
)
def test_a_conversion_is_said(
    file: Path, array: Any, datatype: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    read(file, array, datatype)
    assert capsys.readouterr().err == f"{file}: input x: {said}\n"


@pytest.mark.parametrize("array", [np.array([0.1], "<f4"), np.array([0.1], ">f4")])
def test_what_is_of_its_type_is_not_mentioned(
    file: Path, array: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(file, array, "FP32").dtype == np.dtype("<f4")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("array", "datatype", "said"),
    [
        (np.array([1e39]), "FP32", "a value of float64 is out of range"),
        (np.array([3.4e38], "f4"), "BF16", "a value of float32 is out of range"),
        (np.array([1e5], "f4"), "FP16", "a value of float32 is out of range"),
        (np.array([2**24 + 1]), "FP32", "a value of int64 does not fit"),
        (np.array([2**53 + 1]), "FP64", "a value of int64 does not fit"),
        (np.array([0.5]), "INT64", "a value of float64 does not fit"),
        (np.array([2**40]), "INT32", "a value of int64 does not fit"),
        (np.array([1 + 2j]), "FP32", "it holds complex128"),
        (np.array(["1.5"]), "FP32", "it holds <U3"),
    ],
)
def test_values_that_do_not_survive_are_refused(
    file: Path, array: Any, datatype: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(file, array, datatype)
    assert str(caught.value) == f"{file}: input x is not {datatype}: {said}"
    assert capsys.readouterr().err == ""


def test_numbers_of_json_have_no_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text("[0.1, 1]")
    declared = [{"name": "x", "datatype": "FP32"}]
    infer._read(file, declared)
    assert capsys.readouterr().err == ""
    file.write_text("[1e39]")
    with pytest.raises(ConfigError, match="out of range"):
        infer._read(file, declared)
