"""The next token from the target's logits."""

import torch


def choose_tokens(
    logits: torch.Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> list[int]:
    """logits [n, V] -> n token ids: greedy at temperature 0, else a sample of the top_p share of softmax(logits / T).

    generators: one for each row, all on one device; a row's sample depends on its own generator alone.
    """
    if not temperature:
        return logits.argmax(-1).tolist()
    scaled = logits.to(generators[0].device, torch.float32) / temperature
    if top_p < 1:
        ordered, ids = scaled.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        scaled[beyond.new_zeros(beyond.shape).scatter(-1, ids, beyond)] = -torch.inf
    noise = torch.empty_like(scaled)
    for row, generator in zip(noise, generators):
        row.exponential_(generator=generator)
    return (scaled - noise.log()).argmax(-1).tolist()  # Gumbel-max
