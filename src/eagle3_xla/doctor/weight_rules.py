"""The rules for the weights and for the target's folder. Each takes (head, target) and returns one Finding."""

import json

import torch
from safetensors import safe_open

from eagle3_xla.data.tokenizer import stop_token_ids
from eagle3_xla.doctor.files import Finding, Head, Target

NORMS = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
EMBEDDING = "embed_tokens.weight"


def expected_shapes(head: Head) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that every engine loads, from config.json; 0 where it doesn't tell."""
    sizes = ("hidden_size", "intermediate_size", "draft_vocab_size", "num_attention_heads", "num_key_value_heads")
    h, m, d, heads, kv_heads = (head.config.get(key) or 0 for key in sizes)
    head_dim = head.config.get("head_dim") or (h // heads if heads else 0)
    attention, mlp = "midlayer.self_attn", "midlayer.mlp"
    shapes = {
        "fc.weight": (h, 3 * h),
        f"{attention}.q_proj.weight": (heads * head_dim, 2 * h),
        f"{attention}.k_proj.weight": (kv_heads * head_dim, 2 * h),
        f"{attention}.v_proj.weight": (kv_heads * head_dim, 2 * h),
        f"{attention}.o_proj.weight": (h, heads * head_dim),
        f"{mlp}.gate_proj.weight": (m, h),
        f"{mlp}.up_proj.weight": (m, h),
        f"{mlp}.down_proj.weight": (h, m),
        "lm_head.weight": (d, h),
    }
    return shapes | {f"{norm}.weight": (h,) for norm in NORMS}


def weight_file(head: Head, target: Target) -> Finding:
    if head.problem:
        return Finding("weight_file", "fail", head.problem)
    return Finding("weight_file", "pass", f"{len(head.tensors)} tensors")


def names(head: Head, target: Target) -> Finding:
    known = {*expected_shapes(head), "d2t", "t2d", EMBEDDING, *(f"fc_norm.{i}.weight" for i in range(3))}
    missing = sorted(expected_shapes(head).keys() - head.tensors.keys())
    unknown = sorted(name for name in head.tensors.keys() - known if not name.endswith(".bias"))
    if not missing and not unknown:
        return Finding("tensor_names", "pass", "all there, none besides")
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"unknown: {', '.join(unknown)}"] if unknown else []
    message = f"{'; '.join(parts)}. SGLang drops names that it doesn't know and keeps random weights for missing ones, "
    return Finding("tensor_names", "fail", message + "without a word; write them as midlayer.*, fc, norm, lm_head")


def shapes(head: Head, target: Target) -> Finding:
    wrong = [
        f"{name} is {list(head.shape(name))}, {list(shape)} by config.json"
        for name, shape in expected_shapes(head).items()
        if name in head.tensors and head.shape(name) != shape
    ]
    if not wrong:
        return Finding("tensor_shapes", "pass", "as config.json says")
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return Finding("tensor_shapes", "fail", f"{'; '.join(wrong[:2])}{more}: no engine loads these")


def values(head: Head, target: Target) -> Finding:
    broken = []
    for name, value in head.tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            broken.append(f"{name} has NaN or infinity")
        elif name in expected_shapes(head) and not value.any():
            broken.append(f"{name} is all zero")
    if not broken:
        return Finding("tensor_values", "pass", "finite, none all zero")
    return Finding("tensor_values", "fail", f"{'; '.join(broken)}: no draft is ever accepted; take another checkpoint")


def dtypes(head: Head, target: Target) -> Finding:
    kinds = {name: value.dtype for name, value in head.tensors.items() if name in expected_shapes(head)}
    wrong = sorted({str(kind).removeprefix("torch.") for kind in kinds.values() if not kind.is_floating_point})
    if wrong:
        return Finding(
            "tensor_dtypes", "fail", f"weights of {', '.join(wrong)}; export as bfloat16, float16 or float32"
        )
    if len(set(kinds.values())) > 1:
        text = ", ".join(sorted({str(kind).removeprefix("torch.") for kind in kinds.values()}))
        return Finding("tensor_dtypes", "warn", f"weights of {text} mixed: engines cast all to one of them")
    return Finding("tensor_dtypes", "pass", ", ".join({str(kind).removeprefix("torch.") for kind in kinds.values()}))


