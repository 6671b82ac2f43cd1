"""Speculative decoding as the engines do it, in plain torch with KV caches: a chain or a tree, greedy or sampled.

One round: the head drafts from the target's states of the tokens known so far; the target checks all drafts in one
forward and chooses a token after each of them; the drafts along its own choices are kept, and the choice after the
last of them comes for free. So the output is the target's own, token for token.

Several texts take part in a round, each in a slot of the caches; one that ends gives its slot to the next prompt.
They share the forwards and nothing else: a text's answer is the one that it gets alone, up to the rounding of matrix
products of another shape, which can turn a choice between two tokens that are equally likely to the last digits.

A tree grows as in EAGLE-2 and SGLang (`--speculative-num-steps`, `--speculative-eagle-topk`): each step expands the
topk likeliest nodes of the last one by topk drafts each; of all nodes the `draft_tokens` likeliest are checked
(SGLang's `--speculative-num-draft-tokens` counts the root too: one more). A chain is the tree with topk 1.

In the target a node attends to its own ancestors. In the head it attends, of the drafts, to those of its own rank among
the topk of every step so far, whatever its parent. That is SGLang's attention and not EAGLE-2's: there a rank has its
own cache slots (`per_step_draft_out_cache_loc`, `generate_draft_decode_kv_indices` of 0.5.21), and these aren't
reordered when the topk likeliest of a step descend from other ranks. Only the fed-back hidden state is the parent's.

Drafts are always the head's likeliest tokens; only the target's choice is sampled. A draft is then accepted with the
target's probability of it, which is the rule of vLLM for greedy drafts and of SGLang's tree verification.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.tree import Tree
from eagle3_xla.target.attention import decoding, decoding_attention
from eagle3_xla.target.cache import SlotCache
from eagle3_xla.target.families import attention_masks
from eagle3_xla.target.model import Target
from eagle3_xla.target.sampling import choose_tokens

PREFILL_ROWS = 512  # of a prompt in one forward: attention scores of a long one never exist at once


@dataclass
class Generation:
    """One answer. tokens: ids, the end-of-turn token included if the target wrote it; seconds: its share of the
    decoding, prefill apart (of texts that are decoded at once, each has an equal share of a round).

    accepted: drafts accepted in every target call after prefill. Calls count whole, as SGLang
    (`spec_num_correct_drafts`) and vLLM (`spec_decode_num_accepted_tokens`) count them: drafts that an end-of-turn
    token or the length limit then cuts off are accepted ones too. The token that prefill chooses is no call's.
    rounds: the drafts of each of these calls, and the nodes that were kept, the root first.
    """

    tokens: list[int]
    seconds: float
    accepted: list[int] = field(default_factory=list)
    rounds: list[tuple[Tree, list[int]]] = field(default_factory=list)


Watch = Callable[[int, Generation], object]  # told of an answer's prompt (Choice.prompt) and of what there is of it


@dataclass
class Choice:
    """How the target chooses a token: greedily (temperature 0), or sampled from the top_p share of its distribution.

    The noise of a sample is a function of (seed, prompt, position) alone, so decoding with and without a head, alone
    and beside others, gives the same sampled answer, and `identical` means something there too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    prompt: int = 0

    def __call__(self, logits: torch.Tensor, position: int) -> int:
        """logits [V] -> token id; position: index of that token in the text."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.prompt, position)) & (2**63 - 1))
        return choose_tokens(logits[None], self.temperature, self.top_p, [generator])[0]


@dataclass
class _Text:
    """A prompt whose answer is being decoded. pending [p, 3H]: aux states of its last p rows that the head has not
    seen."""

    prompt: list[int]
    choose: Choice
    generation: Generation
    pending: torch.Tensor

    @property
    def known(self) -> int:
        """Rows in the target's cache: all tokens but the last."""
        return len(self.prompt) + len(self.generation.tokens) - 1


