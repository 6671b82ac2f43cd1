"""Files and folders, on this machine or on an object store: a path, or a URL that fsspec knows (gs://, s3://, ...).

What is written is there whole or not at all: a file on a disk by a rename, an object by the store's own promise. A
folder (`whole_folder`) is renamed too; object stores have no rename, so there its last file is written last and
removed first, and without it the folder counts as absent. They have no append either: what grows lies in a folder of
this machine and is copied (local_copies.py).

Every failure is an OSError whose message is one line and names the location.
"""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"
OPTIONS = {"use_listings_cache": False}  # others write too
CHECKED = {"gs": {"consistency": "md5"}, "gcs": {"consistency": "md5"}}  # what is written is compared with the store's
Location = str | Path  # a URL is always a string: Path would make one slash of two


def is_url(location: Location) -> bool:
    text = str(location)
    assert not (isinstance(location, Path) and re.match(r"[a-z][a-z0-9+.-]+:/[^/]", text)), f"{text} was a URL"
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def join(folder: Location, *names: str) -> Location:
    """A location in `folder`: a string of a URL's, else a Path."""
    return "/".join([str(folder).rstrip("/"), *map(str, names)]) if is_url(folder) else Path(folder, *names)


def base_name(location: Location) -> str:
    return str(location).rstrip("/").rpartition("/")[2]


def exists(location: Location) -> bool:
    """Whether a file or a folder is there; where that can't be known, an error says why."""
    if not is_url(location):
        return Path(location).exists()
    with _at(location) as (store, path), contextlib.suppress(FileNotFoundError):
        return bool(store.info(path))
    return False


def is_folder(location: Location) -> bool:
    if not is_url(location):
        return Path(location).is_dir()
    with _at(location) as (store, path), contextlib.suppress(FileNotFoundError):
        return store.info(path)["type"] == "directory"
    return False


def entries(folder: Location) -> list[str]:
    """Names of what lies in a folder, sorted; of one that isn't there, none."""
    if not is_url(folder):
        return sorted(entry.name for entry in Path(folder).iterdir()) if Path(folder).is_dir() else []
    with _at(folder) as (store, path), contextlib.suppress(FileNotFoundError):
        return sorted({base_name(entry) for entry in store.ls(path, detail=False) if entry.rstrip("/") != path})
    return []


def files(folder: Location) -> dict[str, str]:
    """Of every file below `folder`: its name from there -> what changes with its content (etag, generation, size)."""
    if not is_url(folder):
        found = {str(f.relative_to(folder)): f.stat() for f in sorted(Path(folder).rglob("*")) if f.is_file()}
        return {name: f"{stat.st_mtime_ns} {stat.st_size}" for name, stat in found.items()}
    with _at(folder) as (store, path):
        found = store.find(path, detail=True)
    return {name.removeprefix(path).lstrip("/"): _version(info) for name, info in sorted(found.items())}


def read(location: Location) -> bytes:
    with open_file(location) as file:
        return file.read()


def open_file(location: Location) -> io.BufferedReader:
    """A file's bytes as a stream."""
    if not is_url(location):
        return Path(location).open("rb")
    with _at(location) as (store, path):
        return io.BufferedReader(_Stream(store.open(path, "rb"), location), 1 << 20)


