"""Where the step runs. spmd.py is the only file that imports torch_xla; plain.py has the same methods without it."""

from eagle3_xla.config import UserError, XlaConfig


def make_backend(config: XlaConfig):
    """The backend of a recipe: SpmdBackend (XLA devices) or PlainBackend (one CPU or GPU, eager)."""
    if config.device == "xla":
        try:
            from eagle3_xla.xla.spmd import SpmdBackend
        except ImportError as error:
            raise UserError(
                f"xla.device is xla, but torch_xla is not usable here ({error}); or --xla.device=cpu"
            ) from None
        return SpmdBackend(config)
    from eagle3_xla.xla.plain import PlainBackend

    return PlainBackend(config)
