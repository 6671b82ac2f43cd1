"""Checkpoints written by a thread while the steps go on: one at a time, none is lost. A bucket that fails is tried
again, any other failure ends the run."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import storage
from eagle3_xla.storage import Location

PAUSES = (60, 300, 900, 1800)  # seconds between the tries of a save to a bucket


class Saver:
    """keep, say: as checkpoint.save takes them; before(): is called in the thread before each.

    As a context it waits for what is being written, whatever ended the block; a failure goes to `say` then, when the
    block ended for another one.
    """

    def __init__(self, keep: int, say: Callable[[str], object], before: Callable[[], object] = lambda: None):
        self.keep, self.say, self.before = keep, say, before
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future | None = None
        self._hurried = threading.Event()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait(hurry=True)
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
                if isinstance(failed.__cause__, PermissionError):
                    raise
                self.say(f"{failed.__cause__}; the save is tried again within {pause} s while the steps go on")
            if self._hurried.wait(pause):
                break
        checkpoints.save(folder, state, self.keep, self.say)

    def check(self) -> None:
        """Raises SaveFailed when what was being written has failed meanwhile."""
        if self._writing and self._writing.done():
            self.wait()

    def finish(self) -> None:
        """From another thread: until nothing is being written; no more can be saved."""
        self._hurried.set()
        self._thread.shutdown()

    def wait(self, hurry: bool = False) -> None:
        """Until it is written. Raises SaveFailed. hurry: where it fails, after one more try, from now on."""
        if hurry:
            self._hurried.set()
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
