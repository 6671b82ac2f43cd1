"""The rules for the weights and for the target's folder. Each takes (head, target) and returns one Finding."""

from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from eagle3_xla import storage
from eagle3_xla.checks import read_json
from eagle3_xla.data.tokenizer import stop_token_ids
from eagle3_xla.doctor.files import Finding, Target
from eagle3_xla.draft.saved import QK_NORM_ARCHITECTURE, SavedHead, d2t_problem, expected_shapes
from eagle3_xla.errors import UserError
from eagle3_xla.target.weights import SINGLE, RangedFile, weight_map

EMBEDDING = "embed_tokens.weight"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def wanted_shapes(head: SavedHead) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that every engine loads, from config.json; 0 where it doesn't tell."""
    names = ("hidden_size", "intermediate_size", "draft_vocab_size", "num_attention_heads", "num_key_value_heads")
    config = SimpleNamespace(**{name: head.config.get(name) or 0 for name in (*names, "target_hidden_size")})
    heads = config.num_attention_heads
    config.head_dim = head.config.get("head_dim") or (config.hidden_size // heads if heads else 0)
    config.qk_norm = head.config.get("architectures") == [QK_NORM_ARCHITECTURE]
    return expected_shapes(config)


def weight_file(head: SavedHead, target: Target) -> Finding:
    if head.problem:
        return Finding("weight_file", "fail", head.problem)
    return Finding("weight_file", "pass", f"{len(head.tensors)} tensors")


def names(head: SavedHead, target: Target) -> Finding:
    known = {*wanted_shapes(head), "d2t", "t2d", EMBEDDING, *(f"fc_norm.{i}.weight" for i in range(3))}
    missing = sorted(wanted_shapes(head).keys() - head.tensors.keys())
    unknown = sorted(name for name in head.tensors.keys() - known if not name.endswith(".bias"))
    if not missing and not unknown:
        return Finding("tensor_names", "pass", "all there, none besides")
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown: {', '.join(unknown)}"] if unknown else []
    message = f"{'; '.join(parts)}. SGLang drops names that it doesn't know and keeps random weights for missing ones, "
    return Finding("tensor_names", "fail", message + "without a word; write them as midlayer.*, fc, norm, lm_head")


def shapes(head: SavedHead, target: Target) -> Finding:
    wrong = [
        f"{name} is {list(head.tensors[name].shape)}, {list(shape)} by config.json"
        for name, shape in wanted_shapes(head).items()
        if name in head.tensors and head.shape(name) != shape
    ]
    if not wrong:
        return Finding("tensor_shapes", "pass", "as config.json says")
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return Finding("tensor_shapes", "fail", f"{'; '.join(wrong[:2])}{more}: no engine loads these")


def values(head: SavedHead, target: Target) -> Finding:
    broken = []
    for name, value in head.tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            broken.append(f"{name} has NaN or infinity")
        elif name in wanted_shapes(head) and not value.float().any():
            broken.append(f"{name} is all zero")
    if not broken:
        return Finding("tensor_values", "pass", "finite, none all zero")
    return Finding("tensor_values", "fail", f"{'; '.join(broken)}: no draft is ever accepted; take another checkpoint")


def dtypes(head: SavedHead, target: Target) -> Finding:
    kinds = {head.tensors[name].dtype for name in wanted_shapes(head) if name in head.tensors}
    wrong = kinds - {*FLOATS}
    text = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in wrong or kinds))
    if wrong:
        return Finding("tensor_dtypes", "fail", f"weights of {text}; export as bfloat16, float16 or float32")
    if len(kinds) > 1:
        return Finding("tensor_dtypes", "warn", f"weights of {text} mixed: engines cast all to one of them")
    return Finding("tensor_dtypes", "pass", text)


def d2t(head: SavedHead, target: Target) -> Finding:
    vocabulary, rows = target.config.vocab_size, (head.shape("lm_head.weight") or (0,))[0]
    if "d2t" not in head.tensors:
        if rows == vocabulary:
            return Finding("d2t", "pass", "not needed, the head drafts over the whole vocabulary")
        message = (
            "d2t is missing: engines take draft ids for target ids, or leave the mapping empty, and accept next to "
        )
        message += "nothing; it can't be guessed, so export again from the checkpoint"
        return Finding("d2t", "fail", message)
    offsets, again = head.tensors["d2t"], "export again from the checkpoint"
    if problem := d2t_problem(offsets, vocabulary, rows):
        return Finding("d2t", "fail", f"d2t {problem}: {again}")
    ids = offsets.long() + torch.arange(rows)
    t2d = head.tensors.get("t2d")
    if t2d is not None and t2d.dtype == torch.bool and t2d.shape == (vocabulary,) and not t2d[ids].all():
        return Finding("d2t", "fail", f"d2t and t2d name different tokens, so one is not this head's: {again}")
    if rows == vocabulary:
        message = "d2t is there and the head drafts over the whole vocabulary: SGLang serves it, vLLM 0.32 stops at "
        message += "loading (no parameter named 'draft_id_to_target_id'); a d2t of zeros can go, `export` writes none"
        return Finding("d2t", "warn", message)
    if not offsets.any():
        return Finding("d2t", "warn", f"d2t is all zero: the draft vocabulary is the first {rows} ids, which few are")
    return Finding("d2t", "pass", f"{rows} of {vocabulary} tokens")


