"""Paths and URLs behave the same; a store's failures are one line; what grows or is mapped lies on this machine."""

import asyncio
import os
import random

import gcsfs
import pytest

from eagle3_xla import local_copies, storage


@pytest.fixture(params=["path", "url"])
def place(request, tmp_path):
    """A folder that doesn't exist yet, on the disk and in the bucket."""
    if request.param == "path":
        return tmp_path / "place"
    bucket = request.getfixturevalue("gcs")
    return f"{bucket.url}/place-{random.randrange(10**9)}"


@pytest.fixture
def no_waiting(monkeypatch):
    """gcsfs tries again after 1, 2, 4, ... seconds; here at once."""
    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda seconds: sleep(0))


def test_a_file_and_a_folder(place):
    file = storage.join(place, "deep", "file.txt")
    assert not storage.exists(place) and not storage.exists(file) and storage.entries(place) == []
    storage.make_folder(storage.join(place, "deep"))
    storage.write(file, "one\n")
    storage.write(file, b"one\ntwo\n")
    assert storage.exists(file) and storage.read(file) == b"one\ntwo\n"
    assert storage.is_folder(place) and storage.is_folder(storage.join(place, "deep")) and not storage.is_folder(file)
    assert storage.entries(place) == ["deep"] and storage.entries(storage.join(place, "deep")) == ["file.txt"]
    assert list(storage.open_file(file)) == [b"one\n", b"two\n"]
    before = storage.files(place)
    assert list(before) == ["deep/file.txt"]
    storage.write(file, b"one\nTWO\n")
    assert storage.files(place) != before
    storage.remove(place)
    storage.remove(place)
    assert not storage.exists(place) and not storage.exists(file)


def test_a_folder_is_whole_or_absent(place):
    def write(name: str, content: str, fail: bool = False) -> None:
        with storage.whole_folder(storage.join(place, name), last="z") as folder:
            (folder / "a").write_text(content)
            (folder / "z").write_text(content)
            assert not fail

    write("step-1", "one")
    with pytest.raises(AssertionError):
        write("step-2", "half", fail=True)
    assert storage.whole_folders(place, last="z", prefix="step-") == ["step-1"] == storage.entries(place)
    write("step-1", "again")
    assert storage.read(storage.join(place, "step-1", "a")) == b"again"
    # What a kill leaves in the middle of writing: on a disk another name, in a store no last file.
    half = "step-2" if storage.is_url(place) else ".partial-step-2"
    storage.make_folder(storage.join(place, half))
    storage.write(storage.join(place, half, "a"), "half")
    assert storage.whole_folders(place, last="z", prefix="step-") == ["step-1"]
    storage.remove_unfinished(place, last="z", prefix="step-")
    assert storage.entries(place) == ["step-1"]


