"""A step as one CUDA graph: the kernels of a call are recorded once and played again, without Python and launches.

A step of a small target is a thousand kernels of a few microseconds each, and the host is slower at launching them than
the GPU at running them. What XLA asks of a step, a graph asks too: static shapes, state changed in place, no look at a
device value on the way.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, torch.Tensor]


class Captured:
    """`function`, which takes batches and returns tensors (one, or a tuple with some None), as one graph for each shape
    of its batches.

    The first call of a shape runs as it is, since libraries prepare themselves in it; the second one is recorded. One
    that can't be recorded goes on as it is, and says so. state: parameters whose gradients the function makes; pool: of
    memory (torch.cuda.graph_pool_handle), shared by functions that never run at once.
    """

    def __init__(self, function: Callable, state: list[torch.Tensor], pool: Any):
        self.function, self.state, self.pool = function, state, pool
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, tuple[Batch, ...], Any] | None] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, *batches: Batch) -> Any:
        shapes = tuple((name, x.shape, x.dtype) for batch in batches for name, x in batch.items())
        if shapes not in self._graphs:
            self._graphs[shapes] = None
            return self._as_it_is(batches)
        if self._graphs[shapes] is None and self._stream is not None:
            self._graphs[shapes] = self._record(batches)
        recorded = self._graphs[shapes]
        if recorded is None:
            return self._as_it_is(batches)
        graph, inputs, outputs = recorded
        for inside, batch in zip(inputs, batches):
            for name, x in batch.items():
                inside[name].copy_(x)
        graph.replay()
        return _copies(outputs)

    def _as_it_is(self, batches: tuple[Batch, ...]) -> Any:
        if self._stream is None:
            return self.function(*batches)
        self._stream.wait_stream(torch.cuda.current_stream())  # where the recording will be
        with torch.cuda.stream(self._stream):
            results = self.function(*batches)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _record(self, batches: tuple[Batch, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Batch, ...], Any] | None:
        gradients = [x.grad for x in self.state]
        inputs = tuple({name: x.clone() for name, x in batch.items()} for batch in batches)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread is putting the next batches on the GPU meanwhile.
            with torch.cuda.graph(graph, self.pool, self._stream, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
        except RuntimeError as error:
            print(f"the step can't be a CUDA graph ({str(error).splitlines()[0]}); it runs as it is", file=sys.stderr)
            for x, gradient in zip(self.state, gradients):
                x.grad = gradient
            self._stream = None
            return None
        return graph, inputs, outputs


def _copies(results: Any) -> Any:
    """The next call writes over what the graph has returned."""
    if isinstance(results, tuple):
        return tuple(map(_copies, results))
    return None if results is None else results.clone()
