"""What the processes of ordered_map import, once, before they are forked.

Without torch_xla, which transformers would import by way of accelerate, and without the garbage collector, since what
is imported is no garbage.
"""

# ruff: noqa: E402, F401
import gc
import os

os.environ["USE_TORCH_XLA"] = "0"
gc.disable()

from transformers import AutoTokenizer

from eagle3_xla.data import documents, filters, spool

gc.freeze()
gc.enable()
