"""A row of a public chat set -> a conversation that a chat template can take, or the reason why it can't be used.

Forms: `conversations` (from, value) and `messages` (role, content), TRL's `prompt` with `completion` (texts or lists of
messages), Alpaca's `instruction`, `input` and `output`. The oddities are those of ShareGPT, UltraChat-200K and
Open-PerfectBlend as they are published: answers first, the same role twice, empty or missing texts, left-overs of the
web page.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eagle3_xla.data.config import DataConfig
from eagle3_xla.errors import UserError

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
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
QUESTIONS = ("conversations", "messages", "turns", "prompt", "question", "problem", "instruction")
TOOLS = ("tool", "function", "observation", "function_response", "function_call")
REASONING = "reasoning_content"  # counted among the repairs: whether a template shows it is not known here
HUGE_TURN = 200_000  # characters; some ShareGPT turns are whole pasted files
CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
PAGE_LEFTOVER = re.compile(r"<(?:div|span|p|pre|code|button|svg)\s+class=|</(?:div|span|button|svg)>|Copy code`")
LANGUAGE_SAMPLE = 2000  # characters


@dataclass
class Chat:
    """One conversation.

    messages: OpenAI form, [{"role": ..., "content": ...}], ending with an answer; an answer may have thoughts,
    `reasoning_content`. complete: False when the last answer was cut by a length limit (so the target never wrote its
    end-of-turn token there); source: where the chat comes from; where: FILE:LINE; tools: the functions offered to the
    assistant, if any.
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

    def __reduce__(self) -> tuple[type["Unusable"], tuple[str, str]]:
        return Unusable, (self.reason, str(self))


def clean(row: dict, where: str, source: str, data: DataConfig, repairs: Counter[str]) -> Chat:
    """The conversation of one row, repaired where that is safe; `repairs` counts what was done to it, by kind.

    Raises Unusable for a conversation to leave out, UserError for a row that is no conversation at all.
    """
    turns = _turns(row)
    if turns is None:
        raise UserError(
            f"{where}: neither `conversations` nor `messages` nor `prompt` with `completion` nor `instruction` with "
            "`output` in this row"
        )
    messages = _without_oddities(messages_of(turns, data), repairs)
    if any(PAGE_LEFTOVER.search(CODE_BLOCK.sub("", m["content"])) for m in messages if m["role"] == "assistant"):
        raise Unusable("html", "an answer holds left-overs of a web page")
    complete = row.get("finish") != "length"
    if not complete and data.truncated_answers == "drop":
        raise Unusable("truncated_answer", 'marked `"finish": "length"`')
    _refuse_texts(
        [message[key] for message in messages for key in ("content", "reasoning_content") if key in message], data
    )
    if any("reasoning_content" in message for message in messages):
        repairs[REASONING] += 1
    tools = _read(row.get("tools"), list) if data.tool_turns == "keep" else None
    return Chat(messages, complete, source, where, tools if isinstance(tools, list) and tools else None)


def clean_questions(row: dict, where: str, source: str, data: DataConfig, repairs: Counter[str]) -> Chat:
    """The questions of one row, each with an answer after it that will be replaced, so whatever that one is.

    Takes what `clean` takes, and the forms of `question_turns`. Raises as `clean` does.
    """
    messages = questions_of(_turns(row) or question_turns(row, where), data, repairs)
    _refuse_texts([message["content"] for message in messages if message["role"] != "assistant"], data)
    return Chat(messages, True, source, where)


def questions_of(turns: Any, data: DataConfig, repairs: Counter[str]) -> list[dict]:
    """Turns of any row -> questions, each with an answer after it (empty where it has none that is usable), and system
    turns. Raises Unusable where nothing is asked."""
    kept: list[dict] = []
    for message in messages_of(turns, data, questions=True):
        if message["role"] == "assistant":
            if kept and kept[-1]["role"] == "user":
                kept.append(message)
            continue
        if not message["content"].strip():
            if message["role"] == "system":
                continue
            repairs["cut_at_an_empty_turn"] += 1
            break
        if kept and kept[-1]["role"] == message["role"] == "user":
            repairs["same_role_twice"] += 1
            kept[-1]["content"] += f"\n\n{message['content']}"
        else:
            kept.append(message)
    while kept and kept[-1]["role"] == "system":
        kept.pop()
    if not kept:
        raise Unusable("no_question", "no question in it")
    if kept[-1]["role"] == "user":
        kept.append({"role": "assistant", "content": ""})
    return kept


def _refuse_texts(texts: list[str], data: DataConfig) -> None:
    if any(len(text) > HUGE_TURN for text in texts):
        raise Unusable("huge_turn", f"a turn of {max(map(len, texts)):,} characters")
    if data.languages and (language := _language(texts)) not in data.languages:
        raise Unusable("language", f"its language is {language}")


