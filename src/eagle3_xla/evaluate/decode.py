"""Speculative decoding as the engines do it, in plain torch with KV caches: a chain or a tree, greedy or sampled.

One round: the head drafts from the target's states of the tokens known so far; the target checks all drafts in one
forward and chooses a token after each of them; the drafts along its own choices are kept, and the choice after the
last of them comes for free. So the output is the target's own, token for token.

A tree grows as in EAGLE-2 and SGLang (`--speculative-num-steps`, `--speculative-eagle-topk`): each step expands the
topk likeliest nodes of the last one by topk drafts each; of all nodes the `draft_tokens` likeliest are checked
(SGLang's `--speculative-num-draft-tokens` counts the root too: one more). A node attends to its own ancestors. A
chain is the tree with topk 1.

Drafts are always the head's likeliest tokens; only the target's choice is sampled. A draft is then accepted with the
target's probability of it, which is the rule of vLLM for greedy drafts and of SGLang's tree verification.
"""

import time
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.target.families import attention_masks
from eagle3_xla.target.model import Target
from eagle3_xla.target.sampling import choose_tokens


@dataclass
class Generation:
    """One answer. tokens: ids, the end-of-turn token included if the target wrote it; seconds: decoding, prefill apart.

    accepted: drafts accepted in every target call after prefill. Calls count whole, as SGLang
    (`spec_num_correct_drafts`) and vLLM (`spec_decode_num_accepted_tokens`) count them: drafts that an end-of-turn
    token or the length limit then cuts off are accepted ones too. The token that prefill chooses is no call's.
    rounds: the drafts of each of these calls, and the nodes that were kept, the root first.
    """

    tokens: list[int]
    seconds: float
    accepted: list[int] = field(default_factory=list)
    rounds: list[tuple["Tree", list[int]]] = field(default_factory=list)


@dataclass
class Choice:
    """How the target chooses a token: greedily (temperature 0), or sampled from the top_p share of its distribution.

    The noise of a sample is a function of (seed, prompt, position) alone, so decoding with and without a head gives
    the same sampled answer, and `identical` means something there too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prompt: int = 0

    def __call__(self, logits: torch.Tensor, position: int) -> int:
        """logits [V] -> token id; position: index of that token in the text."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.prompt, position)) & (2**63 - 1))
        return choose_tokens(logits[None], self.temperature, self.top_p, [generator])[0]


@torch.inference_mode()
def decode_plain(target: Target, prompt: list[int], max_new_tokens: int, stop_ids: set[int], choose=None) -> Generation:
    """The target's own decoding, one token a call."""
    choose = choose or Choice()
    cache = DynamicCache()  # whole: a window is the mask's matter, so that drafts can be taken back
    ids = torch.tensor([prompt], device=target.device)
    output = target.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = choose(output.logits[0, -1], len(prompt))
    tokens, started = [token], time.perf_counter()
    while token not in stop_ids and len(tokens) < max_new_tokens:
        ids = torch.tensor([[token]], device=target.device)
        logits = target.model(input_ids=ids, past_key_values=cache).logits[0, -1]
        token = choose(logits, len(prompt) + len(tokens))
        tokens.append(token)
    return Generation(tokens, time.perf_counter() - started)


