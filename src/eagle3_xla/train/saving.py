"""Checkpoints written by a thread while the steps go on: one at a time, none is lost. A bucket that fails is tried
again, any other failure ends the run."""

import threading
import time
from collections.abc import Callable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import storage
from eagle3_xla.storage import Location

PAUSES = (60, 300, 900, 1800)  # seconds between the tries of a save to a bucket


class Saver:
    """keep, say: as checkpoint.save takes them; before(): is called in the thread before each; stopping: has an entry
    once the run is told to stop.

    As a context it waits for what is being written, whatever ended the block; a failure goes to `say` then, when the
    block ended for another one.
    """

    def __init__(
        self,
        keep: int,
        say: Callable[[str], object],
        before: Callable[[], object] = lambda: None,
        stopping: Sized = (),
    ):
        self.keep, self.say, self.before, self.stopping = keep, say, before, stopping
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future | None = None
        self._hurried = threading.Event()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hurry()
        try:
            self.wait()
        except OSError as failed:
            if error is None:
                raise
            self.say(str(failed))
        finally:
            self._thread.shutdown()

    def save(self, folder: Location, state: checkpoints.Checkpoint) -> None:
        """Begin to write `state`, host tensors of its own, once the one before is written. Raises its SaveFailed."""
        self.wait()
        self._writing = self._thread.submit(self._write, folder, state)

    def _write(self, folder: Location, state: checkpoints.Checkpoint) -> None:
        self.before()
        for pause in PAUSES if storage.is_url(folder) else ():
            try:
                checkpoints.save(folder, state, self.keep, self.say)
                return
            except checkpoints.SaveFailed as failed:
                if not _may_pass(failed.__cause__):
                    raise
                self.say(f"{failed.__cause__}; tried again within {pause} s, the steps go on until the next save")
            if self._hurried_within(pause):
                break
        checkpoints.save(folder, state, self.keep, self.say)

    def check(self) -> None:
        """Raises SaveFailed when what was being written has failed meanwhile."""
        if self._writing and self._writing.done():
            self.wait()

    def _hurried_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._hurried.wait(min(left, 1)) or len(self.stopping):
                return True
        return False

    def finish(self) -> None:
        """From another thread: until nothing is being written; no more can be saved."""
        self.hurry()
        self._thread.shutdown()

    def hurry(self) -> None:
        """From now on there is but one more try of a save that fails."""
        self._hurried.set()

    def wait(self) -> None:
        """Until it is written. Raises SaveFailed."""
        if writing := self._writing:
            try:
                writing.result()
            finally:
                if writing.done():  # not where Ctrl-C ends the wait
                    self._writing = None


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is the bucket's: storage.py gives its failures no number, as this machine's disk does."""
    refused = isinstance(error, PermissionError | FileNotFoundError)
    return isinstance(error, OSError) and error.errno is None and not refused