class Decoder:
    """The target's own decoding, one token a call and text. slots: texts at once; watch: told of every answer after its
    prefill and each of its calls, outside the time that is measured.
    """

    def __init__(self, target: Target, slots: int = 1):
        self.target, self.slots = target, slots
        self.watch: Watch = lambda prompt, generation: None

    def decode(
        self, prompt: list[int], max_new_tokens: int, stop_ids: set[int], choose: Choice | None = None
    ) -> Generation:
        """The Generation of one prompt."""
        return self.decode_all([prompt], max_new_tokens, stop_ids, [choose or Choice()])[0]

    @torch.inference_mode()
    def decode_all(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        choices: Sequence[Choice],
        done: Callable[[], object] = lambda: None,
    ) -> list[Generation]:
        """The Generation of each prompt, in their order. choices: of each prompt; done: called when an answer ends."""
        with decoding(self.target.model):
            return self._decode_all(prompts, max_new_tokens, stop_ids, choices, done)

    def _decode_all(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        choices: Sequence[Choice],
        done: Callable[[], object],
    ) -> list[Generation]:
        self.cache = SlotCache(self.slots, self.target.device)
        self.draft_cache = SlotCache(self.slots, self.target.device)
        waiting = deque(zip(prompts, choices))
        generations: list[Generation] = []
        running: list[_Text] = []  # text i has slot i
        while waiting or running:
            while waiting and len(running) < self.slots:
                text = self._start(len(running), *waiting.popleft())
                running.append(text)
                generations.append(text.generation)
                self._retire(running, len(running) - 1, max_new_tokens, stop_ids, done)
            if not running:
                continue
            started = time.perf_counter()
            self._round(running)
            seconds = (time.perf_counter() - started) / len(running)
            for slot in reversed(range(len(running))):  # from the end: a text that ends gives its slot to the last one
                running[slot].generation.seconds += seconds
                self._retire(running, slot, max_new_tokens, stop_ids, done)
        return generations

    def _retire(
        self, running: list[_Text], slot: int, max_new_tokens: int, stop_ids: set[int], done: Callable[[], object]
    ) -> None:
        """Cut the answer at its end and tell of it; take the text out if it has ended."""
        text, tokens = running[slot], running[slot].generation.tokens
        end = next((i + 1 for i, token in enumerate(tokens[:max_new_tokens]) if token in stop_ids), max_new_tokens)
        del tokens[end:]
        self.watch(text.choose.prompt, text.generation)
        if len(tokens) < end:
            return
        last = running.pop()
        if slot < len(running):
            running[slot] = last
            self.cache.move(len(running), slot)
            self.draft_cache.move(len(running), slot)
        done()

    def _start(self, slot: int, prompt: list[int], choose: Choice) -> _Text:
        """Prefill: the text with the first token of its answer."""
        aux = []
        for start in range(0, len(prompt), PREFILL_ROWS):
            rows = prompt[start : start + PREFILL_ROWS]
            own = torch.ones(1, len(rows), len(rows), dtype=torch.bool).tril()
            logits, states = self._target_rows(slot, [rows], [start], own, logits_to_keep=1)
            aux.append(states[0])
        token = choose(logits[0, -1], len(prompt))
        return _Text(prompt, choose, Generation([token], 0.0), torch.cat(aux))

    def _round(self, running: list[_Text]) -> None:
        """One target call: every text gets its accepted drafts and one token more."""
        trees = self._draft(running)
        known = [text.known for text in running]
        nodes = range(len(trees[0].tokens))  # as many in every tree
        own = torch.tensor([tree.visible([*nodes], [*nodes]) for tree in trees])
        logits, aux = self._target_rows(0, [tree.tokens for tree in trees], known, own)
        for i, (text, tree) in enumerate(zip(running, trees)):
            kept, new = self._accept(tree, logits[i], known[i] + 1, text.choose)
            text.pending = aux[i, kept]
            text.generation.tokens += new
            text.generation.accepted.append(len(kept) - 1)
            text.generation.rounds.append((tree, kept))
        self._keep(known, [text.generation.rounds[-1][1] for text in running])

    def _draft(self, running: list[_Text]) -> list[Tree]:
        return [Tree([text.generation.tokens[-1]]) for text in running]

    def _accept(self, tree: Tree, logits: torch.Tensor, position: int, choose: Choice) -> tuple[list[int], list[int]]:
        """From the root along the target's choices: the nodes passed, and the choice after each of them.

        logits [nodes, V]; position: index in the text of the token after the root.
        """
        node: int | None = 0
        kept: list[int] = []
        new: list[int] = []
        while node is not None:
            kept.append(node)
            new.append(choose(logits[node], position + len(new)))
            children = (child for child in range(len(tree.tokens)) if tree.parents[child] == node)
            node = next((child for child in children if tree.tokens[child] == new[-1]), None)
        return kept, new

    def _keep(self, known: list[int], kept: list[list[int]]) -> None:
        """Of the rows that the target has just checked, those of the kept nodes come to follow the known ones."""
        if all(nodes == [*range(len(nodes))] for nodes in kept):
            return
        most = max(map(len, kept))
        nodes = torch.tensor([[*row, *range(len(row), most)] for row in kept], device=self.target.device)
        start = torch.tensor(known, device=self.target.device)[:, None]
        self.cache.reorder(start + nodes, start + torch.arange(most, device=self.target.device))

    def _target_rows(
        self, first: int, tokens: list[list[int]], known: list[int], own: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target over n new rows of each text from slot `first` on; tokens [B, n].

        known: rows in the cache before them, which all of them see; own [B, n, n] bool: what they see of each other.
        Returns logits [B, n, V] and aux states [B, n, 3H].
        """
        device, length = self.target.device, max(known) + own.shape[-1]
        own, start = own.to(device), torch.tensor(known, device=device)[:, None]
        positions = start + own.sum(-1) - 1  # of a node: how many are above it
        places = start + torch.arange(own.shape[-1], device=device)
        keys = torch.arange(length, device=device).repeat(len(known), 1).scatter(1, places, positions)
        masks = attention_masks(
            self.target.model.config, _visible(start, places, own, length), positions[:, :, None] - keys[:, None]
        )
        self.cache.place(first, places, length)
        output = self.target.model(
            input_ids=torch.tensor(tokens, device=device),
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self.cache,
            **options,
        )
        return output.logits, self.target.captured_aux()


class SpeculativeDecoder(Decoder):
    """Draft-and-verify decoding. draft_tokens: drafts checked in a target call; steps: how deep the head drafts;
    topk: drafts per node (1: a chain, and steps = draft_tokens); slots: texts at once.
    """

    def __init__(
        self,
        target: Target,
        head: Eagle3Head,
        d2t: torch.Tensor,
        draft_tokens: int,
        topk: int = 1,
        steps: int | None = None,
        slots: int = 1,
    ):
        super().__init__(target, slots)
        self.head, self.draft_tokens, self.topk, self.steps = head, draft_tokens, topk, steps or draft_tokens
        if head.window and head.window < self.steps:  # a draft's own branch would fall out of its sight
            raise UserError(f"the head sees {head.window} positions: drafts of {self.steps} steps don't fit")
        self.draft_ids = draft_ids_of(d2t).to(target.device)

    def _start(self, slot: int, prompt: list[int], choose: Choice) -> _Text:
        text = super()._start(slot, prompt, choose)
        for start in range(0, len(prompt) - 1, PREFILL_ROWS):  # the last row waits for the first round
            tokens = prompt[start + 1 : start + 1 + PREFILL_ROWS]
            self._known_rows(slot, [text.pending[start : start + len(tokens)]], [tokens], [start])
        text.pending = text.pending[-1:]
        return text

    def _draft(self, running: list[_Text]) -> list[Tree]:
        """Feed the pending rows (aux state t, token t+1), then grow a tree after the last of them in every text."""
        known, pending = [text.known for text in running], [text.pending for text in running]
        tokens = [text.generation.tokens[-len(text.pending) :] for text in running]
        hidden = self._known_rows(0, pending, tokens, [k - len(p) for k, p in zip(known, pending)])
        texts = torch.arange(len(running), device=hidden.device)[:, None]
        hidden = hidden[texts[:, 0], [len(p) - 1 for p in pending]][:, None]
        # hidden [B, nodes of a frontier, H] predicts the children of the frontier's nodes.
        trees = [Tree([text.generation.tokens[-1]]) for text in running]
        frontiers: list[list[int]] = [[0] for _ in trees]
        for step in range(self.steps):
            logits = self.head.logits(hidden).float()
            top = logits.topk(self.topk)
            values = (top.values - logits.logsumexp(-1, keepdim=True)).tolist()
            children = []
            for tree, frontier, scores, tokens in zip(trees, frontiers, values, self.draft_ids[top.indices].tolist()):
                drafts = [(t, node, v) for node, row in zip(frontier, zip(tokens, scores)) for t, v in zip(*row)]
                children.append([tree.add(*draft) for draft in drafts])
            if step + 1 == self.steps:
                break
            parents = frontiers
            frontiers = [tree.best(nodes, self.topk) for tree, nodes in zip(trees, children)]
            places = [
                [above.index(tree.parents[node]) for node in frontier]
                for tree, above, frontier in zip(trees, parents, frontiers)
            ]
            own = torch.eye(self.topk, dtype=torch.bool).repeat(1, step + 1).expand(len(trees), -1, -1)
            tokens = [[tree.tokens[node] for node in frontier] for tree, frontier in zip(trees, frontiers)]
            positions = torch.tensor(known)[:, None].expand(-1, len(frontiers[0])) + step
            hidden = self._head_rows(0, tokens, self.head.fed_back(hidden[texts, places]), known, own, positions)
        return [tree.pruned(self.draft_tokens) for tree in trees]

    def _known_rows(
        self, first: int, aux: list[torch.Tensor], tokens: list[list[int]], start: list[int]
    ) -> torch.Tensor:
        """Run the head over rows made of the target's states, [p, 3H] of each text, padded to the longest.

        Returns hidden [B, longest, H], pre-norm. What the padding leaves in the cache, the next rows write over.
        """
        longest = max(map(len, tokens))
        padded = torch.nn.utils.rnn.pad_sequence(aux, batch_first=True).to(self.head.fc.weight.dtype)
        tokens = [[*row, *[0] * (longest - len(row))] for row in tokens]
        own = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(tokens), -1, -1)
        positions = torch.tensor(start)[:, None] + torch.arange(longest)
        return self._head_rows(first, tokens, self.head.features(padded), start, own, positions)

    def _head_rows(
        self,
        first: int,
        tokens: list[list[int]],
        hidden: torch.Tensor,
        known: list[int],
        own: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Run the head over n new rows of each text from slot `first` on; tokens [B][n], hidden [B, n, H].

        known: rows in the cache that all of them see; own [B, n, m] bool: what they see of the m rows after those,
        the last n of which are they themselves; positions [B, n]: for RoPE. Returns hidden [B, n, H], pre-norm.
        """
        device, length = hidden.device, max(known) + own.shape[-1]
        start = torch.tensor(known, device=device)[:, None]
        places = start + torch.arange(own.shape[-1], device=device)
        positions, mask = positions.to(device), _visible(start, places, own.to(device), length)
        if self.head.window:  # of the rows that all see, row i is position i; a draft's branch is never too far
            mask = mask & (positions[:, :, None] - torch.arange(length, device=device) < self.head.window)
        embedded = self.head.embedded(self.target.embed_tokens(torch.tensor(tokens, device=device)).to(hidden.dtype))
        self.draft_cache.place(first, places[:, own.shape[-1] - own.shape[1] :], length)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            key, value = self.draft_cache.update(key, value, 0)
            return decoding_attention(None, query, key, value, mask[:, None])[0]

        return self.head.midlayer(embedded, hidden, self.head.rotary(hidden, positions), attend)


def _visible(start: torch.Tensor, places: torch.Tensor, own: torch.Tensor, length: int) -> torch.Tensor:
    """[B, n, length] bool: rows see all before `start` [B, 1], and of the m rows at `places` [B, m] what `own`
    [B, n, m] says.
    """
    visible = torch.arange(length, device=start.device) < start[:, :, None]
    return visible.repeat(1, own.shape[1], 1).scatter(2, places[:, None].expand(-1, own.shape[1], -1), own)
