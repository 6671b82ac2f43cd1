"""The hosts of a run, one process each: they agree with each other over torch.distributed (gloo), whatever their
devices do meanwhile. torchrun brings them together (launch/train_torchrun.sh).

torch_xla has no such thing: its `mesh_reduce` gathers over replicas, and under SPMD there is one, so each host is
handed its own value back (torch_xla 2.9.0, core/xla_model.py, xla_rendezvous).

Host 0 writes, and what it has read the others receive: no disk is shared. When a host fails or goes away, all end with
one line each, also while their devices wait for each other: a thread of each listens on a connection to host 0, over
which each is told every few seconds that the other is there.
"""

import atexit
import contextlib
import io
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from eagle3_xla.errors import RunError, UserError

ARRIVE = timedelta(minutes=30)
PATIENCE = timedelta(days=14)  # the listening threads notice a host that is gone
# A host says every BEAT_SECONDS that it is there, unless something keeps Python's lock; compiling doesn't.
BEAT_SECONDS, SILENCE = 15.0, timedelta(minutes=5)
MESSAGE = 4000  # bytes between the listening threads: an exit code and a line
T = TypeVar("T")
DONE, LOST = 0, 75  # exit codes; 75: try again (sysexits.h), as launch/train_torchrun.sh does
BEAT = 255  # none: the host goes on
LAST_WORDS = 300  # seconds that another host's end leaves for them


