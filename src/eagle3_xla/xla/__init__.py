"""Where the step runs; the only package that imports torch_xla."""
