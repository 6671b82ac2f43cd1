"""A function over chunks in several processes, results in order: the same whatever the number of processes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from eagle3_xla.processes import end_with_parent

_function: Callable | None = None
_failure: Exception | None = None


def ordered_map(make: Callable, arguments: tuple, chunks: Iterable, workers: int) -> Iterator:
    """`make(*arguments)` in each process gives the function that turns a chunk into a result.

    workers: processes, 0 for one per core; one chunk, or one worker, is done in this process. At most two chunks per
    worker are in the air, so the chunks may be a stream larger than memory.
    """
    chunks = iter(chunks)
    workers = workers or os.cpu_count() or 1
    first = list(islice(chunks, 2))
    if workers == 1 or len(first) < 2:
        function = make(*arguments)
        yield from map(function, first)
        yield from map(function, chunks)
        return
    # Not fork: this process may hold threads of torch, tokenizers and Arrow. The process that is forked instead has
    # imported what its children need, once for all of them and for all calls.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eagle3_xla.data.worker"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=(make, arguments)) as pool:
        waiting = deque(pool.submit(_call, chunk) for chunk in first)
        try:
            while waiting:
                while len(waiting) < 2 * workers and (chunk := next(chunks, None)) is not None:
                    waiting.append(pool.submit(_call, chunk))
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError("a worker process was killed, most likely for its memory; lower data.workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def _initialise(make: Callable, arguments: tuple) -> None:
    global _function, _failure
    end_with_parent()
    try:
        _function = make(*arguments)
    except Exception as error:  # raised here it would arrive as a BrokenProcessPool
        _failure = error


def _call(chunk: Any) -> Any:
    if _failure:
        raise _failure
    assert _function is not None
    return _function(chunk)
