"""Chats to token ids with the target's own chat template, and the mask of the tokens the assistant wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

from eagle3_xla.config import UserError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass
class Chat:
    """One conversation.

    messages: OpenAI form, [{"role": ..., "content": ...}]; complete: False when the last answer was cut by a length
    limit (so the target never wrote its end-of-turn token there); source: where the chat comes from; where: FILE:LINE.
    """

    messages: list[dict]
    complete: bool
    source: str
    where: str


def read_chats(path: Path) -> list[Chat]:
    """Read a JSONL file with `conversations` (ShareGPT: from/value) or `messages` (OpenAI: role/content) in each line.

    A field `finish: "length"` says that the last answer was cut off. Raises UserError naming the file and the line.
    """
    chats = []
    for where, row in read_jsonl(path):
        if "messages" in row:
            turns, role_key, text_key = row["messages"], "role", "content"
        elif "conversations" in row:
            turns, role_key, text_key = row["conversations"], "from", "value"
        else:
            raise UserError(f"{where}: neither `conversations` nor `messages` in this row")
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: the conversation has no turns")
        messages = [_message(turn, role_key, text_key, where) for turn in turns]
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{where}: no assistant turn, so there is nothing to train on")
        chats.append(Chat(messages, row.get("finish") != "length", str(row.get("source", path.stem)), where))
    return chats


def read_prompts(path: Path) -> list[list[dict]]:
    """Read evaluation prompts: JSONL rows with `conversations`, `messages`, `turns` or `prompt`.

    Returns the messages up to and including the first user turn of each row (a system turn before it is kept).
    """
    prompts = []
    for where, row in read_jsonl(path):
        if "prompt" in row:
            turns = [{"role": "user", "content": row["prompt"]}]
        elif "turns" in row and isinstance(row["turns"], list):
            turns = [{"role": "user", "content": turn} for turn in row["turns"][:1]]
        elif "messages" in row:
            turns = row["messages"]
        elif "conversations" in row:
            turns = row["conversations"]
        else:
            raise UserError(f"{where}: none of `conversations`, `messages`, `turns`, `prompt` in this row")
        if not isinstance(turns, list):
            raise UserError(f"{where}: the conversation is not a list of turns")
        role_key, text_key = ("from", "value") if "conversations" in row else ("role", "content")
        prompt = []
        for turn in turns:
            prompt.append(_message(turn, role_key, text_key, where))
            if prompt[-1]["role"] == "user":
                break
        if not prompt or prompt[-1]["role"] != "user":
            raise UserError(f"{where}: no user turn to ask")
        prompts.append([message for message in prompt if message["role"] in ("system", "user")])
    return prompts


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """All rows of a JSONL file as (FILE:LINE, object). Raises UserError on a missing, empty or broken file or line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                raise UserError(f"{where}: empty line; remove it")
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON object was expected, not {type(row).__name__}")
            rows.append((where, row))
    if not rows:
        raise UserError(f"{path}: the file is empty")
    return rows


def _message(turn, role_key: str, text_key: str, where: str) -> dict:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise UserError(f"{where}: a turn needs `{role_key}` and `{text_key}`")
    role, text = turn[role_key], turn[text_key]
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise UserError(f"{where}: the text of a {role} turn is {type(text).__name__}, not a string")
    return {"role": ROLES[role], "content": text}


def encode_chat(tokenizer, chat: Chat) -> tuple[list[int], list[int]]:
    """Token ids and loss mask (1 on tokens the assistant wrote, its end-of-turn token included) of one chat.

    The mask comes from prefix differences: an assistant turn is what the template adds to everything before it plus
    the generation prompt. What the template writes after the end-of-turn token (often a newline) is not the
    assistant's. Raises UserError when the template doesn't keep prefixes or the mask is empty.
    """
    messages = chat.messages
    ids = _template(tokenizer, messages, chat.where)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_template(tokenizer, messages[:i], chat.where, add_generation_prompt=True))
        turn = _template(tokenizer, messages[: i + 1], chat.where)
        if ids[: len(turn)] != turn:
            raise UserError(f"{chat.where}: the chat template rewrites earlier turns; its assistant mask is unknown")
        ends = [t for t in range(start, len(turn)) if ids[t] == tokenizer.eos_token_id]
        end = ends[-1] + 1 if ends else len(turn)
        if ends and i == len(messages) - 1 and not chat.complete:
            end -= 1  # the answer was cut: the target did not end its turn here
        mask[start:end] = [1] * max(end - start, 0)
    if not any(mask):
        raise UserError(f"{chat.where}: no token of the assistant is left to train on")
    return ids, mask


def _template(tokenizer, messages: list[dict], where: str, add_generation_prompt: bool = False) -> list[int]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )["input_ids"]
    except TemplateError as error:
        raise UserError(f"{where}: the target's chat template refuses this conversation ({error})") from None
