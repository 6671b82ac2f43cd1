"""The TPU compiler's verdict on a recipe, before a TPU is rented."""
