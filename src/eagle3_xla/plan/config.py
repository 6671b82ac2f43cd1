"""The settings of `plan`."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class PlanConfig:
    topology: str = setting("v4-32", free=True)  # the slice that `plan` compiles for (xla/tpu.py lists them)
    # positions of the whole run, padding included, assumed while no data is prepared; 0: unknown then
    tokens: int = setting(0, within="[0, inf)", free=True)
    price_per_chip_hour: float = setting(0.0, within="[0, inf)", free=True)  # dollars; 0: no price is printed
    # compile so many of the target's layers, extend the figures to all (plan/compiled.py); 0: all
    layers: int = setting(0, within="[0, inf)", free=True)
    # of the TPU compiler: "--xla_...=... --xla_...=..."; a run takes them as LIBTPU_INIT_ARGS
    xla_flags: str = setting("", free=True)
