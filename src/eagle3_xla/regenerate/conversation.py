"""One conversation through the target, turn by turn: each question is asked after the target's own earlier answers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

from eagle3_xla.data.clean import Chat, Unusable

# Engines take what a request doesn't name from the model's generation_config.json. These values change no distribution;
# of those for "no top_k", -1 is the one that vLLM and SGLang both take.
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": -1, "min_p": 0.0}


@dataclass
class Sampling:
    """temperature: 0 is greedy; max_tokens: of one answer."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


class Reply(NamedTuple):
    """One answer. finish: stop, or length when max_tokens or the context cut it off; tokens: that the target wrote;
    thoughts: those that chats hold beside the text (gpt-oss's).
    """

    text: str
    finish: str
    tokens: int
    thoughts: str = ""


class Refused(ValueError):
    """These messages can't be answered, now or later: they are too long for the target, for one."""


Ask = Callable[[list[dict], int], Awaitable[Reply]]  # (messages up to a question, seed) -> the answer


async def rewrite(chat: Chat, number: int, seed: int, ask: Ask) -> dict:
    """The conversation with the target's own answers, as a row for `prepare`.

    It ends early at an answer that was cut off (`finish`: length; what follows would build on half an answer), and
    before a question that the target can't take. Raises Unusable when nothing is left, and whatever `ask` raises.
    """
    messages: list[dict] = []
    tokens, finish, answered = 0, "stop", False
    for message in chat.messages:
        if message["role"] != "assistant":
            messages.append({"role": message["role"], "content": message["content"]})
            continue
        try:
            asked = [{name: each[name] for name in ("role", "content")} for each in messages]
            reply = await ask(asked, hash((seed, number, len(messages))) & 0x7FFFFFFF)
            if not reply.text.strip():
                thought = " but a thought" if reply.thoughts else ""
                raise Refused(f"the target answers nothing{thought} within {reply.tokens} tokens")
        except Refused as reason:
            if not answered:
                raise Unusable("no_answer", str(reason)) from None
            messages.pop()
            break
        thoughts = {"reasoning_content": reply.thoughts} if reply.thoughts else {}
        messages.append({"role": "assistant", "content": reply.text} | thoughts)
        tokens, finish, answered = tokens + reply.tokens, reply.finish, True
        if finish == "length":
            break
    return {"id": number, "source": chat.source, "messages": messages, "finish": finish, "new_tokens": tokens}
