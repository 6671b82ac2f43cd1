"""Compiled functions that are run by their graph's hash: the host does not trace them again (torch_xla 2.9.0).

torch_xla.compile runs the Python function at every call, to find that the graph is the one it had: 0.1 to 0.25 s for a
step of 28 layers (benchmarks/dispatch.py). Here, as in torch_xla's own dynamo bridge
(torch_xla/_dynamo/dynamo_bridge.py), the first call of each shape traces and compiles, the second traces again, and
once two traces gave the same graph, it is run on the live buffers.
"""

import contextlib
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch_xla
import torch_xla.core.xla_model as xla_model
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

_XLAC = torch_xla._XLAC
P = ParamSpec("P")
R = TypeVar("R")
# What torch_xla doesn't promise to keep.
NEEDED = """_get_tensors_xla_device_data_node _get_tensors_handle _get_graph_hash _xla_warm_up_cache _run_cached_graph
_check_tensor_need_materialization _clear_pending_irs _set_buffer_donation _get_seed_info_id
_unique_id_for_ir_and_data""".split()
# A sync takes every live tensor of the process. One that another thread has made but not yet sharded is then uploaded
# whole, or the other thread ends in "Check failed: data()->tensor_data". So whoever makes tensors, traces or syncs
# holds this; running a graph by its hash does neither.
LAZY_TENSORS = threading.RLock()


