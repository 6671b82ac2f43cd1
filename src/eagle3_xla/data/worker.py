"""What the processes of ordered_map import, once, before they are forked.

Without torch_xla, which transformers would import by way of accelerate, and without the garbage collector, since what
is imported is no garbage.
"""

import gc
import os
from importlib import import_module

os.environ["USE_TORCH_XLA"] = "0"
gc.disable()
for name in ("data.documents", "data.filters", "data.spool"):
    import_module(f"eagle3_xla.{name}")
import_module("transformers.models.auto.tokenization_auto")
gc.freeze()
gc.enable()