def d2t(head: Head, target: Target) -> Finding:
    vocabulary, rows = target.config.vocab_size, (head.shape("lm_head.weight") or (0,))[0]
    if "d2t" not in head.tensors:
        if rows == vocabulary:
            return Finding("d2t", "pass", "not needed, the head drafts over the whole vocabulary")
        message = (
            "d2t is missing: engines take draft ids for target ids, or leave the mapping empty, and accept next to "
        )
        message += "nothing; it can't be guessed, so export again from the checkpoint"
        return Finding("d2t", "fail", message)
    offsets = head.tensors["d2t"]
    again = "export again from the checkpoint"
    if offsets.dtype not in (torch.int64, torch.int32):
        return Finding("d2t", "fail", f"d2t is {offsets.dtype}; int64 offsets are expected: {again}")
    if offsets.shape != (rows,):
        return Finding("d2t", "fail", f"d2t is {list(offsets.shape)} and lm_head has {rows} rows: {again}")
    ids = offsets.long() + torch.arange(rows)
    if (ids < 0).any() or (ids >= vocabulary).any() or len(ids.unique()) < rows:
        absolute = len(offsets.unique()) == rows and 0 <= offsets.min() and offsets.max() < vocabulary
        what = (
            "holds target ids; engines add the row's number to them" if absolute else "names ids twice or none at all"
        )
        return Finding("d2t", "fail", f"d2t {what} (target id = row + d2t[row], in 0..{vocabulary - 1}): {again}")
    if head.shape("t2d") == (vocabulary,) and not head.tensors["t2d"].bool()[ids].all():
        return Finding("d2t", "fail", f"d2t and t2d name different tokens, so one is not this head's: {again}")
    if rows < vocabulary and not offsets.any():
        return Finding("d2t", "warn", f"d2t is all zero: the draft vocabulary is the first {rows} ids, which few are")
    return Finding("d2t", "pass", f"{rows} of {vocabulary} tokens")


def t2d(head: Head, target: Target) -> Finding:
    vocabulary, rows = target.config.vocab_size, (head.shape("lm_head.weight") or (0,))[0]
    if "t2d" not in head.tensors:
        needed = rows != vocabulary
        message = "t2d is missing: SGLang, vLLM and sglang-jax don't read it, SafeAILab's loader and trainers do"
        return Finding("t2d", "warn" if needed else "pass", message if needed else "not needed")
    mask = head.tensors["t2d"]
    if mask.dtype != torch.bool or mask.shape != (vocabulary,) or mask.sum() != rows:
        message = (
            f"t2d is {mask.dtype} {list(mask.shape)}, true for {int(mask.sum())} tokens; bool [{vocabulary}] true for "
        )
        return Finding("t2d", "fail", message + f"the {rows} rows of lm_head is expected: export again")
    return Finding("t2d", "pass", f"true for {rows} tokens")


def end_of_turn(head: Head, target: Target) -> Finding:
    """The draft vocabulary holds the tokens that end an answer."""
    offsets = head.tensors.get("d2t")
    if offsets is None or target.folder is None or offsets.is_floating_point():
        return Finding("end_of_turn", "pass", "not looked at")
    stop = stop_token_ids(target.name, _Eos(target.config.eos_token_id)) - {None}
    drafted = set((offsets.long() + torch.arange(len(offsets))).tolist())
    if not stop or stop & drafted:
        return Finding("end_of_turn", "pass", f"{sorted(stop & drafted)} in the draft vocabulary")
    message = f"none of the target's stop tokens {sorted(stop)} is in the draft vocabulary: the end is never drafted"
    return Finding("end_of_turn", "warn", message)


class _Eos:
    """Where stop_token_ids looks when there is no generation_config.json."""

    def __init__(self, eos_token_id):
        self.eos_token_id = eos_token_id


def embedding(head: Head, target: Target) -> Finding:
    """Left out or the target's own: some engines take the head's, some the target's."""
    if EMBEDDING not in head.tensors:
        return Finding("embedding", "pass", "left out: engines lend the target's")
    own, of_target = head.tensors[EMBEDDING], _target_embedding(target)
    if of_target is None:
        return Finding("embedding", "warn", "embed_tokens is there, and the target's weights are not, to compare it")
    if own.shape == of_target.shape and torch.allclose(own.float(), of_target.float(), rtol=1e-2, atol=1e-4):
        return Finding("embedding", "pass", "embed_tokens is the target's")
    message = "embed_tokens differs from the target's: engines that use it see other tokens than in training; drop it "
    return Finding("embedding", "fail", message + "from the file")


def _target_embedding(target: Target) -> torch.Tensor | None:
    name = "model.embed_tokens.weight"
    if target.folder is None:
        return None
    index = target.folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"].get(name) if index.is_file() else "model.safetensors"
    if not file or not (target.folder / file).is_file():
        return None
    with safe_open(target.folder / file, framework="pt") as opened:
        return opened.get_tensor(name) if name in opened.keys() else None


def tokenizer(head: Head, target: Target) -> Finding:
    """The target's tokenizer loads in every engine and has a chat template."""
    file = target.folder and target.folder / "tokenizer_config.json"
    if not file or not file.is_file():
        message = "the target's folder has no tokenizer_config.json" if file else "not looked at"
        return Finding("target_tokenizer", "warn" if file else "pass", message)
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        message = "tokenizer_class is TokenizersBackend, which engines on transformers 4 can't load; write "
        return Finding("target_tokenizer", "fail", message + f"PreTrainedTokenizerFast into {file}")
    if not settings.get("chat_template") and not (target.folder / "chat_template.jinja").is_file():
        message = "the target has no chat template: a server then builds prompts that the head was not trained on"
        return Finding("target_tokenizer", "warn", message)
    return Finding("target_tokenizer", "pass", "with a chat template")


RULES = (names, shapes, dtypes, values, d2t, t2d, end_of_turn, embedding)
