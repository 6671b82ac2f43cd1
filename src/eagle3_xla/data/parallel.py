"""A function over chunks in several processes, results in order: the same whatever the number of processes."""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

_function: Callable | None = None


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
    # Not fork: this process may hold threads of torch, tokenizers and Arrow.
    context = multiprocessing.get_context("spawn")
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
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _initialise(make: Callable, arguments: tuple) -> None:
    """A third of the CPU seconds that this takes are saved: a tokenizer needs no torch_xla, which transformers would
    import by way of accelerate, and what is imported is no garbage.
    """
    global _function
    os.environ["USE_TORCH_XLA"] = "0"
    gc.disable()
    _function = make(*arguments)
    gc.freeze()
    gc.enable()


def _call(chunk: Any) -> Any:
    assert _function is not None
    return _function(chunk)
