"""The step that `train` compiles, run by two processes: `lower` writes its HLO module and arguments, `run` loads and
executes them with JAX, whose CPU collectives (gloo) reach from process to process.
"""

import contextlib
import os
import sys
from pathlib import Path

PROCESSES, DEVICES = 2, 4


def lower(folder: Path, settings: list[str]) -> None:
    """With real weights on virtual devices: step.hlo, argument-N.npy in the module's order, and the loss, computed by
    torch_xla in this one process."""
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(DEVICES)}
    import numpy as np
    import torch
    import torch_xla

    import eagle3_xla.train.setup as setup
    from eagle3_xla.config import load_recipe
    from eagle3_xla.train.step import unpack_metrics
    from eagle3_xla.xla.hosts import Hosts
    from eagle3_xla.xla.spmd import SpmdBackend

    class Traced(SpmdBackend):
        def compile(self, function, state=()):
            return function

    setup.make_backend = Traced
    run = setup.set_up(load_recipe(None, settings), [], Hosts(), contextlib.ExitStack())
    batch, _ = run.data.loader.load(run.data.batches.indices(0))
    torch_xla.sync(wait=True)
    metrics, norm = run.step.run(0, batch)
    outputs = [metrics, norm, *run.head.parameters()]
    (folder / "step.hlo").write_bytes(torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs))
    arguments = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)[1]
    loss = unpack_metrics(metrics)[0]
    for number, tensor in enumerate(arguments):
        tensor = run.backend.to_host(tensor) if tensor.ndim else tensor.cpu()
        assert tensor.dtype != torch.bfloat16
        np.save(folder / f"argument-{number}.npy", tensor.numpy())
    print(loss)


def run(folder: Path, process: int, port: str) -> None:
    import jax
    import numpy as np
    from jax._src.sharding_impls import GSPMDSharding
    from jaxlib import _jax

    from eagle3_xla.xla.tpu import _with_shardings

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # d2t is int64
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    devices = jax.devices()
    assert len(devices) == DEVICES and [device.process_index for device in devices] == [0, 0, 1, 1]
    module = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation((folder / "step.hlo").read_bytes()))
    options = _jax.CompileOptions()
    options.num_replicas, options.num_partitions = 1, DEVICES
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, DEVICES
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.allow_spmd_sharding_propagation_to_output = [True]
    build.device_assignment = options.device_assignment = _jax.DeviceAssignment.create(
        np.array([[device.id for device in devices]])
    )
    executable = devices[0].client.compile_and_load(
        _with_shardings(module, []), executable_devices=_jax.DeviceList(tuple(devices)), compile_options=options
    )
    text = executable.hlo_modules()[0].to_string()
    arguments = []
    for number, sharding in enumerate(executable.get_parameter_shardings()):
        whole = np.load(folder / f"argument-{number}.npy")
        sharding = GSPMDSharding(tuple(devices), _jax.HloSharding.from_proto(sharding))
        arguments.append(jax.make_array_from_callback(whole.shape, sharding, lambda index, whole=whole: whole[index]))
    results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    loss = float(np.asarray(results[0][0])[0])
    print(loss, text.count(" all-reduce("), flush=True)
    jax.distributed.shutdown()


def run_both(folder: Path, port: str) -> None:
    other = os.fork()
    run(folder, 0 if other else 1, port)
    if not other:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0


folder = Path(sys.argv[2])
lower(folder, sys.argv[3:]) if sys.argv[1] == "lower" else run_both(folder, sys.argv[3])
