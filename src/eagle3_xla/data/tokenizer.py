"""The target's tokenizer, its end-of-turn tokens and its vocabulary size, from a folder, a URL or a hub id."""

import datetime
import json
import os
import re
from typing import Any, overload

from eagle3_xla import hub, local_copies, storage
from eagle3_xla.checks import config_fields, first_line, listing, number, text
from eagle3_xla.errors import UserError

SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
max_position_embeddings""".split()
ASKED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# Llama 3.2, gpt-oss and newer Mistrals write the day into their system prompt: rows, prompts and answers made
# here don't depend on the day. The date is the one that Llama's templates have where no clock is.
TODAY = datetime.date(2024, 7, 26)
# What gpt-oss writes after its generation prompt: a thought or none, then the answer; either may be cut off.
CHANNELS = re.compile(
    r"(?:<\|channel\|>analysis<\|message\|>((?:(?!<\|(?:end|start|channel)\|>).)*)"
    r"(?:<\|end\|><\|start\|>assistant(?=<\|channel\|>final)|\Z))?"
    r"(?:<\|channel\|>final<\|message\|>((?:(?!<\|(?:end|start|channel)\|>).)*))?",
    re.DOTALL,
)
# Fields of a target's config.json that change nothing that it computes, or that who saves or loads it writes anew.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what transformers ends in on odd files


def small_files(path: str) -> str:
    """A folder itself; of a URL or a hub id, a folder of this machine with all but the weights. Raises UserError."""
    if not storage.is_url(path):
        return path if os.path.exists(path) else str(hub.snapshot(path))
    try:
        return str(local_copies.local_folder(path, hub.SMALL))
    except FileNotFoundError as error:
        raise UserError(f"no target at {path!r}: {error}") from None


def written_config(path: str) -> dict:
    """config.json of a folder, a URL or a hub id as it is written. Raises UserError for none, or a field of a wrong
    type."""
    from transformers import PretrainedConfig

    if not path:
        raise UserError("setting target.path is empty; name a folder, a URL or a hub id")
    folder = small_files(path)
    try:
        written = PretrainedConfig.get_config_dict(folder)[0]
        written.pop("_commit_hash", None)  # which transformers adds in the hub's cache
    except UNREADABLE as error:
        raise UserError(f"no target at {path!r}: {first_line(error)}") from None
    where = f"target {path!r}: config.json"
    config_fields(written, where, SIZES, ("rope_scaling", "rope_parameters"))
    text(written.get("model_type", ""), f"{where}: model_type")
    for name in listing(written.get("architectures") or [], f"{where}: architectures"):
        text(name, f"{where}: architectures")
    return written


def config_content(config: dict, without: tuple[str, ...] = VOLATILE) -> bytes:
    """What a fingerprint takes of a config.json, as it is written: transformers' defaults, and what it adds, change
    with its version."""
    kept = {name: value for name, value in config.items() if value is not None and name not in without}
    return json.dumps(kept, sort_keys=True).encode()


def load_config(path: str) -> Any:
    """The Hugging Face config of a causal LM. Raises UserError when there is none or it is another kind of model."""
    from transformers import AutoConfig

    written_config(path)
    folder = small_files(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(f"no target at {path!r}: {first_line(error)}") from None
    architectures = config.architectures or []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        raise UserError(f"{path!r} is not a causal LM: its config.json says architectures {architectures}")
    for name in ASKED:
        number(getattr(config, name, None), f"target {path!r}: config.json: {name}", 1, whole=True)
    return config


def load_tokenizer(path: str) -> Any:
    """The target's tokenizer, without what its files say of truncation, padding and the spaces before punctuation.

    Raises UserError when there is none or it has no chat template.
    """
    from transformers import AutoTokenizer

    folder = small_files(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, clean_up_tokenization_spaces=False)
    except Exception as error:  # the Rust tokenizers raise plain Exceptions for a file that they can't read
        has_one = os.path.exists(os.path.join(folder, "tokenizer.json"))  # else transformers talks of others
        why = first_line(error) if has_one else "there is no tokenizer.json"
        raise UserError(f"no tokenizer at {path!r}: {why}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer at {path!r} has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.is_fast:  # saved after a call with truncation or padding, its file holds them on
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def stop_token_ids(path: str, tokenizer: Any) -> set[int]:
    """Ids that end an answer: generation_config.json's, else the tokenizer's end-of-turn token.

    Raises UserError when there is none, or one that the tokenizer doesn't know.
    """
    from transformers import GenerationConfig

    folder = small_files(path)
    try:
        there = os.path.exists(os.path.join(folder, "generation_config.json"))
        ids = GenerationConfig.from_pretrained(folder).eos_token_id if there else None
    except UNREADABLE as error:
        raise UserError(f"target {path!r}: generation_config.json can't be read: {first_line(error)}") from None
    where = "generation_config.json: eos_token_id"
    if ids is None:
        where, ids = "tokenizer_config.json: eos_token", tokenizer.eos_token_id
    if ids is None or ids == []:
        raise UserError(
            f"target {path!r} names no token that ends an answer, neither eos_token_id in generation_config.json nor "
            "eos_token in tokenizer_config.json"
        )
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else 1 << 24
    ids = ids if isinstance(ids, list) else [ids]
    return {number(token, f"target {path!r}: {where}", 0, known - 1, whole=True) for token in ids}


class TemplateFailed(ValueError):
    """A chat template refuses a conversation, or does not parse; the message is one line."""


@overload
def render_chat(tokenizer: Any, messages: list[dict], **options: Any) -> str: ...
@overload
def render_chat(tokenizer: Any, messages: list[list[dict]], **options: Any) -> list[str]: ...
def render_chat(tokenizer: Any, messages: list, **options: Any) -> str | list[str]:
    """The text that the target's chat template makes of a conversation, or of each of several, on the day TODAY."""
    template = str(tokenizer.chat_template)
    if "message.thinking" in template and "reasoning_content" not in template:  # gpt-oss
        messages = _with_thinking(messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime, **options)
    except Exception as error:  # a template is foreign code: it raises as it likes
        raise TemplateFailed(f"{type(error).__name__}: {first_line(error)}") from None


def _with_thinking(messages: list) -> list:
    """A conversation, or each of several, with `reasoning_content` named `thinking`, but beside a tool call that has a
    text too, where gpt-oss's template refuses it."""

    def named(message: dict) -> dict:
        if message.get("tool_calls") and message.get("content"):
            return message
        return {"thinking" if key == "reasoning_content" else key: value for key, value in message.items()}

    return [_with_thinking(each) if isinstance(each, list) else named(each) for each in messages]


def answer_of(tokenizer: Any, ids: list[int]) -> tuple[str, str]:
    """(text, thoughts) of an answer as chats hold them; ids: its tokens without its end of turn. Both are empty for one
    that gpt-oss's template has no form for (a call)."""
    if "<|channel|>" in str(tokenizer.chat_template):  # without its special tokens, thoughts would run into the text
        return read_channels(tokenizer.decode(ids))
    return tokenizer.decode(ids, skip_special_tokens=True), ""


def read_channels(written: str) -> tuple[str, str]:
    """`answer_of` gpt-oss's own words."""
    found = CHANNELS.fullmatch(written)
    return (found[2] or "", found[1] or "") if found else ("", "")


def shows_reasoning(tokenizer: Any) -> bool:
    """Whether the chat template shows an answer's `reasoning_content`."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "sphinx"}]
    try:
        return "sphinx" in render_chat(tokenizer, chat)
    except TemplateFailed:  # whether it takes real chats is found out with them
        return False
