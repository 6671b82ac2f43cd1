"""Speculative decoding as the engines do it, in plain torch with KV caches: greedy, a chain of drafts.

One round: the head drafts a chain from the target's states of the tokens known so far; the target checks the whole
chain in one forward; the longest prefix that equals the target's own greedy choices is kept, and the target's choice
after it comes for free. So the output is the target's own greedy output, token for token.
"""

import time
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.target.model import Target


@dataclass
class Generation:
    """One answer. tokens: ids, the end-of-turn token included if the target wrote it; seconds: decoding, prefill apart.

    accepted: for every target call after prefill, how many of its drafts were kept; proposed: how many it was given
    (drafts past the answer's end are counted in neither).
    """

    tokens: list[int]
    seconds: float
    accepted: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode_plain(target: Target, prompt: list[int], max_new_tokens: int, stop_ids: set[int]) -> Generation:
    """The target's own greedy decoding."""
    cache = DynamicCache(config=target.model.config)
    ids = torch.tensor([prompt], device=target.device)
    output = target.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = int(output.logits[0, -1].argmax())
    tokens, started = [token], time.perf_counter()
    while token not in stop_ids and len(tokens) < max_new_tokens:
        ids = torch.tensor([[token]], device=target.device)
        token = int(target.model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax())
        tokens.append(token)
    return Generation(tokens, time.perf_counter() - started)


class ChainDecoder:
    """Greedy draft-and-verify decoding with a chain of `draft_tokens` drafts per target call."""

    def __init__(self, target: Target, head: Eagle3Head, d2t: torch.Tensor, draft_tokens: int):
        self.target, self.head, self.draft_tokens = target, head, draft_tokens
        self.draft_ids = (d2t + torch.arange(len(d2t), device=d2t.device)).to(target.device)

    @torch.inference_mode()
    def decode(self, prompt: list[int], max_new_tokens: int, stop_ids: set[int]) -> Generation:
        cache = DynamicCache(config=self.target.model.config)
        draft_cache = _DraftCache()
        logits, aux = self._target(prompt, cache)
        tokens = [int(logits[-1].argmax())]
        generation = Generation(tokens, 0.0)
        # Rows the head has not seen: the prompt's aux states, each with the embedding of the token after it.
        pending_aux, pending_tokens, position = aux, [*prompt[1:], tokens[0]], 0
        started = time.perf_counter()
        while tokens[-1] not in stop_ids and len(tokens) < max_new_tokens:
            drafts = self._draft(pending_aux, pending_tokens, position, draft_cache)
            position += len(pending_tokens)
            logits, aux = self._target([tokens[-1], *drafts], cache)
            choices = logits.argmax(-1).tolist()  # choices[i] follows tokens[-1], drafts[:i]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
                accepted += 1
            new = choices[: accepted + 1]
            # What the answer's end cuts off was neither needed nor served.
            end = next((i + 1 for i, token in enumerate(new) if token in stop_ids), len(new))
            end = min(end, max_new_tokens - len(tokens))
            generation.accepted.append(min(accepted, end))
            generation.proposed.append(len(drafts) if end == len(new) else end)
            cache.crop(cache.get_seq_length() - len(drafts) + accepted)
            pending_aux, pending_tokens = aux[: accepted + 1], new
            tokens += new[:end]
        generation.seconds = time.perf_counter() - started
        return generation

    def _target(self, ids: list[int], cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, V] and aux states [n, 3H] of new tokens."""
        output = self.target.model(input_ids=torch.tensor([ids], device=self.target.device), past_key_values=cache)
        return output.logits[0], self.target.captured_aux()[0]

    def _draft(self, aux: torch.Tensor, tokens: list[int], position: int, cache: "_DraftCache") -> list[int]:
        """Feed the rows (aux state t, token t+1) from `position` on, then draft a chain after the last of them."""
        hidden = self.head.features(aux[None].to(self.head.fc.weight.dtype))
        drafts, chain = [], tokens
        for k in range(self.draft_tokens):
            hidden = self._row(chain, hidden, position, cache)[:, -1:]
            position += len(chain)
            draft = int(self.draft_ids[self.head.logits(hidden)[0, -1].argmax()])
            drafts.append(draft)
            chain = [draft]
            if k == 0:
                known = cache.length
        cache.crop(known)  # rows made from the head's own hidden states are made again from the target's
        return drafts

    def _row(self, tokens: list[int], hidden: torch.Tensor, position: int, cache: "_DraftCache") -> torch.Tensor:
        device = hidden.device
        embeds = self.target.embed_tokens(torch.tensor([tokens], device=device)).to(hidden.dtype)
        position_ids = torch.arange(position, position + len(tokens), device=device)[None]
        return self.head.midlayer(embeds, hidden, self.head.rope(hidden, position_ids), cache.attend)


class _DraftCache:
    """Keys and values [1, kv_heads, length, D] of the head's one layer."""

    def __init__(self):
        self.key = self.value = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def crop(self, length: int) -> None:
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, n, heads, D], key and value [1, n, kv_heads, D] of new rows; causal over everything cached."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.key is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        new, total = query.shape[2], key.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2)
