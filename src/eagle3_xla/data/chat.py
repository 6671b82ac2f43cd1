"""Chats to token ids with the mask of what the assistant wrote.

The mask comes from prefix differences of the target's own chat template. An answer is what the template adds to the
prompt that an engine would be given at that point (everything before it, plus the generation prompt), up to its
end-of-turn token; what the template writes after that token (often a newline) is not the assistant's.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle3_xla.data.clean import Chat, Unusable
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.tokenizer import TemplateFailed, render_chat
from eagle3_xla.errors import UserError

LONGEST_TOKEN = 40  # characters a token, on average over a whole row: no text has so many


@dataclass
class Encoded:
    """ids [n] int32 and mask [n] bool, true on the tokens that count; cut: the chat was longer than a row."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool


class ChatEncoder:
    """Chats to ids and masks with one tokenizer. stop_ids: the tokens that end an answer."""

    def __init__(self, tokenizer: Any, stop_ids: set[int], data: DataConfig):
        if not tokenizer.is_fast:
            raise UserError("the target's tokenizer has no fast version (tokenizer.json), which character offsets need")
        self.tokenizer, self.stop_ids, self.data = tokenizer, stop_ids, data
        self.stops = sorted(tokenizer.convert_ids_to_tokens(sorted(stop_ids)))
        self.thinks = "enable_thinking" in str(tokenizer.chat_template)
        self.default_system = self._default_system() if data.drop_system else (0, "")

    def encode(self, chats: list[Chat]) -> list[Encoded | Unusable]:
        """Each chat's ids and mask, cut to data.row_length, or why it is left out."""
        found: list[tuple[str, list[tuple[int, int]], bool] | Unusable] = []
        for chat in chats:
            try:
                found.append(self._spans(chat))
            except Unusable as reason:
                found.append(reason)
        rendered = [item for item in found if not isinstance(item, Unusable)]
        encodings = iter(self._tokenize([text for text, _, _ in rendered]))
        return [item if isinstance(item, Unusable) else self._encoded(*item, next(encodings)) for item in found]

    def _spans(self, chat: Chat) -> tuple[str, list[tuple[int, int]], bool]:
        """The chat's text, the character spans of its answers, and whether it was too long for a row even so."""
        messages, shortened = self._shorten(self._vary_system(chat))
        if shortened and self.data.last_turn_only:
            raise Unusable("answer_after_row_length", f"its last answer is not within {self.data.row_length} tokens")
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prefixes = [messages[:i] for i in answers]
        prompts = [self._render(prefixes, chat, add_generation_prompt=True)]
        if self.thinks:  # a prompt that tells the model not to think holds an empty thought, which is not the model's
            prompts.insert(0, self._render(prefixes, chat, add_generation_prompt=True, enable_thinking=False))
        turns = self._render([messages[: i + 1] for i in answers], chat)
        turns[-1] = self._after_its_system(chat, prefixes[-1], [kind[-1] for kind in prompts], turns[-1])
        cut = not (chat.complete or shortened)
        if cut and self._closes_thought(prompts[-1][-1], messages[-1], turns[-1]):
            turns[-1] = prompts[-1][-1] + messages[-1]["content"]
        text = turns[-1]
        shown: list[tuple[int, int] | None] = []
        for number, turn in enumerate(turns):
            start, body = self._place(text, turn, [kind[number] for kind in prompts], messages[answers[number]])
            if start is None:  # the template shows this answer otherwise once others follow: it was never written so
                shown.append(None)
                continue
            at, stop = self._end_of_turn(body, messages[answers[number]])
            shown.append((start, start + at + (len(stop) if chat.complete or turn is not text else 0)))
        spans = [span for span in (shown[-1:] if self.data.last_turn_only else shown) if span]
        if not spans:
            raise Unusable("no_answer_in_template", "the chat template shows no answer after its generation prompt")
        at, default = self.default_system
        # With tools the template's system turn is another, which stays.
        shown_default = default and messages[0]["role"] != "system" and text.startswith(default, at)
        if shown_default and self._draw(chat) < self.data.drop_system:
            text = text[:at] + text[at + len(default) :]
            spans = [(start - len(default), end - len(default)) for start, end in spans]
        return text, spans, shortened

    def _after_its_system(self, chat: Chat, prefix: list[dict], prompts: list[str], turn: str) -> str:
        """`turn` as an engine has it whose template shows the system turn at an open question alone (Mistral's).

        prefix: the messages before its answer; prompts: the forms that they have.
        """
        if turn.startswith(tuple(prompts)) or not prefix or prefix[0]["role"] != "system":
            return turn
        [without] = self._render([prefix[1:]], chat, add_generation_prompt=True)
        return prompts[-1] + turn[len(without) :] if turn.startswith(without) else turn

    def _closes_thought(self, prompt: str, answer: dict, turn: str) -> bool:
        """Whether `turn` ends a thought within which the answer was cut off: the target never wrote that end."""
        said = answer["content"]
        opened = prompt.rstrip().endswith("<think>") or said.lstrip().startswith("<think>")
        whole = "</think>" in said or "reasoning_content" in answer
        return opened and not whole and "</think>" in turn.removeprefix(prompt)

    def _place(self, text: str, turn: str, prompts: list[str], answer: dict) -> tuple[int | None, str]:
        """Where in `text` the answer starts that `turn` adds to its prompt, and its text with what follows it.

        prompts: the forms that the prompt before it may have; turn: the chat up to and including the answer.
        """
        prompt = next((prompt for prompt in prompts if turn.startswith(prompt)), None)
        if prompt is None:
            return None, ""
        # Some templates strip the last answer alone; the same answer with more after it is then shown as it is.
        # With its thoughts left out it would be an answer that the target never gave.
        stripped = [answer["content"] + stop for stop in self.stops] if "reasoning_content" not in answer else []
        # Others end the last answer alone by a stop token (gpt-oss): what ends an earlier one is not the assistant's.
        body = turn[len(prompt) :]
        unended = [body.removesuffix(stop) for stop in self.stops if body.endswith(stop)]
        for form in (body, *stripped, *unended):
            for shown in prompts:
                if text.startswith(shown) and text.startswith(form, len(shown)):
                    return len(shown), form
        return None, ""

    def _end_of_turn(self, body: str, answer: dict) -> tuple[int, str]:
        """Where in `body` the answer's turn ends, and the stop token that ends it: its end and "" when there is none.

        The first after its text: templates may end the whole conversation by another one (Phi-3).
        """
        content, thoughts = answer["content"].strip(), answer.get("reasoning_content", "").strip()
        at = body.find(content, body.find(thoughts) + len(thoughts) if thoughts in body else 0)
        if at >= 0 and not answer.get("tool_calls"):
            after = at + len(content)
            found = [(body.find(stop, after), stop) for stop in self.stops]
            return min(((at, stop) for at, stop in found if at >= 0), default=(len(body), ""))
        found = [(body.rfind(stop), stop) for stop in self.stops]
        return max(((at, stop) for at, stop in found if at >= 0), default=(len(body), ""))

    def _encoded(self, text: str, spans: list[tuple[int, int]], shortened: bool, encoding: Any) -> Encoded | Unusable:
        ids, bounds = self._token_spans(text, spans, encoding)
        length, cut = self.data.row_length, shortened or len(ids) > self.data.row_length
        if cut and self.data.too_long == "turn":
            length = max((end for _, end in bounds if end <= length), default=0)
        mask: np.ndarray = np.zeros(min(len(ids), length), bool)
        for start, end in bounds:
            mask[start:end] = True
        # A row is drafted at only when two answer tokens follow each other (loss/unroll.py).
        if not (mask[1:] & mask[:-1]).any():
            if bounds and bounds[-1][1] > length:
                return Unusable("answer_after_row_length", f"no answer within {self.data.row_length} tokens")
            return Unusable("no_answer_tokens", "no token of the assistant is left to train on")
        return Encoded(np.asarray(ids[:length], np.int32), mask, cut)

    def _token_spans(
        self, text: str, spans: list[tuple[int, int]], encoding: Any
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the token spans of the character spans.

        A token across a boundary (an answer that starts with the whitespace that ends the prompt) never occurs in
        serving, where prompt and answer are tokenised apart: then the pieces are tokenised apart here too.
        """
        spans = [(start, self._past_stop(encoding, end)) for start, end in spans]
        tokens = [(_token_at(text, encoding, start), _token_at(text, encoding, end)) for start, end in spans]
        bounds = [(start, end) for start, end in tokens if start is not None and end is not None]
        if len(bounds) == len(spans):
            return encoding.ids, bounds
        edges = [0, *(char for span in spans for char in span), len(text)]
        pieces = self._tokenize([text[start:end] for start, end in zip(edges, edges[1:])])
        starts = np.cumsum([0] + [len(piece.ids) for piece in pieces])
        bounds = [(int(starts[2 * i + 1]), int(starts[2 * i + 2])) for i in range(len(spans))]
        return [token for piece in pieces for token in piece.ids], bounds

    def _past_stop(self, encoding: Any, char: int) -> int:
        """The character after the stop token that ends at `char`, whitespace included that belongs to it (Phi-3)."""
        token = encoding.char_to_token(char - 1) if char else None
        return char if token is None or encoding.ids[token] not in self.stop_ids else encoding.token_to_chars(token)[1]

    def _tokenize(self, texts: list[str]) -> list:
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def _shorten(self, messages: list[dict]) -> tuple[list[dict], bool]:
        """Without the exchanges that lie far beyond a row, so that they aren't rendered and tokenised for nothing."""
        limit, length = LONGEST_TOKEN * self.data.row_length, 0
        for number, message in enumerate(messages[:-1]):
            length += len(message["content"]) + len(message.get("reasoning_content", ""))
            length += LONGEST_TOKEN  # a turn has a token that marks it
            if message["role"] == "assistant" and length > limit:
                return messages[: number + 1], True
        return messages, False

    def _vary_system(self, chat: Chat) -> list[dict]:
        data = self.data
        if chat.messages[0]["role"] == "system" or not data.vary_system:
            return chat.messages
        draw = self._draw(chat) - data.drop_system
        if not 0 <= draw < data.vary_system:
            return chat.messages
        prompt = data.system_prompts[int(draw / data.vary_system * len(data.system_prompts))]
        return [{"role": "system", "content": prompt}, *chat.messages]

    def _draw(self, chat: Chat) -> float:
        """A number in [0, 1) that depends on the chat and the seed alone."""
        return random.Random(f"{self.data.seed} {chat.messages[0]['content']} {chat.messages[-1]['content']}").random()

    def _default_system(self) -> tuple[int, str]:
        """The template's own system turn, and the character at which it stands; empty when it has none."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        one, two, three = (self._render([chat], None)[0] for chat in ([user], [user, answer], [user, answer, user]))
        block = three[len(two) :] if three.startswith(two) else ""
        if not block or not one.endswith(block):
            raise UserError("setting data.drop_system: this chat template doesn't show where its system prompt ends")
        bos = self.tokenizer.bos_token or ""
        start = len(bos) if bos and one.startswith(bos) and bos not in block else 0
        return start, one[start : len(one) - len(block)]

    def _render(self, conversations: list[list[dict]], chat: Chat | None, **options: Any) -> list[str]:
        try:
            return render_chat(self.tokenizer, conversations, tools=chat.tools if chat else None, **options)
        except TemplateFailed as failure:
            raise Unusable("refused_by_template", f"the target's chat template refuses it ({failure})") from None


def _token_at(text: str, encoding: Any, char: int) -> int | None:
    """The token that starts at this character (the end of the text: the number of tokens); None: none does."""
    if char == len(text):
        return len(encoding.ids)
    token = encoding.char_to_token(char)
    return token if token is not None and encoding.token_to_chars(token)[0] == char else None
