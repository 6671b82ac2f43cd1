"""Checkpoints written by a thread while the steps go on: one at a time, none is lost, a failure ends the run."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.storage import Location


class Saver:
    """keep: as checkpoint.save takes it; before(): is called in the thread before each.

    As a context it waits for what is being written, whatever ended the block; a failure goes to `say` then, when the
    block ended for another one.
    """

    def __init__(self, keep: int, say: Callable[[str], object], before: Callable[[], object] = lambda: None):
        self.keep, self.say, self.before = keep, say, before
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        checkpoints.save(folder, state, self.keep)

    def check(self) -> None:
        """Raises SaveFailed when what was being written has failed meanwhile."""
        if self._writing and self._writing.done():
            self.wait()

    def finish(self) -> None:
        """From another thread: until nothing is being written; no more can be saved."""
        self._thread.shutdown()

    def wait(self) -> None:
        """Until it is written. Raises SaveFailed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()
