"""Answers from the target in this process: continuous batching, for small targets and machines without an engine.

Every step decodes one token of each running answer; a finished one gives its slot to the next question.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

import torch

from eagle3_xla.checks import first_line
from eagle3_xla.data.tokenizer import (
    TemplateFailed,
    answer_of,
    load_tokenizer,
    render_chat,
    stop_token_ids,
)
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.regenerate.conversation import Refused, Reply, Sampling
from eagle3_xla.target.attention import GROUPED_EINSUM
from eagle3_xla.target.cache import SlotCache
from eagle3_xla.target.families import attention_masks
from eagle3_xla.target.model import document_masks, load_target
from eagle3_xla.target.packed import pack
from eagle3_xla.target.sampling import choose_tokens

# On a GPU a forward over one prompt takes as long as one over many: new questions wait for each other, but not long.
TOGETHER, STEPS_TO_WAIT = 64, 8


@dataclass
class _Question:
    prompt: list[int]
    generator: torch.Generator
    answer: asyncio.Future
    tokens: list[int] = field(default_factory=list)


class LocalTarget:
    """`ask` as Servers has it. slots: answers decoded at once; device: cpu (float32) or cuda (bfloat16)."""

    def __init__(self, path: str, sampling: Sampling, slots: int, device: str):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is usable here")
        self.tokenizer = load_tokenizer(path)
        self.stop_ids = stop_token_ids(path, self.tokenizer)
        self.target = load_target(path, torch.float32 if device == "cpu" else torch.bfloat16).to(device)
        self.target.config._attn_implementation = GROUPED_EINSUM  # no repeated keys: half the time of a step
        pack(self.target)
        self.model, self.sampling, self.slots, self.device = path, sampling, slots, device
        self.context = self.target.config.max_position_embeddings
        self.together = TOGETHER if device == "cuda" else 1  # questions
        self.steps = 0
        self.cache = SlotCache(slots, device)
        self.waiting: deque[_Question] = deque()
        self.running: list[_Question] = []  # question i has slot i
        self.wake = asyncio.Event()
        self.failure: RunError | None = None

    async def __aenter__(self) -> "LocalTarget":
        self.loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.loop.cancel()

    async def ask(self, messages: list[dict], seed: int) -> Reply:
        """Raises Refused when the messages leave no room for an answer in the target's context, RunError when the
        target itself fails (out of memory).
        """
        if self.failure:
            raise self.failure
        try:
            words = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        except TemplateFailed as failure:
            raise Refused(f"the target's chat template refuses it ({failure})") from None
        prompt = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        if len(prompt) >= self.context:
            raise Refused(f"{len(prompt)} tokens; the target's context is {self.context}")
        generator = torch.Generator(self.device).manual_seed(seed)
        question = _Question(prompt, generator, asyncio.get_running_loop().create_future())
        self.waiting.append(question)
        self.wake.set()
        return await question.answer

    async def _run(self) -> None:
        try:
            while True:
                if not self.waiting and not self.running:
                    self.wake.clear()
                    await self.wake.wait()
                enough = len(self.waiting) >= self.together or self.steps % STEPS_TO_WAIT == 0 or not self.running
                while enough and self.waiting and len(self.running) < self.slots:
                    count = min(self.together, len(self.waiting), self.slots - len(self.running))
                    self._start([self.waiting[i] for i in range(count)])
                    for _ in range(count):
                        self.waiting.popleft()
                if self.running:
                    self._step()
                self.steps += 1
                await asyncio.sleep(0)  # finished conversations ask their next question
        except Exception as error:
            self.failure = RunError(f"the target can't go on answering: {first_line(error)}")
            for question in [*self.waiting, *self.running]:
                if not question.answer.done():
                    question.answer.set_exception(self.failure)

    @torch.inference_mode()
    def _start(self, questions: list[_Question]) -> None:
        """Prefill into the next free slots; the first token of each answer."""
        lengths = [len(question.prompt) for question in questions]
        first, longest = len(self.running), max(lengths)
        # What the padding leaves in a slot, the answer writes over before it can see it.
        ids = torch.tensor([[*q.prompt, *[0] * (longest - len(q.prompt))] for q in questions], device=self.device)
        positions = torch.arange(longest, device=self.device).repeat(len(ids), 1)
        self.cache.place(first, positions, longest)
        ends = sorted(set(lengths))
        logits = self.target(
            input_ids=ids,
            position_ids=positions,
            attention_mask=document_masks(self.target.config, torch.zeros_like(ids)),
            past_key_values=self.cache,
            logits_to_keep=torch.tensor(ends, device=self.device) - 1,
        ).logits
        logits = torch.stack([own[ends.index(length)] for own, length in zip(logits, lengths)])
        tokens = self._choose(logits, questions)
        self.running += questions
        for slot in reversed(range(first, len(self.running))):  # from the end: one that ends moves the last one
            self._take(slot, tokens[slot - first])

    @torch.inference_mode()
    def _step(self) -> None:
        last = torch.tensor([question.tokens[-1] for question in self.running], device=self.device)
        # The last token of each answer is not in the cache yet.
        positions = [len(question.prompt) + len(question.tokens) - 1 for question in self.running]
        at = torch.tensor(positions, device=self.device)
        self.cache.place(0, at[:, None], max(positions) + 1)
        distance = at[:, None, None] - torch.arange(max(positions) + 1, device=self.device)
        logits = self.target(
            input_ids=last[:, None],
            position_ids=at[:, None],
            attention_mask=attention_masks(self.target.config, distance >= 0, distance),
            past_key_values=self.cache,
        ).logits[:, -1]
        tokens = self._choose(logits, self.running)
        for slot in reversed(range(len(tokens))):  # from the end: a finished one moves the last into its slot
            self._take(slot, tokens[slot])

    def _choose(self, logits: torch.Tensor, questions: list[_Question]) -> list[int]:
        generators = [question.generator for question in questions]
        return choose_tokens(logits, self.sampling.temperature, self.sampling.top_p, generators)

    def _take(self, slot: int, token: int) -> None:
        question = self.running[slot]
        question.tokens.append(token)
        stopped = token in self.stop_ids
        full = len(question.tokens) >= self.sampling.max_tokens
        full = full or len(question.prompt) + len(question.tokens) >= self.context
        if not stopped and not full:
            return
        text, thoughts = answer_of(self.tokenizer, question.tokens[:-1] if stopped else question.tokens)
        if not question.answer.done():  # cancelled when another conversation failed
            question.answer.set_result(Reply(text, "stop" if stopped else "length", len(question.tokens), thoughts))
        moved = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = moved
            self.cache.move(len(self.running), slot)
