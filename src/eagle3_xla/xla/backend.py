"""The backend that a recipe names: spmd.py, or plain.py, which has the same methods without torch_xla."""

from eagle3_xla.errors import UserError
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.hosts import Hosts


def make_backend(config: XlaConfig, hosts: Hosts | None = None):
    """The backend of a recipe: SpmdBackend (XLA devices) or PlainBackend (one CPU or GPU, eager); hosts: who run it
    together (default: this process alone)."""
    if config.device == "xla":
        try:
            from eagle3_xla.xla.spmd import SpmdBackend
        except ImportError as error:
            raise UserError(
                f"xla.device is xla, but torch_xla is not usable here ({error}); or --xla.device=cpu"
            ) from None
        return SpmdBackend(config, hosts)
    from eagle3_xla.xla.plain import PlainBackend

    return PlainBackend(config, hosts)
