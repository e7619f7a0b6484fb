import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.artifacts import (
    Manifest,
    build_manifest,
    cache_dir,
    read_signature,
    verify,
    write_manifest,
)
from serving.errors import ArtifactError
from tests.bundles import SIGNATURE, digest_of, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def touch_bytes(directory: Path) -> None:
    """A file whose name is not UTF-8."""
    with open(os.fsencode(directory) + b"/\xff", "wb"):
        pass


# Digest and manifest.


def test_the_digest_is_that_of_manifest_json_and_depends_on_nothing_else(
    bundle: Path, tmp_path: Path
) -> None:
    raw = (bundle / "MANIFEST.json").read_bytes()
    assert digest_of(bundle) == "sha256:" + hashlib.sha256(raw).hexdigest()
    paths = [row["path"] for row in json.loads(raw)]
    assert paths == ["model.pt2", "nested/labels.txt", "signature.json"]
    copy = tmp_path / "copy"
    (copy / "nested").mkdir(parents=True)
    for path in reversed(paths):
        (copy / path).write_bytes((bundle / path).read_bytes())
    (copy / "an empty directory").mkdir()
    assert build_manifest(copy).digest == digest_of(bundle)


@given(
    st.dictionaries(
        st.text("abc./é", min_size=1, max_size=6).filter(
            lambda p: all(part not in ("", ".", "..") for part in p.split("/"))
        ),
        st.tuples(st.integers(0, 2**40), st.binary(max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_a_manifest_survives_its_json_forms(files: dict[str, tuple[int, bytes]]) -> None:
    rows = [
        {"path": p, "size": size, "sha256": hashlib.sha256(data).hexdigest()}
        for p, (size, data) in files.items()
    ]
    manifest = Manifest.from_dict({"files": rows})
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    assert Manifest.from_dict({"files": json.loads(manifest.canonical())}) == manifest
    assert Manifest.from_dict({"files": rows[::-1]}).digest == manifest.digest


GOOD_ROW = {"path": "a", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        None,
        "text",
        [GOOD_ROW, GOOD_ROW],
        [{"path": "a", "size": 1}],
        *(
            [{**GOOD_ROW, **change}]
            for change in (
                {"path": "../a"},
                {"path": "/etc/passwd"},
                {"path": "a/../b"},
                {"path": "a//b"},
                {"path": "./a"},
                {"path": ""},
                {"path": "a\0b"},
                {"path": "a\nb"},
                {"path": "..\\a"},
                {"path": 3},
                {"path": "MANIFEST.json"},
                {"size": -1},
                {"size": "1"},
                {"size": True},
                {"sha256": "0" * 63},
                {"sha256": None},
            )
        ),
    ],
)
def test_a_peers_manifest_is_not_believed(rows: object) -> None:
    with pytest.raises(ArtifactError, match="manifest"):
        Manifest.from_dict({"files": rows})


def test_an_empty_directory_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model file"):
        build_manifest(tmp_path)


# Verification names the file.


def test_an_untouched_bundle_verifies(bundle: Path) -> None:
    assert verify(bundle, digest_of(bundle)) == build_manifest(bundle)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda d: (d / "model.pt2").write_bytes(b"weightz" * 1000), "model.pt2: was changed"),
        (lambda d: (d / "model.pt2").write_bytes(b""), "model.pt2: was changed .* found 0 bytes"),
        (lambda d: (d / "nested/labels.txt").unlink(), "nested/labels.txt: is missing"),
        (lambda d: (d / "nested/more.txt").write_text(""), "nested/more.txt: is not part of"),
        (lambda d: (d / "MANIFEST.json").unlink(), "MANIFEST.json: is missing"),
        (lambda d: (d / "MANIFEST.json").write_text("{"), "MANIFEST.json: is not valid JSON"),
        (lambda d: (d / "MANIFEST.json").write_text("[" * 100_000), "MANIFEST.json: is not"),
        (lambda d: (d / "link").symlink_to("model.pt2"), "link: is a link"),
        (lambda d: (d / "nested/dir").symlink_to("/etc"), "dir: is a link"),
        (lambda d: os.mkfifo(d / "pipe"), "pipe: is not a regular file"),
        (lambda d: (d / "a\nb").write_text(""), r"'a\\nb' is refused"),
        (touch_bytes, "is refused"),
    ],
)
def test_a_changed_bundle_is_refused_by_name(bundle: Path, tamper, message: str) -> None:
    digest = digest_of(bundle)
    tamper(bundle)
    with pytest.raises(ArtifactError, match=message):
        verify(bundle, digest)


def test_a_consistently_forged_bundle_still_has_another_digest(bundle: Path) -> None:
    digest = digest_of(bundle)
    (bundle / "model.pt2").write_bytes(b"evil")
    write_manifest(bundle, build_manifest(bundle))
    with pytest.raises(ArtifactError, match=f"MANIFEST.json: its digest is .* expected {digest}"):
        verify(bundle, digest)


@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(tmp_path_factory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("bits")
    content = data.draw(st.binary(min_size=1, max_size=64))
    (directory / "m").write_bytes(content)
    manifest = build_manifest(directory)
    write_manifest(directory, manifest)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (directory / "m").write_bytes(flipped)
    with pytest.raises(ArtifactError, match="m: was changed"):
        verify(directory, manifest.digest)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "0" * 63, "md5:" + "0" * 64, "../x"])
def test_what_is_not_a_digest_never_becomes_a_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ArtifactError, match="is not a digest"):
        cache_dir(tmp_path, digest)
    with pytest.raises(ArtifactError, match="is not a digest"):
        verify(tmp_path, digest)


# signature.json.


def test_the_signature_comes_back(bundle: Path) -> None:
    info = read_signature(bundle)
    assert (info.signature, info.platform, info.model_file) == (
        SIGNATURE,
        "pytorch_export",
        "model.pt2",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platform": "tensorflow"}, "platform 'tensorflow'; allowed: onnxruntime_onnx"),
        ({"model_file": "../../etc/passwd"}, "is refused"),
        ({"model_file": None}, "model_file is None"),
        ({"batch": "sometimes"}, "signature is malformed"),
        ({"inputs": []}, "at least one input"),
    ],
)
def test_a_bad_signature_file_is_refused(bundle: Path, change: dict, message: str) -> None:
    path = bundle / "signature.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        read_signature(bundle)


@pytest.mark.parametrize("text", ["[]", "not json", "\xff"])
def test_a_signature_file_that_is_not_an_object_is_refused(bundle: Path, text: str) -> None:
    (bundle / "signature.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"signature.json: (expected|is not)"):
        read_signature(bundle)