def t2d(head: SavedHead, target: Target) -> Finding:
    vocabulary, rows = target.config.vocab_size, (head.shape("lm_head.weight") or (0,))[0]
    if "t2d" not in head.tensors:
        needed = rows != vocabulary
        message = "t2d is missing: SGLang, vLLM and sglang-jax don't read it, SafeAILab's loader and trainers do"
        return Finding("t2d", "warn" if needed else "pass", message if needed else "not needed")
    mask = head.tensors["t2d"]
    if mask.dtype != torch.bool or mask.shape != (vocabulary,) or mask.sum() != rows:
        kind, true = str(mask.dtype).removeprefix("torch."), int((mask.float() != 0).sum())
        message = f"t2d is {kind} {list(mask.shape)}, true for {true} tokens; bool [{vocabulary}] true for "
        return Finding("t2d", "fail", message + f"the {rows} rows of lm_head is expected: export again")
    return Finding("t2d", "pass", f"true for {rows} tokens")


def end_of_turn(head: SavedHead, target: Target) -> Finding:
    """The draft vocabulary holds the tokens that end an answer."""
    offsets, rows = head.tensors.get("d2t"), head.shape("lm_head.weight") or (0,)
    if offsets is None or d2t_problem(offsets, target.config.vocab_size, rows[0]):
        return Finding("end_of_turn", "pass", "not looked at")
    of_config = target.config.eos_token_id
    if of_config is None and not (target.folder / "generation_config.json").is_file():
        return Finding("end_of_turn", "pass", "not looked at: the target's configs name no stop token")
    try:
        stop = stop_token_ids(target.name, SimpleNamespace(eos_token_id=of_config))
    except UserError as error:
        return Finding("end_of_turn", "fail", str(error))
    drafted = set((offsets.long() + torch.arange(len(offsets))).tolist())
    if stop & drafted:
        return Finding("end_of_turn", "pass", f"{sorted(stop & drafted)} in the draft vocabulary")
    message = f"none of the target's stop tokens {sorted(stop)} is in the draft vocabulary: the end is never drafted"
    return Finding("end_of_turn", "warn", message)


def embedding(head: SavedHead, target: Target) -> Finding:
    """Left out or the target's own: some engines take the head's, some the target's. A head of another hidden size
    than its target needs its own.
    """
    size, of_target = head.config.get("hidden_size"), target.config.hidden_size
    if size != of_target == head.config.get("target_hidden_size"):
        given, wanted = head.shape(EMBEDDING), (target.config.vocab_size, size)
        if given == wanted:
            return Finding("embedding", "pass", "embed_tokens is the head's own, of its own hidden size")
        message = f"embed_tokens is {list(given) if given else 'missing'} and {list(wanted)} is expected: the target's "
        return Finding("embedding", "fail", message + f"embeddings, of hidden size {of_target}, are none for this head")
    if EMBEDDING not in head.tensors:
        return Finding("embedding", "pass", "left out: engines lend the target's")
    try:
        own, lent = head.tensors[EMBEDDING], _target_embedding(target)
    except (UserError, OSError, SafetensorError) as error:
        return Finding("embedding", "fail", f"embed_tokens can't be compared with the target's: {error}")
    if lent is None:
        return Finding("embedding", "warn", "embed_tokens is there, and the target's weights are not, to compare it")
    if own.shape == lent.shape and torch.allclose(own.float(), lent.float(), rtol=1e-2, atol=1e-4):
        return Finding("embedding", "pass", "embed_tokens is the target's")
    message = "embed_tokens differs from the target's: engines that use it see other tokens than in training; drop it "
    return Finding("embedding", "fail", message + "from the file")


def _target_embedding(target: Target) -> torch.Tensor | None:
    name = "model.embed_tokens.weight"
    folder = target.name if storage.is_url(target.name) else str(target.folder)
    files = weight_map(folder)
    file = SINGLE if files is None else files.get(name)
    if not file or not storage.exists(storage.join(folder, file)):
        return None
    location = storage.join(folder, file)
    if storage.is_url(location):  # one request for the tensor, where the file has many
        weights = RangedFile(location)
        return weights.get_tensor(name) if name in weights.keys() else None
    with safe_open(location, framework="pt") as opened:
        return opened.get_tensor(name) if name in opened.keys() else None


def tokenizer(head: SavedHead, target: Target) -> Finding:
    """The target's tokenizer loads in every engine and has a chat template."""
    file = target.folder / "tokenizer_config.json"
    if not file.is_file():
        return Finding("target_tokenizer", "warn", "the target's folder has no tokenizer_config.json")
    try:
        settings = read_json(file)
    except UserError as error:
        return Finding("target_tokenizer", "fail", f"{error}: no engine loads the target's tokenizer")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        message = "tokenizer_class is TokenizersBackend, which engines on transformers 4 can't load; write "
        return Finding("target_tokenizer", "fail", message + f"PreTrainedTokenizerFast into {file}")
    if not settings.get("chat_template") and not file.with_name("chat_template.jinja").is_file():
        message = "the target has no chat template: a server then builds prompts that the head was not trained on"
        return Finding("target_tokenizer", "warn", message)
    return Finding("target_tokenizer", "pass", "with a chat template")


RULES = (names, shapes, dtypes, values, d2t, t2d, end_of_turn, embedding)