@dataclass
class Tree:
    """Drafts of one round. Node 0 is the last known token; a node's parent comes before it."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    scores: list[float] = field(default_factory=lambda: [0.0])  # log-probability of the path from the root

    def add(self, token: int, parent: int, log_probability: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.scores.append(self.scores[parent] + log_probability)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`."""
        return [*self.path(self.parents[node]), node] if node >= 0 else []

    def best(self, nodes, count: int) -> list[int]:
        """The likeliest `count` of these nodes; of equal ones the first, so a parent is never worse than its child."""
        return sorted(nodes, key=lambda node: -self.scores[node])[:count]

    def pruned(self, drafts: int) -> "Tree":
        """The likeliest `drafts` nodes besides the root."""
        kept = [0, *sorted(self.best(range(1, len(self.tokens)), drafts))]
        place = {node: i for i, node in enumerate(kept)} | {-1: -1}
        columns = ([column[node] for node in kept] for column in (self.tokens, self.parents, self.scores))
        tokens, parents, scores = columns
        return Tree(tokens, [place[parent] for parent in parents], scores)

    def visible(self) -> torch.Tensor:
        """[nodes, nodes] bool: row i is true at i and above it."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for node in range(1, len(self.tokens)):
            mask[node] |= mask[self.parents[node]]
        return mask


class SpeculativeDecoder:
    """Draft-and-verify decoding. draft_tokens: drafts checked in a target call; steps: how deep the head drafts;
    topk: drafts per node (1: a chain, and steps = draft_tokens).
    """

    def __init__(self, target: Target, head: Eagle3Head, d2t: torch.Tensor, draft_tokens: int, topk=1, steps=None):
        self.target, self.head = target, head
        self.draft_tokens, self.topk, self.steps = draft_tokens, topk, steps or draft_tokens
        self.draft_ids = (d2t + torch.arange(len(d2t), device=d2t.device)).to(target.device)

    @torch.inference_mode()
    def decode(self, prompt: list[int], max_new_tokens: int, stop_ids: set[int], choose=None) -> Generation:
        choose = choose or Choice()
        cache, draft_cache = DynamicCache(), _DraftCache()
        output = self.target.model(
            input_ids=torch.tensor([prompt], device=self.target.device), past_key_values=cache, logits_to_keep=1
        )
        tokens = [choose(output.logits[0, -1], len(prompt))]
        generation = Generation(tokens, 0.0)
        # Rows the head has not seen: the prompt's aux states, each with the embedding of the token after it.
        pending_aux, pending_tokens, position = self.target.captured_aux()[0], [*prompt[1:], tokens[0]], 0
        started = time.perf_counter()
        while tokens[-1] not in stop_ids and len(tokens) < max_new_tokens:
            tree = self._draft(pending_aux, pending_tokens, position, draft_cache)
            position += len(pending_tokens)
            logits, aux = self._check(tree, cache)
            kept, new = self._accept(tree, logits, position + 1, choose)
            _keep(cache, len(tree.tokens), kept)
            generation.accepted.append(len(kept) - 1)
            generation.rounds.append((tree, kept))
            pending_aux, pending_tokens = aux[kept], new
            end = next((i + 1 for i, token in enumerate(new) if token in stop_ids), len(new))
            tokens += new[: min(end, max_new_tokens - len(tokens))]
        generation.seconds = time.perf_counter() - started
        return generation

    def _accept(self, tree: Tree, logits: torch.Tensor, position: int, choose) -> tuple[list[int], list[int]]:
        """From the root along the target's choices: the nodes passed, and the choice after each of them.

        position: index in the text of the token after the root.
        """
        node, kept, new = 0, [], []
        while node is not None:
            kept.append(node)
            new.append(choose(logits[node], position + len(new)))
            children = (child for child in range(len(tree.tokens)) if tree.parents[child] == node)
            node = next((child for child in children if tree.tokens[child] == new[-1]), None)
        return kept, new

    def _check(self, tree: Tree, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's logits [nodes, V] and aux states [nodes, 3H]; the cache grows by all nodes."""
        device, known = self.target.device, cache.get_seq_length()
        visible = tree.visible()
        positions = known + visible.sum(-1) - 1
        mask = torch.cat([torch.ones(len(visible), known, dtype=torch.bool), visible], dim=1)
        distance = positions[:, None] - torch.cat([torch.arange(known), positions])
        output = self.target.model(
            input_ids=torch.tensor([tree.tokens], device=device),
            position_ids=positions[None].to(device),
            attention_mask=attention_masks(self.target.model.config, mask[None].to(device), distance.to(device)),
            past_key_values=cache,
        )
        return output.logits[0], self.target.captured_aux()[0]

    def _draft(self, aux: torch.Tensor, tokens: list[int], position: int, cache: "_DraftCache") -> Tree:
        """Feed the rows (aux state t, token t+1) from `position` on, then grow a tree after the last of them."""
        hidden = self.head.features(aux[None].to(self.head.fc.weight.dtype))
        causal = torch.ones(len(tokens), cache.length + len(tokens), dtype=torch.bool).tril(cache.length)
        positions = list(range(position, position + len(tokens)))
        hidden = self._rows(tokens, hidden, positions, cache, causal)[:, -1:]
        known, position = cache.length, position + len(tokens)
        tree = Tree([tokens[-1]])
        frontier, fed = [0], []  # hidden [1, len(frontier), H] predicts the children of the frontier
        for step in range(self.steps):
            children = []
            log_probabilities = self.head.logits(hidden)[0].float().log_softmax(-1).topk(self.topk)
            for node, values, indices in zip(frontier, log_probabilities.values.tolist(), log_probabilities.indices):
                for value, token in zip(values, self.draft_ids[indices].tolist()):
                    children.append(tree.add(token, node, value))
            if step + 1 == self.steps:
                break
            parents, frontier = frontier, tree.best(children, self.topk)
            hidden = hidden[:, [parents.index(tree.parents[node]) for node in frontier]]
            fed += frontier
            mask = torch.ones(len(frontier), known + len(fed), dtype=torch.bool)
            for row, node in enumerate(frontier):
                ancestors = tree.path(node)
                mask[row, known:] = torch.tensor([row_node in ancestors for row_node in fed])
            row_tokens = [tree.tokens[node] for node in frontier]
            hidden = self._rows(row_tokens, hidden, [position + step] * len(frontier), cache, mask)
        cache.crop(known)  # rows made from the head's own hidden states are made again from the target's
        return tree.pruned(self.draft_tokens)

    def _rows(self, tokens: list[int], hidden, positions: list[int], cache: "_DraftCache", mask) -> torch.Tensor:
        """Run the head over new rows; mask [rows, cached + rows] bool. Returns hidden [1, rows, H], pre-norm."""
        device = hidden.device
        embedded = self.head.embedded(self.target.embed_tokens(torch.tensor([tokens], device=device)).to(hidden.dtype))
        rope = self.head.rope(hidden, torch.tensor([positions], device=device))
        cache.mask = mask.to(device)
        return self.head.midlayer(embedded, hidden, rope, cache.attend)


def _keep(cache: DynamicCache, checked: int, kept: list[int]) -> None:
    """Of the cache's last `checked` rows keep these, in this order."""
    known = cache.get_seq_length() - checked
    if kept != list(range(len(kept))):
        for layer in cache.layers:
            for rows in (layer.keys, layer.values):
                rows[:, :, known : known + len(kept)] = rows[:, :, [known + node for node in kept]]
    cache.crop(known + len(kept))


class _DraftCache:
    """Keys and values [1, kv_heads, length, D] of the head's one layer; mask [new, length + new] of the next rows."""

    def __init__(self):
        self.key = self.value = self.mask = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def crop(self, length: int) -> None:
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, n, heads, D], key and value [1, n, kv_heads, D] of new rows."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.key is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=self.mask, enable_gqa=True).transpose(1, 2)
