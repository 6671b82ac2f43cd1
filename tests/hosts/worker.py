"""What torchrun does, with forks of this process: each runs `train` in a child for each scenario of test_hosts.py.

Devices: PlainBackend, where every host computes the step of the whole batch, which it puts together from all hosts'
parts over gloo. So everything a host does by itself is real, and the collectives of the devices are one double.
"""

import atexit
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import datasets  # noqa: F401
import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import eagle3_xla.train.setup as setup
from eagle3_xla.cli import main
from eagle3_xla.xla.plain import PlainBackend

DEVICES = 16  # groups of rows: 4 hosts of 4
UNANSWERED = 99  # the exit code of a host that waits at its end for devices, which others have left


class HostsBackend(PlainBackend):
    def __init__(self, config, hosts):
        super().__init__(config)
        self.hosts = hosts
        self.part = hosts.count - 1 - hosts.index  # the mesh may visit the hosts in any order
        self.data_parallel = self.draft_groups = DEVICES
        if hosts.count > 1:  # batches are put by the main thread and by the one that loads ahead, in each one's order
            self.groups = [torch.distributed.new_group(backend="gloo") for _ in range(2)]

    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = [(self.part, batch)] * self.hosts.count
        if self.hosts.count > 1:
            group = self.groups[threading.current_thread() is threading.main_thread()]
            torch.distributed.all_gather_object(parts, (self.part, batch), group=group)
        parts = dict(parts)
        assert all(len(part["input_ids"]) == DEVICES // self.hosts.count for part in parts.values())
        return {name: torch.cat([parts[n][name] for n in sorted(parts)]) for name in batch}


def signal_when(condition: Path, number: int) -> None:
    """Send this process a signal once a file of that pattern is there."""
    while not list(condition.parent.glob(condition.name)):
        time.sleep(0.002)
    os.kill(os.getpid(), number)


def run(scenario: dict, rank: int) -> None:
    """In a child: `train` with this rank's arguments, its output in a file."""
    out = os.open(f"{scenario['log']}-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    # A store of its own for each scenario, on host 0: torchrun's still holds what the last one wrote.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(scenario["port"])}
    if scenario["hosts"] == 1:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name)
    setup.make_backend = HostsBackend
    if scenario["signal"] and scenario["signal"]["rank"] == rank:
        arguments = (Path(scenario["signal"]["when"]), getattr(signal, scenario["signal"]["name"]))
        threading.Thread(target=signal_when, args=arguments, daemon=True).start()
    atexit.register(os._exit, UNANSWERED)  # as torch_xla does: registered before, so it comes after the run's own
    code = 3
    try:
        code = main(scenario["arguments"][rank])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            atexit._run_exitfuncs()
        os._exit(code)


def play(file: str) -> None:
    """All scenarios, as one of torchrun's processes."""
    rank, ended = int(os.environ["RANK"]), []
    for scenario in json.loads(Path(file).read_text()):
        if rank >= scenario["hosts"]:
            ended.append(None)
            continue
        child = os.fork()
        if not child:
            run(scenario, rank)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    Path(f"{file}-{rank}").write_text(json.dumps(ended))


gc.freeze()
config = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=int(sys.argv[2]),
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    start_method="fork",
    run_id="hosts",
    max_restarts=0,
)
elastic_launch(config, play)(sys.argv[1])