def test_copies_are_made_once_for_each_version(gcs, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    url = f"{gcs.url}/versions"
    for name, content in (("a.txt", "one"), ("below/b.txt", "two"), ("big.bin", "left out")):
        storage.write(f"{url}/{name}", content)
    folder = local_copies.local_folder(url, only=("*.txt", "below/*.txt"))
    assert storage.files(folder).keys() == {"a.txt", "below/b.txt"} and (folder / "a.txt").read_text() == "one"
    assert len(synced) == 2 and all(storage.PARTIAL in name for name in synced)  # before a name that is trusted
    requests = gcs.requests
    assert local_copies.local_folder(url, only=("*.txt", "below/*.txt")) == folder
    assert gcs.requests == requests + 1  # the listing alone
    storage.write(f"{url}/a.txt", "three")
    renewed = local_copies.local_folder(url, only=("*.txt", "below/*.txt"))
    assert (renewed / "a.txt").read_text() == "three" and (folder / "a.txt").read_text() == "one"
    assert (renewed / "below/b.txt").resolve() == (folder / "below/b.txt").resolve()
    assert storage.read_range(f"{url}/a.txt", 1, 3) == b"hre"


def test_what_grows_while_it_is_copied(gcs, monkeypatch):
    """gcsfs asks for a file's size once and sends it in parts when it is large."""
    url = f"{gcs.url}/growing-meanwhile"
    local = local_copies.LocalFolder(url)
    log = local.path / "metrics.jsonl"
    log.write_bytes(b"x" * (6 << 20))
    sent = gcsfs.core.upload_chunk

    async def row_meanwhile(*arguments):
        with log.open("a") as file:
            file.write("row\n")
        return await sent(*arguments)

    monkeypatch.setattr(gcsfs.core, "upload_chunk", row_meanwhile)
    local.upload()
    assert storage.read(f"{url}/metrics.jsonl") == b"x" * (6 << 20)
    monkeypatch.undo()
    local.upload()
    assert storage.read(f"{url}/metrics.jsonl") == log.read_bytes()


def test_what_grows_is_copied_when_it_has_changed(gcs):
    url = f"{gcs.url}/growing"
    first = local_copies.LocalFolder(url)
    (first.path / "metrics.jsonl").write_text("1\n")
    (first.path / "other").write_text("same")
    first.upload()
    with (first.path / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    requests = gcs.requests
    first.upload()
    assert gcs.requests == requests + 1
    again = local_copies.LocalFolder(url)
    again.restore("metrics.jsonl")
    again.restore("never written")
    assert storage.files(again.path).keys() == {"metrics.jsonl"}
    assert (again.path / "metrics.jsonl").read_text() == "1\n2\n"


def test_what_is_on_its_way_is_of_one_block_alone(monkeypatch, tmp_path):
    """Here of two blocks of one process, for which a lock is what it is for two processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = storage.cached("scratch", "gs://bucket/file")
    left.mkdir(parents=True)
    (left / "file").write_text("of a process that was killed")
    with storage.scratch("gs://bucket/file") as first:
        assert not left.exists() and not any(first.iterdir())
        (first / "file").write_text("half")
        with storage.scratch("gs://bucket/file") as second:
            assert not any(second.iterdir()) and (first / "file").read_text() == "half"
        assert (first / "file").exists() and not second.exists()
    assert not first.exists()
    theirs, opened = first.parent / "theirs", os.open
    theirs.mkdir()

    def refuse(path, *arguments, **named):
        if path == theirs:
            raise PermissionError
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    with storage.scratch("gs://bucket/file"):
        assert theirs.exists()


def test_failures_are_one_line(gcs, no_waiting, tmp_path):
    def message(kind, function, *arguments) -> str:
        with pytest.raises(kind) as failure:
            function(*arguments)
        assert "\n" not in str(failure.value)
        return str(failure.value)

    for function in (storage.exists, storage.entries, storage.read, storage.files):
        said = message(PermissionError, function, "gs://forbidden/run")
        assert said.startswith("gs://forbidden/run: access is denied (") and "test@example.com" in said
    assert "access is denied" in message(PermissionError, storage.write, "gs://forbidden/run/file", b"x")
    assert "no such file" in message(FileNotFoundError, storage.read, f"{gcs.url}/nothing")
    assert "no such file" in message(FileNotFoundError, lambda: storage.open_file(f"{gcs.url}/nothing").read())
    assert "no such file" in message(FileNotFoundError, storage.write, "gs://no-such-bucket/file", b"x")
    gcs.break_uploads = "broken"
    try:
        assert "the store failed" in message(OSError, storage.write, f"{gcs.url}/broken", b"x" * 1000)
        (tmp_path / "file").write_bytes(os.urandom(6 << 20))
        assert "the store failed" in message(OSError, storage.upload, tmp_path / "file", f"{gcs.url}/broken")
    finally:
        gcs.break_uploads = ""
    assert not storage.exists(f"{gcs.url}/broken")
    assert "nosuch:// can't be used here" in message(OSError, storage.read, "nosuch://a/b")
    with pytest.raises(AssertionError):  # a URL that went through Path has lost a slash: never a folder named gs:
        storage.exists(storage.Path("gs://bucket/file"))
