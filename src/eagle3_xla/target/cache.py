"""Keys and values of several texts that are decoded at once, each in a slot of its own."""

import torch
from torch.nn.functional import pad

FIRST_CAPACITY = 256  # positions; doubled when a text outgrows it


class SlotCache:
    """Keys and values of texts of different lengths, [slots, kv_heads, capacity, D] a layer, as transformers' models
    call it.

    `place` before each forward says where the forward's rows go. What a row may see of its slot is the mask's matter:
    rows that no mask shows are free to be written over, so nothing is ever cut off.
    """

    def __init__(self, slots: int, device: torch.device | str):
        self.slots, self.device, self.capacity = slots, device, FIRST_CAPACITY
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.texts, self.rows, self.places, self.length = slice(0), torch.empty(0), torch.empty(0), 0

    def place(self, first: int, places: torch.Tensor, length: int) -> None:
        """Row j of text i goes to places[i, j] of slot first + i; places [B, n]; length: beyond the last place."""
        count = len(places)
        self.texts, self.places, self.length = slice(first, first + count), places, length
        self.rows = torch.arange(first, first + count, device=self.device)[:, None]
        if length > self.capacity:
            more = max(2 * self.capacity, length) - self.capacity
            self.layers = [(pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))) for keys, values in self.layers]
            self.capacity += more

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, arguments: object = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [B, kv_heads, n, D] -> those to attend to, [B, kv_heads, length, D]."""
        if layer == len(self.layers):
            shape = (self.slots, key.shape[1], self.capacity, key.shape[3])
            self.layers.append((key.new_zeros(shape), value.new_zeros(shape)))
        keys, values = self.layers[layer]
        keys[self.rows, :, self.places], values[self.rows, :, self.places] = key.transpose(1, 2), value.transpose(1, 2)
        return keys[self.texts, :, : self.length], values[self.texts, :, : self.length]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def move(self, source: int, to: int) -> None:
        """Slot `to` becomes what slot `source` is."""
        for keys, values in self.layers:
            keys[to], values[to] = keys[source], values[source]

    def reorder(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Of slots 0, 1, ..., the rows at source[i, j] come to stand at to[i, j]; both [B, n]."""
        rows = torch.arange(len(source), device=self.device)[:, None]
        for keys, values in self.layers:
            keys[rows, :, to], values[rows, :, to] = keys[rows, :, source], values[rows, :, source]
