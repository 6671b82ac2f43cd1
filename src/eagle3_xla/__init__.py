"""EAGLE3 draft heads, trained with PyTorch/XLA and carried into the engines that serve them."""

__version__ = "0.1.0"