def _turns(row: dict) -> Any:
    """The turns of a row in any of the forms, as they are; None: none of the forms."""
    for name in ("conversations", "messages"):
        if row.get(name) is not None:
            return row[name]
    if "prompt" in row and "completion" in row:
        question, answer = _as_turns(row["prompt"], "user"), _as_turns(row["completion"], "assistant")
        return question + answer if isinstance(question, list) and isinstance(answer, list) else None
    if "instruction" in row and "output" in row:
        return alpaca_question(row) + _as_turns(row["output"], "assistant")
    return [] if "conversations" in row or "messages" in row else None


def question_turns(row: dict, where: str) -> Any:
    """The turns of chats (messages may end with a question), or of questions alone: MT-Bench (`turns`, or a list of
    texts as `prompt`), HumanEval (`prompt`), GSM8K (`question`), MATH500 (`problem`), Alpaca (`instruction`, `input`).

    Texts are each answered before the next; messages stand as they are. Raises UserError for a row of no such form.
    """
    if chat := row.get("conversations") or row.get("messages"):
        return chat
    turns = row["turns"] if isinstance(row.get("turns"), list) else None  # elsewhere their number
    found = [value for value in (turns, *map(row.get, ("prompt", "question", "problem"))) if value not in (None, [])]
    if found:
        answer = {"role": "assistant", "content": ""}
        texts = found[0] if isinstance(found[0], list) else [found[0]]
        pairs = [[text] if isinstance(text, dict) else [{"role": "user", "content": text}, answer] for text in texts]
        return [turn for pair in pairs for turn in pair]
    if "instruction" in row:
        return alpaca_question(row)
    if row.keys().isdisjoint(QUESTIONS):
        raise UserError(f"{where}: no question in this row (none of {', '.join(f'`{name}`' for name in QUESTIONS)})")
    return []


def _as_turns(value: Any, role: str) -> list:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def alpaca_question(row: dict) -> list[dict]:
    """The instruction, then its input after an empty line, if it has one."""
    instruction, more = row["instruction"], row.get("input")
    if isinstance(instruction, str) and isinstance(more, str) and more.strip():
        instruction = f"{instruction}\n\n{more}"
    return [{"role": "user", "content": instruction}]


def messages_of(turns: Any, data: DataConfig, questions: bool = False) -> list[dict]:
    """Turns of any row in OpenAI form. questions: answers without a usable text are empty, not an error."""
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
        message = {"role": ROLES[role.lower()]}
        try:
            message["content"] = text_of(turn.get("content", turn.get("value")), role)
            thoughts = turn.get("reasoning_content") or turn.get("thinking")  # as gpt-oss's template names them
            if thoughts and message["role"] == "assistant":
                message["reasoning_content"] = text_of(thoughts, role)
        except Unusable:
            if not questions or message["role"] != "assistant":
                raise
            message["content"] = ""
        if calls:
            message["tool_calls"] = _calls(calls)
        messages.append(message)
    return messages


def _calls(calls: Any) -> Any:
    """Tool calls with their arguments as an object. OpenAI's API writes them as JSON text, and engines read that before
    their chat template sees it (SGLang, srt/entrypoints/openai/serving_chat.py: parse_tool_call_arguments)."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return calls
    read = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and "arguments" in function:
            function = function | {"arguments": _read(function["arguments"], dict)}
            call = call | {"function": function} if "function" in call else function
        read.append(call)
    return read


def _read(value: Any, kind: type) -> Any:
    """The object or list that a JSON text holds; anything else as it is."""
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, kind) else value
    return value


def text_of(content: Any, role: str) -> str:
    """A turn's text: a string, or text parts joined. Raises Unusable for anything else, and for what is no text."""
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


def _without_oddities(messages: list[dict], repairs: Counter[str]) -> list[dict]:
    """System turn, then user and assistant (or tool) turns that alternate and end with an answer."""
    if messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    kept: list[dict] = []
    for turn in turns:
        if not kept and turn["role"] == "assistant":
            repairs["answer_before_any_question"] += 1
            continue
        if not turn["content"].strip() and "tool_calls" not in turn:
            repairs["cut_at_an_empty_turn"] += 1
            break
        if (
            kept
            and turn["role"] == kept[-1]["role"] != "tool"
            and not ("tool_calls" in turn or "tool_calls" in kept[-1])
        ):
            repairs["same_role_twice"] += 1
            thoughts = [t["reasoning_content"] for t in (kept[-1], turn) if "reasoning_content" in t]
            kept[-1] = {"role": turn["role"], "content": f"{kept[-1]['content']}\n\n{turn['content']}"}
            kept[-1] |= {"reasoning_content": "\n\n".join(thoughts)} if thoughts else {}
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
