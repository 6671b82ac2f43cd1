"""Output folders: whose they are, and run.yaml in each, the recipe that it was made with."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator

from omegaconf import OmegaConf

from eagle3_xla import local_copies, storage
from eagle3_xla.config import Recipe
from eagle3_xla.errors import UserError
from eagle3_xla.storage import Location

RUN_FILE = "run.yaml"
WRITTEN_BY = "# written by eagle3-xla "  # the first line of run.yaml, then the verb


def write_run_file(recipe: Recipe, out: Location, verb: str) -> None:
    """The recipe as run.yaml, whose first line names the verb: the folder is that verb's from then on."""
    content = f"{WRITTEN_BY}{verb}\n{OmegaConf.to_yaml(OmegaConf.structured(recipe))}"
    storage.write(storage.join(out, RUN_FILE), content)


def claim_output(
    out: Location, verb: str, ours: Callable[[Location], bool] | None = None, overwrite: bool | None = None
) -> Location:
    """Make the output folder of `verb` and return it: a new one, an empty one, or one that `verb` wrote before.

    ours(out): whether it did (default: run.yaml says so); overwrite: the verb's option of that name, None if it has
    none. Raises UserError for a folder that holds anything else, and for a path that can't be a folder.
    """
    out = storage.join(out)
    try:
        storage.make_folder(out)
        if storage.exists(out) and not storage.is_folder(out):
            raise FileExistsError
        names = [name for name in storage.entries(out) if not name.startswith(storage.PARTIAL)]
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out} is a file, or lies in one; an output folder is expected") from None
    if names and not (ours(out) if ours else _writer(out) == verb) and not overwrite:
        writer = _writer(out)
        whose = f"`{writer}` wrote it" if writer else f"it holds {names[0]}"
        instead = "choose another folder" if overwrite is None else "choose another folder, or give --overwrite"
        raise UserError(f"{out} is not ours to write to: `{verb}` did not make it ({whose}); {instead}")
    return out


@contextlib.contextmanager
def only_writer(out: Location, verb: str) -> Iterator[None]:
    """For the block, no other process of this machine may be in one of the same folder. Raises UserError when one is.

    The folder itself is locked, of a URL the one that work_folder gives: there is no file that could be left behind.
    """
    folder = os.open(local_copies.work_folder(out), os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `{verb}` writes to {out}; wait for its end, or choose another folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def _writer(out: Location) -> str | None:
    """The verb that wrote the folder; None: none of ours."""
    try:
        line = storage.read(storage.join(out, RUN_FILE)).partition(b"\n")[0].decode(errors="replace")
    except FileNotFoundError:
        return None
    return line.removeprefix(WRITTEN_BY) if line.startswith(WRITTEN_BY) else None
