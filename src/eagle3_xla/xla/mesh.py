"""Where the devices of a (dp, tp) mesh lie on a slice: `plan` and `train` take it from here."""

import numpy as np

from eagle3_xla.errors import UserError

HOST = 2  # a host has HOST x HOST chips


def mesh_devices(dp: int, tp: int, coordinates: list[tuple[int, ...]] | None = None) -> np.ndarray:
    """Device numbers [dp, tp]: tp within a host's 2x2 chips, dp from host to neighbouring host along the torus.

    coordinates: of each device, (x, y) or (x, y, z), by its number; None: devices that lie nowhere (CPU). torch_xla
    numbers devices by their ids, on v5e and v6e row by row over all hosts.
    """
    if coordinates is None:
        return np.arange(dp * tp).reshape(dp, tp)
    assert len(coordinates) == dp * tp
    blocks = max((x // HOST + 1, y // HOST + 1) for x, y, *_ in coordinates)

    def place(number: int) -> tuple:
        x, y, *more = coordinates[number]
        z = more[0] if more else 0
        column, row = x // HOST, y // HOST
        row = blocks[1] - 1 - row if z % 2 else row  # there and back, so that the next host is a neighbour
        column = blocks[0] - 1 - column if row % 2 else column
        return z, row, column, y, x

    return np.array(sorted(range(dp * tp), key=place)).reshape(dp, tp)


def part_of_host(mesh: np.ndarray, mine: list[int]) -> tuple[int, list[int]]:
    """(which part of a batch the host with devices `mine` reads, the replica of each of these devices within it).

    Raises UserError when its devices are not whole replicas that follow each other in `mesh` [dp, tp].
    """
    dp, tp = mesh.shape
    replica_of = {int(device): replica for replica, devices in enumerate(mesh) for device in devices}
    replicas = sorted({replica_of[device] for device in mine})
    count = len(replicas)
    if count * tp != len(mine) or dp % count or replicas != list(range(replicas[0], replicas[0] + count)):
        raise UserError(
            f"a host has {len(mine)} devices, which are not whole replicas of xla.tp = {tp} devices "
            f"that follow each other in xla.dp = {dp}"
        )
    return replicas[0] // count, [replica_of[device] - replicas[0] for device in mine]
