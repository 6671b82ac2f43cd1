"""The settings of the backend: devices, their mesh, what a step computes in."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class XlaConfig:
    device: str = setting("xla", among=("xla", "cpu", "cuda"))  # cpu, cuda: plain torch on one device
    dp: int = setting(1, within="[1, 65536]")  # data-parallel replicas; dp * tp = devices
    tp: int = setting(1, within="[1, 65536]")  # tensor-parallel devices in a replica
    draft_data_parallel: bool = False  # the draft phase is not split over tp: rows over all dp * tp devices instead
    autocast: bool = True  # bf16 matmuls over fp32 master weights
    remat: bool = False  # TTT steps computed again in the backward pass, losses one by one: less memory, more work
    # bf16 TFLOP/s of a device, for MFU; 0: what is known of this TPU
    peak_tflops: float = setting(0.0, within="[0, inf)")