class Hosts:
    """index: this host's number from 0; count: of all. A context: an error inside ends every host, as does a loss.

    last_words(): called before another host's end becomes this one's, in a thread while the main one goes on.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._listeners: list[threading.Thread] = []
        self._beating: list[threading.Thread] = []
        self._done = threading.Event()
        self._ended_by: threading.Thread | None = None  # which of this process
        self.last_words: Callable[[], object] = lambda: None
        if count > 1:
            self._group = _group()
            peers = range(1, count) if index == 0 else [0]
            # Of the threads below; one for each connection, as a timeout in gloo closes all connections of a group.
            pairs = [dist.new_group([0, host], backend="gloo", timeout=SILENCE) for host in range(1, count)]
            self._private = {peer: pairs[max(index, peer) - 1] for peer in peers}
            self._listeners = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers]
            self._beating = [threading.Thread(target=self._beat, args=(peer,), daemon=True) for peer in peers]
            for thread in [*self._listeners, *self._beating]:
                thread.start()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.count == 1:
            return
        if error is not None:
            code = 2 if isinstance(error, UserError) else 1
            # After the error's line, before torch_xla waits at exit for steps in flight, whose other hosts are gone.
            atexit.register(_end, code)
            self._tell_failure(code, error)
        elif self.index == 0:
            for listener in self._listeners:  # each ends when its host is done
                listener.join()
            for peer in range(1, self.count):
                self._send_done(peer)
        else:
            self._send_done(0)
            self._listeners[0].join()

    def gather(self, value: T) -> list[T]:
        """Every host's `value`, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self._together(dist.all_gather_object, values, value)
        return values

    def agree(self, what: str, values: dict) -> None:
        """Raises UserError on every host, naming the differences, when they don't have the same `values`."""
        every = self.gather(values)
        for host, theirs in enumerate(every):
            names = [n for n in every[0] | theirs if every[0].get(n) != theirs.get(n)]
            if names:
                differences = (f"{n} is {every[0].get(n)!r} on host 0, {theirs.get(n)!r} on host {host}" for n in names)
                self._ended_by = threading.current_thread()  # on each of them
                self.barrier()
                raise UserError(f"the hosts don't have the same {what}: {'; '.join(differences)}")

    def any(self, wanted: bool) -> bool:
        """Whether it is wanted on any host."""
        if self.count == 1:
            return wanted
        flag = torch.tensor(int(wanted))
        self._together(dist.all_reduce, flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        self.any(False)

    def from_first(self, value: T) -> T:
        """Host 0's `value`, on every host: anything that can be pickled; tensors in it travel one by one."""
        if self.count == 1:
            return value
        tensors: list[torch.Tensor] = []
        message: list[Any] = [None]
        if self.index == 0:
            content = _pickled(value, tensors)
            message = [(content, [(tensor.shape, tensor.dtype) for tensor in tensors])]
        self._together(dist.broadcast_object_list, message, 0)
        content, described = message[0]
        if self.index > 0:
            tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in described]
        for tensor in tensors:
            if tensor.numel():
                self._together(dist.broadcast, tensor.view(-1).view(torch.uint8), 0)
        return value if self.index == 0 else _unpickled(content, tensors)

    def _together(self, collective: Callable, *arguments: Any) -> None:
        try:
            collective(*arguments, group=self._group)
        except RuntimeError as error:  # a connection is gone; the listening thread knows why and ends this process
            time.sleep(30)
            raise RunError(f"the hosts can't reach each other ({_line(error)})") from None

    def _beat(self, peer: int) -> None:
        """In a thread: tell `peer` that this host is there."""
        while not self._done.wait(BEAT_SECONDS):
            self._send(peer, BEAT, "")

    def _listen(self, peer: int) -> None:
        """In a thread: wait for `peer`'s last word. DONE is no reason to end; another code is, a lost connection, and
        SILENCE."""
        message, code, text = torch.zeros(MESSAGE, dtype=torch.uint8), BEAT, ""
        try:
            while code == BEAT:
                dist.recv(message, src=peer, group=self._private[peer])
                code, text = int(message[0]), bytes(message[1:].tolist()).rstrip(b"\0").decode(errors="replace")
        except RuntimeError:
            code, text = LOST, f"host {peer} went away; start all hosts again to continue"
        if code == DONE or self._ended_by:
            return
        self._ended_by = threading.current_thread()
        for other in range(1, self.count) if self.index == 0 else []:
            if other != peer:
                self._send(other, code, text)
        print(f"eagle3-xla train: {text}", file=sys.stderr, flush=True)
        speaking = threading.Thread(target=self.last_words, daemon=True)
        speaking.start()
        speaking.join(LAST_WORDS)
        os._exit(code)  # the main thread may wait for devices that will never answer

    def _tell_failure(self, code: int, error: BaseException) -> None:
        if self._ended_by:
            if self._ended_by is not threading.current_thread():
                self._ended_by.join()  # forever: it ends this process
            return
        self._ended_by = threading.current_thread()
        explained = isinstance(error, UserError | RunError | OSError)
        text = f"host {self.index}: {_line(error) if explained else f'{type(error).__name__}: {_line(error)}'}"
        for peer in range(1, self.count) if self.index == 0 else [0]:
            self._send(peer, code, text)

    def _send_done(self, peer: int) -> None:
        """The last message to `peer`: it no longer listens."""
        self._done.set()
        for beating in self._beating:
            beating.join()
        self._send(peer, DONE, "")

    def _send(self, peer: int, code: int, text: str) -> None:
        content = bytes([code]) + text.encode()[: MESSAGE - 1]
        message = torch.tensor(list(content.ljust(MESSAGE, b"\0")), dtype=torch.uint8)
        try:
            dist.send(message, peer, group=self._private[peer])
        except RuntimeError:  # it is gone
            pass


def join_hosts() -> Hosts:
    """The hosts that torchrun started together, or this one alone. Raises RunError when some don't come."""
    index, count = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if count == 1:
        return Hosts()
    stdout = os.dup(1)
    os.dup2(2, 1)  # gloo prints there whom it is connected to
    try:
        dist.init_process_group("gloo", timeout=ARRIVE)
        return Hosts(index, count)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"host {index}: not all {count} hosts came together ({_line(error)})") from None
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _group() -> dist.ProcessGroup:
    """Of all hosts, each of which must come soon; what they wait for later may take its time."""
    group = dist.new_group(backend="gloo", timeout=ARRIVE)
    dist.distributed_c10d._set_pg_timeout(PATIENCE, group)  # of collectives; `recv` keeps the first
    return group


def _end(code: int) -> None:
    """End this process now, whatever its devices wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the latter: it is closed
            stream.flush()
    os._exit(code)


def _pickled(value: object, tensors: list[torch.Tensor]) -> bytes:
    """`value` without its tensors, which are added to `tensors`."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> int | None:
            if not isinstance(item, torch.Tensor):
                return None
            tensors.append(item.detach().cpu().contiguous())
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpickled(content: bytes, tensors: list[torch.Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(content)).load()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
