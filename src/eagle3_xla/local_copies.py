"""What has to be a file or a folder of this machine, of a location that may be a URL: the thing itself, or a copy in
~/.cache/eagle3-xla.
"""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from eagle3_xla import storage
from eagle3_xla.storage import Location


@contextlib.contextmanager
def as_local_file(location: Location) -> Iterator[Path]:
    """The file itself, or a copy of a URL's that lives as long as the block."""
    if not storage.is_url(location):
        yield Path(location)
        return
    with storage.scratch(location) as folder:
        storage.download(location, folder / storage.base_name(location))
        yield folder / storage.base_name(location)


def local_file(location: Location, version: str | None = None) -> Path:
    """The file itself, or a copy of a URL's in the cache, made once for each `version` (default: asked for)."""
    if not storage.is_url(location):
        return Path(location)
    if version is None:
        version = storage.version(location)
    copy = storage.cached("files", f"{location} {version}") / storage.base_name(location)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f"{storage.PARTIAL}{os.getpid()}")  # several processes may want it
        try:
            storage.download(location, partial)
            storage.fsync(partial)
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy


def local_folder(location: Location, only: Collection[str] = ()) -> Path:
    """The folder itself, or one of links to the cached copies of a URL's files; only: patterns of names, in which a `*`
    is of one folder.

    Raises FileNotFoundError when nothing is there.
    """
    if not storage.is_url(location):
        return Path(location)
    versions = {n: v for n, v in storage.files(location).items() if not only or any(_matches(n, p) for p in only)}
    if not versions:
        raise FileNotFoundError(f"{location}: no such folder")
    folder = storage.cached("folders", f"{location} {versions}")
    for name, version in versions.items():
        link, copy = folder / name, local_file(storage.join(location, name), version)
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(copy)
    return folder


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def work_folder(location: Location) -> Path:
    """The folder itself, or one of this machine for what belongs to a URL's and outlives the process."""
    folder = storage.cached("work", str(location)) if storage.is_url(location) else Path(location)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class LocalFolder:
    """A folder of this machine for files that grow. path: `location` itself, or one in the cache whose changed files
    `upload` copies to the URL; it starts empty but for what `restore` fetches."""

    def __init__(self, location: Location):
        self.location = location
        self._sent: dict[str, str] = {}
        self.path = storage.cached("growing", str(location)) if storage.is_url(location) else Path(location)
        if storage.is_url(location):
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def restore(self, name: str) -> None:
        """Fetch a file that an earlier run uploaded, if it did."""
        source = storage.join(self.location, name)
        if storage.is_url(source) and storage.exists(source):
            storage.download(source, self.path / name)

    def upload(self) -> None:
        """Copy what has changed since the last time."""
        if not storage.is_url(self.location):
            return
        for name, version in storage.files(self.path).items():
            if self._sent.get(name) != version and not name.startswith("."):  # .work, .partial-*
                target = storage.join(self.location, name)
                with storage.scratch(target) as folder:  # a copy: the store refuses a file that grows on its way
                    storage.upload(Path(shutil.copy(self.path / name, folder)), target)
                self._sent[name] = version
