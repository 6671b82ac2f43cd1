"""The time model on single operations, next to the chip's published bounds; writes src/eagle3_xla/xla/calibration.json.

    python benchmarks/time_model.py [v4-32 ...]

A ratio of 1 is the bound itself. Matmuls should lie above it by what tiling and prefetching cost, streaming operations
by 1 / HBM_EFFICIENCY, collectives by 1 / ICI_EFFICIENCY. Needs the `plan` extra, no TPU.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eagle3_xla.xla.time_model as time_model
from eagle3_xla.xla.tpu import find_topology, topology_devices

OUT = Path(time_model.__file__).with_name("calibration.json")
BF16 = jnp.bfloat16


def operations(topology, mesh):
    """(name, function, [(shape, sharding)], bound in seconds) with the shapes of the reference recipe's step."""
    chip, chips = topology.chip, topology.chips
    rows, whole = NamedSharding(mesh, P("all")), NamedSharding(mesh, P())
    for m, k, n in [(4096, 3584, 4736), (4096, 4736, 3584), (1024, 3584, 18944), (1024, 3584, 32000), (8192,) * 3]:
        bound = max(2 * m * k * n / chip.peak_flops, 2 * (m * k + k * n + m * n) / chip.hbm_rate)
        yield f"matmul {m}x{k}x{n}", lambda x, w: x @ w, [((chips * m, k), rows), ((k, n), whole)], bound
    tokens, width = 4096, 3584
    size = 2 * tokens * width
    tensor = ((chips * tokens, width), rows)
    yield (
        "add bf16 [4096,3584] x64",
        lambda x, y: x + y,
        [((64 * chips * tokens, width), rows)] * 2,
        64 * 3 * size / chip.hbm_rate,
    )

    def norm(x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(BF16)

    yield "rmsnorm bf16 [4096,3584] x64", norm, [((64 * chips * tokens, width), rows)], 64 * 2 * size / chip.hbm_rate

    def attention(q, k, v):  # masked as the target's is; without a mask the compiler puts its own flash kernel there
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k).astype(jnp.float32)
        scores = jnp.where(jnp.tril(jnp.ones((1024, 1024), bool)), scores, -3e38)
        return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores).astype(BF16), v)

    heads = ((chips * 4, 7, 1024, 128), rows)
    scores = 4 * 7 * 1024 * 1024
    yield "attention [4,7,1024,128]", attention, [heads] * 3, 4 * scores * 128 / chip.peak_flops
    for name, collective, traffic in [
        ("all-gather", lambda x: jax.lax.all_gather(x, "all", tiled=True), 1),
        ("all-reduce", lambda x: jax.lax.psum(x, "all"), 2),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "all", tiled=True), 1),
    ]:
        spread = jax.shard_map(collective, mesh=mesh, in_specs=P("all"), out_specs=P("all"), check_vma=False)
        payload = size * chips if name == "all-gather" else size
        links = sum(extent > 1 for extent in topology.shape)
        bound = traffic * payload * (chips - 1) / chips / (links * chip.link_rate)
        yield f"{name} 29 MB, {chips} chips", spread, [tensor], bound


def main(names: list[str]) -> None:
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in names:
        topology = find_topology(name)
        mesh = Mesh(np.array(topology_devices(topology)), ("all",))
        rows = {}
        for operation, function, arguments, bound in operations(topology, mesh):
            placed = [jax.ShapeDtypeStruct(shape, BF16, sharding=sharding) for shape, sharding in arguments]
            compiled = jax.jit(function).lower(*placed).compile()
            seconds = time_model.model_time(compiled.as_text(), topology).total
            rows[operation] = {"modelled_ms": round(seconds * 1e3, 4), "bound_ms": round(bound * 1e3, 4)}
            print(f"{name}  {operation:32}  {seconds * 1e3:8.3f} ms  {seconds / bound:5.2f} x bound", flush=True)
        table[topology.name] = rows
    OUT.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["v4-32", "v5e-16", "v5p-16", "v6e-16"])
