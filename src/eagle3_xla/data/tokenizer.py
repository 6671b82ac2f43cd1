"""The target's tokenizer, its end-of-turn tokens and its vocabulary size, from a folder or a hub id."""

from eagle3_xla.config import UserError


def load_config(path: str):
    """The Hugging Face config of a causal LM. Raises UserError when there is none or it is another kind of model."""
    from transformers import AutoConfig

    if not path:
        raise UserError("setting target.path is empty; name a folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no target at {path!r}: {first_line(error)}") from None
    architectures = config.architectures or []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        raise UserError(f"{path!r} is not a causal LM: its config.json says architectures {architectures}")
    return config


def load_tokenizer(path: str):
    """The target's tokenizer. Raises UserError when there is none or it has no chat template."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        # AutoTokenizer puts Qwen2's own splitter in the place of a generic tokenizer when it sees `model_type: qwen2`.
        generic = get_tokenizer_config(path).get("tokenizer_class") == "PreTrainedTokenizerFast"
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {path!r}: {first_line(error)}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer at {path!r} has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(path: str, tokenizer) -> set[int]:
    """Ids that end an answer: generation_config.json's, else the tokenizer's end-of-turn token."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a folder or repository without that file
        ids = None
    if ids is None:
        ids = tokenizer.eos_token_id
    return set(ids) if isinstance(ids, list) else {ids}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
