"""The EAGLE3 head: plain torch.nn, nothing of XLA."""
