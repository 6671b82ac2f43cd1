"""Three hosts that train nothing, forks of this process, and how they end: prints their exit codes as a list; what they
say goes to files of the folder given.
"""

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from eagle3_xla.checkpoint import Checkpoint
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.train.saving import Saver
from eagle3_xla.xla import hosts

HOSTS, LAST = 3, 2


def silent(together: hosts.Hosts) -> None:
    """The last one does nothing any more, but its connections stay open."""
    time.sleep(1.5 * hosts.SILENCE.total_seconds() * (together.index == 1))  # a host that is busy is no silent one
    together.barrier()
    if together.index == LAST:
        os.kill(os.getpid(), signal.SIGSTOP)
    together.barrier()


def saving(together: hosts.Hosts) -> None:
    """Another one fails while host 0 writes a checkpoint, and then host 0 does, since its devices don't answer."""
    if together.index == 0:
        saver = Saver(1, print, before=lambda: time.sleep(1))
        together.last_words = saver.finish
        saver.save(Path(sys.argv[2], "run"), Checkpoint(7, {}, {}, torch.zeros(1), torch.zeros(1), {}, "", {}))
    together.barrier()
    if together.index == 1:
        raise UserError("something is wrong here")
    while not together._ended_by:
        time.sleep(0.01)
    raise RunError("the devices don't answer")


def play(scene: str, host: int, port: int) -> None:
    os.environ |= {"RANK": str(host), "WORLD_SIZE": str(HOSTS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with hosts.join_hosts() as together:
        globals()[scene](together)


hosts.SILENCE, hosts.BEAT_SECONDS = timedelta(seconds=3), 0.2
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
children = []
for host in range(HOSTS):
    children.append(os.fork())
    if not children[-1]:
        os.dup2(os.open(Path(sys.argv[2], str(host)), os.O_CREAT | os.O_WRONLY), 2)
        signal.alarm(40)
        code = 3
        try:
            play(sys.argv[1], host, port)
        except (UserError, RunError) as error:
            code = 2 if isinstance(error, UserError) else 1
        finally:
            os._exit(code)
ended = []
for child in children:
    status = os.waitpid(child, os.WUNTRACED)[1]
    ended.append(-os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
if ended[LAST] == -signal.SIGSTOP:
    os.kill(children[LAST], signal.SIGKILL)
print(json.dumps(ended))