def read_range(location: Location, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on; of a URL's, one request."""
    if not is_url(location):
        with Path(location).open("rb") as file:
            file.seek(start)
            return file.read(length)
    with _at(location) as (store, path):
        return store.cat_file(path, start=start, end=start + length) if length else b""


def sha256(file: Path) -> str:
    """Of a file of this machine, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write(location: Location, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    if is_url(location):
        with _at(location) as (store, path):
            store.pipe_file(path, content, **CHECKED.get(_protocol(location), {}))
        return
    with whole_file(location) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def whole_file(location: Location) -> Iterator[Path]:
    """A file of this machine to write; at the end of the block it becomes `location`, and not after an error."""
    if is_url(location):
        with scratch(location) as folder:
            yield folder / base_name(location)
            upload(folder / base_name(location), location)
        return
    location = Path(location)
    partial = location.with_name(f"{PARTIAL}{location.stem}")  # without its ending: engines load every *.safetensors
    try:
        yield partial
        fsync(partial)
        os.replace(partial, location)
        fsync(location.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Location) -> None:
    """Object stores have no folders to make."""
    if not is_url(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


def remove(location: Location, first: str = "") -> None:
    """Remove a file or a folder; of a folder, the file `first` before the others. What isn't there is no error."""
    if not is_url(location):
        local = Path(location)
        if local.is_dir():  # a kill in between leaves a partial folder, not half of this one
            gone = local.with_name(f"{PARTIAL}old-{local.name}")
            os.replace(local, gone)
            shutil.rmtree(gone)
        else:
            local.unlink(missing_ok=True)
        return
    with _at(location) as (store, path):
        for name in [f"{path}/{first}"] * bool(first) + [path]:
            with contextlib.suppress(FileNotFoundError):
                store.rm(name, recursive=True)


def version(location: Location) -> str:
    """What changes with the content of a URL's file."""
    with _at(location) as (store, path):
        return _version(store.info(path))


def download(location: Location, file: Path) -> None:
    """Copy a URL's file to this machine."""
    with _at(location) as (store, path):
        store.get_file(path, str(file))


def upload(file: Path, location: Location) -> None:
    """Copy a file of this machine to a URL."""
    with _at(location) as (store, path):
        store.put_file(str(file), path, **CHECKED.get(_protocol(location), {}))


def upload_folder(folder: Path, location: Location, last: str = "") -> None:
    """Copy the files below a folder of this machine to a URL, the file `last` after all others."""
    for name in sorted(files(folder), key=lambda name: (name == last, name)):
        upload(folder / name, join(location, name))


@contextlib.contextmanager
def whole_folder(folder: Location, last: str) -> Iterator[Path]:
    """A folder of this machine to write files into; at the end of the block they become `folder`, all or none.

    last: the file without which the folder counts as absent where nothing can be renamed. After an error nothing of it
    remains.
    """
    if is_url(folder):
        with scratch(folder) as partial:
            yield partial
            remove(folder, first=last)
            upload_folder(partial, folder, last)
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    try:
        partial.mkdir()
        yield partial
        for name in [*files(partial), "."]:
            fsync(partial / name)
        if folder.exists():
            remove(folder)
        os.replace(partial, folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def whole_folders(parent: Location, last: str, prefix: str = "") -> list[str]:
    """Names of the folders in `parent` that `whole_folder` finished, sorted."""
    names = [name for name in entries(parent) if name.startswith(prefix) and not name.startswith(PARTIAL)]
    if not is_url(parent) or not names:
        return names
    finished = {base_name(name[: -len(last) - 1]) for name in files(parent) if base_name(name) == last}
    return [name for name in names if name in finished]


def remove_unfinished(parent: Location, last: str, prefix: str = "") -> None:
    """Remove what a kill left of folders that were being written or removed."""
    if is_url(parent):
        stale = {name for name in entries(parent) if name.startswith(prefix)}
        stale -= set(whole_folders(parent, last, prefix)) if stale else set()
        for name in stale:
            remove(join(parent, name))
    else:
        for path in Path(parent).glob(f"{PARTIAL}*"):
            shutil.rmtree(path)


def fsync(path: Path) -> None:
    """Wait until a file or a folder of this machine is on its disk. What is renamed before may be a name alone after a
    power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cached(kind: str, what: str) -> Path:
    """The place in ~/.cache/eagle3-xla of this kind of copy of `what`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle3-xla"
    return cache / kind / hashlib.sha256(what.encode()).hexdigest()[:24]


@contextlib.contextmanager
def scratch(location: Location) -> Iterator[Path]:
    """An empty folder of this machine, of this block alone, for what is on its way to or from `location`. Folders that
    a kill left go with the next one, but for those that can't be locked: another user's, and any on NFS.
    """
    name = cached("scratch", str(location))
    name.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as in_use:
        with _locked(name.parent):  # one that is made now isn't locked yet
            for left in name.parent.iterdir():
                with contextlib.suppress(OSError), _locked(left, wait=False) as unused:
                    if unused:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{name.name}-", dir=name.parent))
            in_use.enter_context(_locked(folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the block holds the folder's lock; on a file system without locks it never does."""
    descriptor, held = os.open(folder, os.O_RDONLY), False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        if held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor too
        os.close(descriptor)


class _Stream(io.RawIOBase):
    """A store's file whose errors while reading are in one line too."""

    def __init__(self, file: Any, location: Location):
        self.file, self.location = file, location

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _in_one_line(self.location):
            content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


@contextlib.contextmanager
def _at(location: Location) -> Iterator[tuple[Any, str]]:
    """`_store` of a URL; what fails in the block is an error of one line."""
    with _in_one_line(location):
        yield _store(location)


def _store(location: Location) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    try:
        return fsspec.core.url_to_fs(str(location).rstrip("/"), **OPTIONS)
    except (ImportError, ValueError) as error:
        raise OSError(f"{location}: {_protocol(location)}:// can't be used here ({error})") from None


def _protocol(url: Location) -> str:
    return str(url).partition("://")[0]


def _version(info: dict) -> str:
    names = ("etag", "ETag", "generation", "size", "mtime", "LastModified", "created")
    return " ".join(str(info[name]) for name in names if info.get(name) is not None)


@contextlib.contextmanager
def _in_one_line(location: Location) -> Iterator[None]:
    """Each store has errors of its own: all become an OSError of one line that names the location."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{location}: no such file, folder or bucket") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and str(location) in reason:
            raise
        denied = isinstance(error, PermissionError) or re.search(r"Forbidden|, 40[13]$", reason)
        kind = PermissionError if denied else OSError
        raise kind(f"{location}: {'access is denied' if denied else 'the store failed'} ({reason})") from error
