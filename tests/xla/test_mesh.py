"""The mesh lies along the torus, and a host's rows reach its devices."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from eagle3_xla.errors import UserError
from eagle3_xla.xla import spmd
from eagle3_xla.xla.mesh import mesh_devices, part_of_host
from eagle3_xla.xla.tpu import TOPOLOGIES, find_topology


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tp_is_within_a_host_and_dp_goes_to_neighbours(name):
    topology = find_topology(name)
    coordinates = np.array(topology.coordinates())
    mesh = mesh_devices(topology.chips // 4, 4, topology.coordinates())
    assert sorted(mesh.ravel()) == list(range(topology.chips))
    hosts = coordinates[mesh]  # [dp, tp, 2 or 3]
    hosts[..., :2] //= 2
    assert (hosts == hosts[:, :1]).all()
    assert (np.abs(np.diff(hosts[:, 0], axis=0)).sum(1) == 1).all()


def test_the_reference_slice_is_numbered_as_the_mesh_goes():
    assert mesh_devices(4, 4, find_topology("v4-32").coordinates()).tolist() == np.arange(16).reshape(4, 4).tolist()
    # On a v5e-16 the ids go row by row over all hosts.
    assert mesh_devices(4, 4, find_topology("v5e-16").coordinates())[:2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


PRODUCTS = """
import torch, torch_xla
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.spmd import SpmdBackend
for autocast in (False, True):
    backend = SpmdBackend(XlaConfig(dp=2, autocast=autocast))
    x = torch.ones(4, 4, device=backend.device)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([(x + 1) @ x])
    print(*(line.partition("operand_precision=")[2] or "default" for line in hlo.splitlines() if " dot(" in line))
"""


def test_float32_is_multiplied_as_float32(forks):
    """On a TPU the default precision rounds the operands to bfloat16."""
    done = forks.run_code(PRODUCTS, environment={"CPU_NUM_DEVICES": "2"})
    assert done.stdout.split() == ["{highest,highest}", "default"], done.stderr


def test_a_host_reads_the_part_of_its_replicas():
    mesh = mesh_devices(4, 4, find_topology("v5e-16").coordinates())
    third = [10, 11, 14, 15]  # the host at the far corner: the ring goes round it before the fourth
    assert part_of_host(mesh, third) == (2, [0, 0, 0, 0])
    assert part_of_host(mesh_devices(8, 2), [4, 5, 6, 7]) == (1, [0, 0, 1, 1])
    assert part_of_host(mesh_devices(1, 4), [0, 1, 2, 3]) == (0, [0, 0, 0, 0])
    for mesh, mine in ((mesh_devices(4, 4), [2, 3, 4, 5]), (mesh_devices(2, 8), [0, 1, 2, 3])):
        with pytest.raises(UserError, match="not whole replicas"):
            part_of_host(mesh, mine)


PARTS = """
import os, torch, torch_xla
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.spmd import SpmdBackend
from eagle3_xla.xla.tpu import find_topology
backend = SpmdBackend(XlaConfig(dp=4, tp=4), coordinates=find_topology("v5e-16").coordinates())
assert backend.part == 0
for rows in (4, 16):  # as many as replicas: torch_xla's minibatch refuses a host's part of them
    whole = torch.arange(rows * 6, dtype=torch.int32).view(rows, 6)
    placed, as_before = backend._from_parts(whole), backend.put({"x": whole})["x"]
    assert torch.equal(backend.to_host(placed), whole) and torch.equal(placed.cpu(), whole)
    sharding = torch_xla._XLAC._get_xla_sharding_spec
    assert sharding(placed) == sharding(as_before) and "devices=[4,1,4]0,1,4,5,2,3,6,7," in sharding(placed)
os._exit(0)
"""


def test_the_parts_of_a_batch_reach_the_devices_of_their_replica(forks):
    done = forks.run_code(PARTS, environment={"CPU_NUM_DEVICES": "16"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("answer, kind", [("ACCELERATOR_TYPE: 'v5litepod-16'", "v5e-16"), ("", "")])
def test_the_metadata_server_is_asked_once_what_the_slice_is(monkeypatch, answer, kind):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if answer else 404)
            self.end_headers()
            self.wfile.write(answer.encode())

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("torch_xla._internal.tpu._GCE_METADATA_ROOT_URL", root)
    spmd._accelerator.cache_clear()
    try:
        assert [spmd._accelerator(), spmd._accelerator()] == [kind, kind]
        assert asked == ["/instance/attributes/tpu-env"]
    finally:
        spmd._accelerator.cache_clear()
        server.shutdown()
        server.server_close()