def compiled(function: Callable, state: list[torch.Tensor]) -> Callable:
    """`function(*batches)` as one graph; raises when it would need a second one.

    batches: dicts of device tensors; function returns tensors and None, one or a tuple of them. state: the tensors that
    may differ from call to call: those that `function` changes in place give their buffers to their new values, the
    others are read. All else that it reads is a constant of the graph: a Python number that is another one in the first
    two calls keeps the function traced, one that changes later goes unnoticed.
    """
    missing = [name for name in NEEDED if not hasattr(_XLAC, name)]
    if not missing:
        return Dispatched(function, state)
    warnings.warn(
        f"torch_xla {torch_xla.__version__} has no {', '.join(missing)}: `{function.__name__}` is traced at every "
        "call, which may keep the devices waiting for the host",
        stacklevel=2,
    )
    return alone(torch_xla.compile(function, full_graph=True, name=function.__name__))


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with LAZY_TENSORS held."""

    @functools.wraps(function)
    def locked(*arguments: P.args, **keywords: P.kwargs) -> R:
        with LAZY_TENSORS:
            return function(*arguments, **keywords)

    return locked


@dataclasses.dataclass
class _Graph:
    """A compiled graph and where its inputs and outputs belong.

    constants: its inputs, None where `given` (input number -> number among state and batch) says what comes there;
    changed: numbers of the state tensors that its last outputs replace; form: what the function returns, with the
    outputs' numbers in place of tensors.
    """

    hash: bytes
    constants: list
    given: dict[int, int]
    changed: list[int]
    form: Any
    confirmed: bool = False

    def with_inputs(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """All inputs. tensors: state and batch."""
        inputs = list(self.constants)
        for position, number in self.given.items():
            inputs[position] = tensors[number]
        return inputs

    def run(self, inputs: list[torch.Tensor], state: list[torch.Tensor]) -> Any:
        """What the function returns; the tensors of `state` get their new values."""
        outputs = _XLAC._run_cached_graph(self.hash, inputs)
        for number, value in zip(reversed(self.changed), reversed(outputs)):
            state[number].data = value  # not _replace_xla_tensor: it leaves the storage, which detach() looks at
        if isinstance(self.form, tuple):
            return tuple(None if number is None else outputs[number] for number in self.form)
        return outputs[self.form]

    def differs(self, other: "_Graph") -> str:
        """In what another trace of the same function differs; "" if in nothing."""
        same_graph = (self.hash, self.given, self.changed) == (other.hash, other.given, other.changed)
        if not same_graph or len(self.constants) != len(other.constants):
            return "its graph"
        for mine, its in zip(self.constants, other.constants):
            if mine is None or _handles([mine]) == _handles([its]):
                continue
            if mine.shape != its.shape or not torch.equal(mine.cpu(), its.cpu()):
                return f"a constant of shape {list(mine.shape)} in it"
        return ""


class Dispatched:
    """See `compiled`."""

    def __init__(self, function: Callable, state: list[torch.Tensor]):
        self.function, self.state = function, state
        self._graphs: dict[tuple, _Graph] = {}

    def __call__(self, *batches: dict[str, torch.Tensor]) -> Any:
        batch = [tensor for part in batches for tensor in part.values()]
        key = tuple((name, tensor.dtype, tensor.shape) for part in batches for name, tensor in part.items())
        graph = self._graphs.get(key)
        if graph and graph.confirmed:
            return graph.run(graph.with_inputs([*self.state, *batch]), self.state)
        return self._traced_call(key, batches, batch)

    @alone
    def _traced_call(self, key: tuple, batches: tuple, batch: list[torch.Tensor]) -> Any:
        graph = self._graphs.get(key)
        traced, inputs = self._trace(batches, batch)
        if graph:
            difference = graph.differs(traced)
            traced.confirmed = not difference
            if difference:
                warnings.warn(
                    f"`{self.function.__name__}` is traced at every call: {difference} changes from call to call, so a "
                    "Python number in it does; keep that in a tensor on the device",
                    stacklevel=2,
                )
        self._graphs[key] = traced
        result = traced.run(inputs, self.state)
        _XLAC._clear_pending_irs(str(torch_xla.device()))  # what the trace left behind is not to be run
        return result

    def _trace(self, batches: tuple, batch: list[torch.Tensor]) -> tuple[_Graph, list[torch.Tensor]]:
        """Run the Python function and compile its graph if it is new. Returns the graph and its inputs; the tensors of
        `state` that it changes have no value before it was run."""
        torch_xla.sync()  # every input a buffer,
        xla_model.wait_device_ops()  # and there
        numbers = {handle: number for number, handle in enumerate(_handles([*self.state, *batch]))}
        assert len(numbers) == len(self.state) + len(batch), "two inputs share a buffer"
        with _one_graph():
            form = self.function(*batches)
        results = list(form) if isinstance(form, tuple) else [form]
        results = [tensor for tensor in results if tensor is not None]
        pending = _XLAC._check_tensor_need_materialization(self.state)
        changed = [number for number, is_pending in enumerate(pending) if is_pending]
        # An output takes the buffer of an input that is given up: the n-th of a size that of the n-th such input. So
        # the new values come in the order in which the graph takes the old ones, which in turn depends on theirs.
        order: dict[int, int] = {}
        for _ in range(8):
            changed.sort(key=lambda number: order.get(number, 2**31))  # the last: overwritten unread
            outputs = [*results, *(self.state[number] for number in changed)]
            ids, inputs = _XLAC._get_tensors_xla_device_data_node(outputs)
            given = {i: numbers[h] for i, h in enumerate(_handles(inputs)) if h in numbers}
            before, order = order, {number: position for position, number in given.items()}
            if order == before:
                break
        assert _XLAC._get_seed_info_id() not in ids, "random numbers would be the same in every call"
        assert len({_XLAC._unique_id_for_ir_and_data(tensor) for tensor in outputs}) == len(outputs)
        for position, number in given.items():
            if number in changed:
                _XLAC._set_buffer_donation(inputs[position], True)
        with alias_with_buffer_donor_config(), _named(self.function.__name__):
            graph_hash = _XLAC._get_graph_hash(outputs)
            _XLAC._xla_warm_up_cache(outputs, [])
        constants = [None if position in given else value for position, value in enumerate(inputs)]
        counted = iter(range(len(results)))
        if isinstance(form, tuple):
            form = tuple(None if tensor is None else next(counted) for tensor in form)
        else:
            form = next(counted)
        return _Graph(graph_hash, constants, given, changed, form), inputs


def _handles(tensors: list[torch.Tensor]) -> list[int]:
    """Which buffer each tensor is."""
    return _XLAC._get_tensors_handle(list(tensors))


@contextlib.contextmanager
def _one_graph() -> Iterator[None]:
    """What is traced inside is one graph: it raises when something has to be computed meanwhile."""
    allowed = _XLAC._get_allow_execution()
    _XLAC._set_allow_execution(False)
    try:
        yield
    finally:
        _XLAC._set_allow_execution(allowed)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What is compiled inside has this name, in traces and dumps."""
    before = _XLAC._get_current_graph_name()
    _XLAC._set_current_graph_name(name)
    try:
        yield
    finally:
        _XLAC._set_current_graph_name(before)
