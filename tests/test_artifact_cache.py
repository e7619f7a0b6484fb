import errno
import multiprocessing
import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from serving import artifacts
from serving.artifacts import cache_dir, place, place_copy, read_manifest, verify
from serving.errors import ArtifactError
from tests.bundles import digest_of, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(p.stat().st_mode) & 0o222 for p in (directory, *directory.rglob("*"))}


def test_the_cache_holds_a_verified_read_only_copy(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    placed = place_copy(tmp_path / "home", digest, bundle)
    assert placed == cache_dir(tmp_path / "home", digest)
    assert verify(placed, digest) == read_manifest(bundle)
    assert modes(placed) == {0}
    assert not [p for p in placed.parent.iterdir() if p.name.endswith(".partial")]


def test_what_is_cached_is_not_fetched_again(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    place_copy(tmp_path, digest, bundle)

    def refuse(_: Path) -> None:
        pytest.fail("fetched although it is cached")

    assert place(tmp_path, digest, refuse) == cache_dir(tmp_path, digest)


def test_a_tampered_source_leaves_no_trace_and_is_named(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    (bundle / "model.pt2").write_bytes(b"evil")
    with pytest.raises(ArtifactError, match=f"{bundle}/model.pt2: was changed"):
        place_copy(tmp_path / "home", digest, bundle)
    left = [p.name for p in (tmp_path / "home/artifacts").iterdir()]
    assert left == [f".{digest.removeprefix('sha256:')}.lock"]


def test_a_tampered_cache_is_refused_and_says_what_to_do(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    placed = place_copy(tmp_path, digest, bundle)
    (placed / "model.pt2").chmod(0o644)
    (placed / "model.pt2").write_bytes(b"weightz" * 1000)
    with pytest.raises(ArtifactError, match=f"model.pt2: was changed .*remove {placed} to have"):
        place_copy(tmp_path, digest, bundle)


def test_a_copy_that_was_interrupted_is_begun_anew(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    target = cache_dir(tmp_path, digest)
    partial = target.with_name(f".{target.name}.partial")
    (partial / "nested").mkdir(parents=True)
    (partial / "nested" / "junk").write_bytes(b"half")
    artifacts.make_durable(partial, read_only=True)
    assert verify(place_copy(tmp_path, digest, bundle), digest)


def test_an_interrupt_while_copying_is_passed_on(bundle: Path, tmp_path: Path) -> None:
    def interrupted(directory: Path) -> None:
        (directory / "model.pt2").write_bytes(b"half")
        raise KeyboardInterrupt

    digest = digest_of(bundle)
    with pytest.raises(KeyboardInterrupt):
        place(tmp_path, digest, interrupted)
    assert not cache_dir(tmp_path, digest).exists()
    assert verify(place_copy(tmp_path, digest, bundle), digest)


def test_threads_that_want_one_bundle_copy_it_once(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    copies = []
    barrier = threading.Barrier(6)
    placed = []

    def fill(directory: Path) -> None:
        copies.append(directory)
        for path in ("MANIFEST.json", "model.pt2", "signature.json", "nested/labels.txt"):
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes((bundle / path).read_bytes())

    def work() -> None:
        barrier.wait()
        placed.append(place(tmp_path, digest, fill))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert placed == [cache_dir(tmp_path, digest)] * 6
    assert len(copies) == 1


def _place_in_process(home: str, digest: str, source: str, start, results) -> None:
    start.wait()
    results.put(str(place_copy(Path(home), digest, Path(source))))


def test_processes_that_want_one_bundle_all_get_it(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path), digest, str(bundle), start, results)
    processes = [context.Process(target=_place_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    got = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert got == {str(cache_dir(tmp_path, digest))}
    assert verify(cache_dir(tmp_path, digest), digest)


def _place_with_little_disk(home: str, digest: str, source: str, results) -> None:
    # A file may not grow past this: what a full disk does, for this process alone.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        place_copy(Path(home), digest, Path(source))
    except ArtifactError as error:
        results.put(str(error))


def test_a_disk_without_room_is_one_clear_error(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(
        target=_place_with_little_disk, args=(str(tmp_path), digest, str(bundle), results)
    )
    process.start()
    message = results.get(timeout=30)
    process.join()
    assert os.strerror(errno.EFBIG) in message
    assert not cache_dir(tmp_path, digest).exists()


def test_a_home_that_cannot_be_made_is_one_clear_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file.*: (File exists|Not a directory)"):
        place_copy(tmp_path / "file", digest_of(bundle), bundle)
