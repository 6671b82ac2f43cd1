"""A row of a public chat set -> a conversation that a chat template can take, or the reason why it can't be used.

The oddities are those of ShareGPT, UltraChat-200K and Open-PerfectBlend as they are published: answers first, the same
role twice, empty or missing texts, left-overs of the web page.
"""

import re
from dataclasses import dataclass, field

from eagle3_xla.config import DataConfig, UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TOOLS = ("tool", "function", "observation", "function_response", "function_call")
HUGE_TURN = 200_000  # characters; some ShareGPT turns are whole pasted files
CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
PAGE_LEFTOVER = re.compile(r"<(?:div|span|p|pre|code|button|svg)\s+class=|</(?:div|span|button|svg)>|Copy code`")
LANGUAGE_SAMPLE = 2000  # characters


@dataclass
class Chat:
    """One conversation.

    messages: OpenAI form, [{"role": ..., "content": ...}], ending with an answer; complete: False when that answer was
    cut by a length limit (so the target never wrote its end-of-turn token there); source: where the chat comes from;
    where: FILE:LINE; tools: the functions offered to the assistant, if any.
    """

    messages: list[dict]
    complete: bool
    source: str
    where: str
    tools: list | None = None


class Unusable(ValueError):
    """A conversation to leave out. reason: a word to count it by; the message: what is wrong with this one."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return Unusable, (self.reason, str(self))


@dataclass
class Repairs:
    """How many conversations were used after a repair, by kind."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1


def clean(row: dict, where: str, source: str, data: DataConfig, repairs: Repairs) -> Chat:
    """The conversation of one row, repaired where that is safe.

    Raises Unusable for a conversation to leave out, UserError for a row that is no conversation at all.
    """
    messages = _without_oddities(_messages(row, where, data), repairs)
    texts = [message["content"] for message in messages]
    if any(len(text) > HUGE_TURN for text in texts):
        raise Unusable("huge_turn", f"a turn of {max(map(len, texts)):,} characters")
    if any(PAGE_LEFTOVER.search(CODE_BLOCK.sub("", m["content"])) for m in messages if m["role"] == "assistant"):
        raise Unusable("html", "an answer holds left-overs of a web page")
    complete = row.get("finish") != "length"
    if not complete and data.truncated_answers == "drop":
        raise Unusable("truncated_answer", 'marked `"finish": "length"`')
    if data.languages and (language := _language(texts)) not in data.languages:
        raise Unusable("language", f"its language is {language}")
    tools = row.get("tools") if data.tool_turns == "keep" and isinstance(row.get("tools"), list) else None
    return Chat(messages, complete, source, where, tools or None)


def _messages(row: dict, where: str, data: DataConfig) -> list[dict]:
    turns = next((row[name] for name in ("conversations", "messages") if name in row), None)
    if turns is None and not ("conversations" in row or "messages" in row):
        raise UserError(f"{where}: neither `conversations` nor `messages` in this row")
    if not isinstance(turns, list) or not turns:
        raise Unusable("no_turns", "the conversation has no turns" if not turns else "its turns are not a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
            raise Unusable("malformed_turn", "a turn without `role` or `from`")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Unusable("unknown_role", f"a turn of {str(role)[:40]!r}; known: {', '.join(ROLES)}")
        calls = turn.get("tool_calls") or None
        if (role.lower() in TOOLS or calls) and data.tool_turns == "drop":
            raise Unusable("tool_turn", "a tool turn (setting data.tool_turns keeps them)")
        message = {"role": ROLES[role.lower()], "content": _text(turn.get("content", turn.get("value")), role)}
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _text(content, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise Unusable("not_text", f"the text of a {role} turn is {type(content).__name__}, not a string")
    if "\0" in content or not _encodes(content):
        raise Unusable("bad_characters", f"a {role} turn holds NUL or half characters")
    return content


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes
        return False
    return True


def _without_oddities(messages: list[dict], repairs: Repairs) -> list[dict]:
    """System turn, then user and assistant (or tool) turns that alternate and end with an answer."""
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    kept = []
    for turn in turns:
        if not kept and turn["role"] == "assistant":
            repairs.add("answer_before_any_question")
            continue
        if not turn["content"].strip() and "tool_calls" not in turn:
            repairs.add("cut_at_an_empty_turn")
            break
        if (
            kept
            and turn["role"] == kept[-1]["role"] != "tool"
            and not ("tool_calls" in turn or "tool_calls" in kept[-1])
        ):
            repairs.add("same_role_twice")
            kept[-1] = {"role": turn["role"], "content": f"{kept[-1]['content']}\n\n{turn['content']}"}
            continue
        kept.append(turn)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if not kept:
        raise Unusable("no_answer", "no question with an answer in it")
    return system + kept


def _language(texts: list[str]) -> str:
    import py3langid

    return py3langid.classify(" ".join(texts)[:LANGUAGE_SAMPLE])[0]
